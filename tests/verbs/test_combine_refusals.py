# SPDX-License-Identifier: Apache-2.0
"""What cannot be added without the base, or not at all, is refused by name; what need not be touched is kept."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from surgery import combine
from surgery_formats.errors import FitError, NothingChangedError
from tests.support.adapter_files import (
    GOLDEN,
    config_of,
    draw,
    write_peft,
)
from tests.support.combinations import Q, lora, simple


def _dora(folder: Path) -> Path:
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 2, 32),
        f"{Q}.lora_B.weight": draw(2, 24, 2),
        f"{Q}.lora_magnitude_vector": np.abs(draw(3, 24)),
    }
    return write_peft(folder, tensors, r=2, use_dora=True, target_modules=["q_proj"])


def test_dora_survives_alone_and_is_refused_otherwise(tmp_path: Path) -> None:
    dora = _dora(tmp_path / "d")
    stem = Q.replace("q_proj", "v_proj")
    tensors = load_file(dora / "adapter_model.safetensors")
    second = write_peft(
        tmp_path / "e",
        {k.replace(Q, stem): v for k, v in tensors.items()},
        r=2,
        use_dora=True,
        target_modules=["v_proj"],
    )
    result = combine([(dora, 1.0), (second, 1.0)], output=tmp_path / "out")
    assert {one.outcome for one in result.modules} == {"kept"}
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(np.array_equal(merged[name], value) for name, value in tensors.items())
    assert config_of(tmp_path / "out")["use_dora"] is True
    for pairs in ([(dora, 0.5)], [(dora, 1.0), (simple(tmp_path / "a"), 1.0)]):
        with pytest.raises(FitError, match="depends on the base"):
            combine(pairs, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_whole_parameters_are_kept_at_weight_one_and_refused_otherwise(tmp_path: Path) -> None:
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 2, 32),
        f"{Q}.lora_B.weight": draw(2, 24, 2),
        "base_model.model.model.norm.weight": draw(3, 32),
    }
    saved = write_peft(tmp_path / "s", tensors, r=2, modules_to_save=["norm"])
    other = simple(tmp_path / "a")
    combine([(other, 0.5), (saved, 1.0)], output=tmp_path / "out")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert np.array_equal(got["base_model.model.model.norm.weight"], tensors["base_model.model.model.norm.weight"])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["norm"]
    with pytest.raises(FitError, match=r"0\.5 times depends on the base"):
        combine([(other, 1.0), (saved, 0.5)], output=tmp_path / "x")
    twice = write_peft(tmp_path / "t", tensors, r=2, modules_to_save=["norm"])
    with pytest.raises(FitError, match="by one of them as replacement") as caught:
        combine([(saved, 1.0), (twice, 1.0)], output=tmp_path / "x")
    assert caught.value.exit_code == 4


def test_soft_prompts_shapes_and_empty_results_are_refused(tmp_path: Path) -> None:
    one = simple(tmp_path / "a")
    wide = lora(tmp_path / "w", 3, 2, {"self_attn.q_proj": (24, 40)})
    with pytest.raises(FitError, match="made for different weights"):
        combine([(one, 1.0), (wide, 1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="cancel"):
        combine([(one, 1.0), (simple(tmp_path / "b"), -1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="what it was"):
        combine([(one, 1.0)], output=tmp_path / "x")
    with pytest.raises(NothingChangedError, match="every weight is 0"):
        combine([(one, 0.0)], output=tmp_path / "x")
    with pytest.raises(FitError, match="the weight nan is not finite"):
        combine([(one, math.nan)], output=tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "w"]


def test_rows_that_wait_for_a_base_ask_for_it_and_not_for_a_rank(tmp_path: Path) -> None:
    folder = GOLDEN / "gguf/llama"
    both = [folder / "lora/peft", folder / "lora/adapter.gguf"]
    with pytest.raises(FitError, match="rotary pairs") as caught:
        combine(both, output=tmp_path / "sum", dry_run=True)
    assert caught.value.hint == "give it with `base=`"
    assert combine(both, base=folder / "base", output=tmp_path / "sum", dry_run=True)


def test_a_flattened_name_asks_for_the_base(tmp_path: Path) -> None:
    """Of two spellings in a sum, not another format: without a base none of them has the dots."""
    dotted = GOLDEN / "dotted/diffusers/adapter.safetensors"
    flat = GOLDEN / "kohya/sdxl/diffusers-names/adapter.safetensors"
    with pytest.raises(FitError, match="its name is flattened") as caught:
        combine([dotted, flat], output=tmp_path / "sum.safetensors")
    assert caught.value.hint == "give the base with `base=`"


def test_two_layouts_of_one_network_are_summed_by_its_base_alone(tmp_path: Path) -> None:
    """Without it each weight would have two LoRAs in the sum, of which programs load one."""
    both = [GOLDEN / f"kohya/sdxl/{names}/adapter.safetensors" for names in ("sgm-names", "diffusers-names")]
    with pytest.raises(FitError, match="name one network's modules in two ways") as caught:
        combine(both, output=tmp_path / "sum.safetensors")
    assert caught.value.hint == "give the model with `base=`, which knows its weights"
    found = combine(both, base=GOLDEN / "kohya/sdxl/base", output=tmp_path / "sum.safetensors")
    assert len(found.modules) == 71
    assert combine([both[0], both[0]], output=tmp_path / "twice.safetensors")
