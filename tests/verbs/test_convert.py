# SPDX-License-Identifier: Apache-2.0
"""Conversion: random adapters go round and come back the same, and whatever cannot is refused without a trace."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from surgery import convert
from surgery_formats.errors import FitError
from tests.support.adapter_files import (
    GOLDEN,
    LLAMA,
    UNET,
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    llama,
    llama_lora,
    mlx_deltas,
    peft_deltas,
    unet,
    write_peft,
)

_SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def _peft(draw_: st.DrawFn, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """A random LoRA on some weights of a base: ranks, alphas and patterns as people write them."""
    weights = sorted(name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1)
    chosen = draw_(st.lists(st.sampled_from(weights), min_size=1, unique=True))
    default = draw_(st.integers(1, 4))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, np.ndarray] = {}
    dtype = draw_(st.sampled_from([np.float32, np.float16, np.float64]))
    for number, name in enumerate(chosen):
        module, shape = name.removesuffix(".weight"), shapes[name]
        rank = default
        if draw_(st.booleans()):
            rank = ranks[f"^{re.escape(module)}"] = draw_(st.integers(1, 5))
        if draw_(st.booleans()):
            alphas[f"^{re.escape(module)}"] = draw_(st.sampled_from([1, 2, 0.5, 7, 16.0, 3.3]))
        stem, ones = f"base_model.model.{module}", (1,) * (len(shape) - 2)
        if module.endswith("embed_tokens"):
            tensors[f"{stem}.lora_embedding_A"] = draw(number, rank, shape[0], dtype=dtype)
            tensors[f"{stem}.lora_embedding_B"] = draw(number + 50, shape[1], rank, dtype=dtype)
        else:
            tensors[f"{stem}.lora_A.weight"] = draw(number, rank, *shape[1:], dtype=dtype)
            tensors[f"{stem}.lora_B.weight"] = draw(number + 50, shape[0], rank, *ones, dtype=dtype)
    config = {
        "r": default,
        "lora_alpha": draw_(st.sampled_from([1, 4, 8, 0.1, 32])),
        "use_rslora": draw_(st.booleans()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return tensors, config


@_SETTINGS
@given(_peft(LLAMA), st.booleans())
def test_peft_to_mlx_and_back(made: tuple[dict[str, np.ndarray], dict[str, object]], with_base: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_peft(folder / "a", made[0], **made[1])
        base = llama(folder / "base") if with_base else None
        first = convert(source, "mlx", output=folder / "b", base=base)
        second = convert(folder / "b", "peft", output=folder / "c", base=base)
        want = peft_deltas(source)
        assert_close(mlx_deltas(folder / "b"), want)
        assert_close(peft_deltas(folder / "c"), want)
        assert max(first.max_error, second.max_error) <= 1e-6


@_SETTINGS
@given(_peft(UNET))
def test_peft_to_kohya_and_back(made: tuple[dict[str, np.ndarray], dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_peft(folder / "a", made[0], **made[1])
        base = unet(folder / "base")
        convert(source, "kohya", output=folder / "b.safetensors", base=base)
        convert(folder / "b.safetensors", "peft", output=folder / "c", base=base)
        want = peft_deltas(source)
        flat = {f"lora_unet_{module.replace('.', '_')}": value for module, value in want.items()}
        assert_close(kohya_deltas(folder / "b.safetensors"), flat)
        assert_close(peft_deltas(folder / "c"), want)


@_SETTINGS
@given(_peft(LLAMA))
def test_peft_to_peft_changes_nothing(made: tuple[dict[str, np.ndarray], dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_peft(folder / "a", made[0], **made[1])
        convert(source, "peft", output=folder / "b")
        assert config_of(folder / "b") == config_of(source)
        one, other = (load_file(folder / side / "adapter_model.safetensors") for side in "ab")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_wrong_base_is_refused(tmp_path: Path, fault: str) -> None:
    module = "model.layers.9.self_attn.q_proj" if fault == "missing" else "model.layers.0.self_attn.k_proj"
    stem = f"base_model.model.{module}"
    source = write_peft(
        tmp_path / "a", {f"{stem}.lora_A.weight": draw(1, 2, 6), f"{stem}.lora_B.weight": draw(2, 6, 2)}, r=2
    )
    with pytest.raises(FitError, match="layers") as caught:
        convert(source, "mlx", output=tmp_path / "b", base=llama(tmp_path / "base"))
    assert caught.value.exit_code == 4
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


def test_a_pipeline_of_which_no_part_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="it fits none"):
        convert(llama_lora(tmp_path / "a"), "kohya", output=tmp_path / "x.safetensors", base=GOLDEN / "kohya/sd1/base")


def test_what_a_format_has_not_may_become_a_lora(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj.hada"
    tensors = {f"{stem}_w{i}_{side}": draw(i, *shape) for i in (1, 2) for side, shape in (("a", (8, 2)), ("b", (2, 9)))}
    loha = write_peft(tmp_path / "a", tensors, peft_type="LOHA", r=2, alpha=4, target_modules=["q_proj"])
    with pytest.raises(FitError, match=r"mlx cannot hold 1 of 1 parts.*no LoHa") as caught:
        convert(loha, "mlx", output=tmp_path / "mlx")
    assert caught.value.hint == "`as_lora=True` makes LoRAs of other kinds"
    assert convert(loha, "mlx", output=tmp_path / "mlx", as_lora=True).max_error < 1e-6


def test_kohya_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="`base=`"):
        convert(llama_lora(tmp_path / "a"), "kohya", output=tmp_path / "x.safetensors")


def test_half_precision_is_kept_and_folding_widens(tmp_path: Path) -> None:
    def half(module: str, rank: int) -> dict[str, np.ndarray]:
        stem = f"base_model.model.model.layers.0.self_attn.{module}"
        return {
            f"{stem}.lora_A.weight": draw(1, rank, 6, dtype=np.float16),
            f"{stem}.lora_B.weight": draw(2, 6, rank, dtype=np.float16),
        }

    source = write_peft(
        tmp_path / "a",
        half("q_proj", 2) | half("o_proj", 2) | half("v_proj", 2),
        r=2,
        lora_alpha=2,
        alpha_pattern={"v_proj": 3},
    )
    convert(source, "mlx", output=tmp_path / "b")
    kinds = {name: value.dtype for name, value in load_file(tmp_path / "b/adapters.safetensors").items()}
    assert kinds.pop("model.layers.0.self_attn.v_proj.lora_b") == np.float32
    assert set(kinds.values()) == {np.dtype(np.float16)}
    assert_close(mlx_deltas(tmp_path / "b"), peft_deltas(source))


def test_a_type_can_be_chosen(tmp_path: Path) -> None:
    source = llama_lora(tmp_path / "a")
    result = convert(source, "mlx", output=tmp_path / "b", dtype="fp16")
    assert {v.dtype for v in load_file(tmp_path / "b/adapters.safetensors").values()} == {np.dtype(np.float16)}
    assert 1e-6 < result.max_error < 2e-3
    assert {entry.outcome for entry in result.entries} == {"rounded"}
    assert all(entry.detail.endswith("stored as F16") for entry in result.entries)
    wider = convert(tmp_path / "b", "peft", output=tmp_path / "d", dtype="fp32")
    assert {entry.outcome for entry in wider.entries} <= {"exact", "folded"}
    assert wider.max_error < 1e-6
    with pytest.raises(FitError, match="factors cannot be stored"):
        convert(source, "mlx", output=tmp_path / "c", dtype="i8")
    with pytest.raises(FitError, match="no type 'nonsense'"):
        convert(source, "mlx", output=tmp_path / "c", dtype="nonsense")


def test_a_value_too_large_for_the_type(tmp_path: Path) -> None:
    source = write_peft(
        tmp_path / "a",
        {f"{Q}.lora_A.weight": np.full((2, 6), 1e5, np.float32), f"{Q}.lora_B.weight": draw(2, 6, 2)},
        r=2,
    )
    with pytest.raises(FitError, match="too large for F16; store it as bf16 or fp32") as caught:
        convert(source, "mlx", output=tmp_path / "b", dtype="fp16")
    assert caught.value.file == str(tmp_path / "b" / "adapters.safetensors")
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.lora_a"
    assert os.listdir(tmp_path) == ["a"]


def test_the_base_name_survives(tmp_path: Path) -> None:
    source = llama_lora(tmp_path / "a", base_model_name_or_path="org/model")
    convert(source, "mlx", output=tmp_path / "b")
    convert(tmp_path / "b", "peft", output=tmp_path / "c")
    assert config_of(tmp_path / "c")["base_model_name_or_path"] == "org/model"
    with safe_open(tmp_path / "c/adapter_model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
