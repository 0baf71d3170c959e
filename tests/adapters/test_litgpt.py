# SPDX-License-Identifier: Apache-2.0
"""litgpt's folders: what its own classes saved merges to what its merge made, and what we write has its names and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from surgery import convert
from surgery_formats.adapters.litgpt import LITGPT
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, MalformedError, NotFoundError, SurgeryError
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

HERE = GOLDEN / "litgpt"
BASE = HERE / "base"
CASES = ("default", "all")
QKV = "transformer.h.0.attn.qkv"


def write(folder: Path, tensors: dict[str, tuple[int, ...]], *, model: bool = True, **settings_: Any) -> Path:
    folder.mkdir()
    values = {name: torch.from_numpy(draw(number, *sizes)) for number, (name, sizes) in enumerate(tensors.items())}
    torch.save({"model": values}, folder / "lit_model.pth.lora")
    if model:
        shutil.copy(HERE / "all/model_config.yaml", folder)
    if settings_:
        lines = (f"{key}: {json.dumps(value)}\n" for key, value in settings_.items())
        (folder / "hyperparameters.yaml").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_merges_to_what_litgpt_makes_of_it(name: str, tmp_path: Path) -> None:
    assert LITGPT.detect(HERE / name)
    assert LITGPT.detect(HERE / name / "lit_model.pth.lora")
    assert read_adapter(HERE / name).unconsumed() == ()
    assert_expected(BASE, merged(BASE, HERE / name, tmp_path / "out"), HERE / name / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_to_peft_and_back_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    there = convert(HERE / name, "peft", output=tmp_path / "peft")
    back = convert(tmp_path / "peft", "litgpt", output=tmp_path / "back", base=BASE)
    assert max(there.max_error, back.max_error) <= 1e-6
    assert_expected(BASE, merged(BASE, tmp_path / "peft", tmp_path / "out"), HERE / name / "expected.safetensors")
    ours, theirs = (
        torch.load(f / "lit_model.pth.lora", weights_only=True)["model"] for f in (tmp_path / "back", HERE / name)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    mine, known = read_adapter(tmp_path / "back").config, read_adapter(HERE / name).config
    switches = [key for key in known if key.startswith("lora_")]
    sizes = ["n_layer", "n_head", "n_query_groups", "n_embd", "head_size", "intermediate_size", "padded_vocab_size"]
    assert {key: mine[key] for key in (*switches, *sizes)} == {key: known[key] for key in (*switches, *sizes)}


def test_without_hyperparameters_it_needs_an_alpha(tmp_path: Path) -> None:
    tensors = {"lm_head.lora_A": (2, 32), "lm_head.lora_B": (24, 2)}
    folder = write(tmp_path / "a", tensors)
    with pytest.raises(FitError, match="the scale of its LoRAs is not in its file"):
        read_adapter(folder)
    assert next(iter(read_adapter(folder, alpha=6.0).updates.values()))[0].scale == 3.0
    folder = write(tmp_path / "b", tensors, lora_alpha=4, lora_r=2)
    with pytest.raises(FitError, match=r"hyperparameters\.yaml says 4"):
        read_adapter(folder, alpha=6.0)


@pytest.mark.parametrize(
    ("tensors", "model", "settings_", "error", "said"),
    [
        ({"lm_head.lora_A": (2, 32)}, True, {}, MalformedError, "without its 'lora_B'"),
        ({"lm_head.weight": (2, 32)}, True, {}, MalformedError, "neither lora_A nor lora_B"),
        ({"lm_head.lora_A": (2, 32), "lm_head.lora_B": (24, 3)}, True, {}, FitError, "its lora_B"),
        ({"lm_head.lora_A": (2, 32), "lm_head.lora_B": (24, 2)}, True, {"lora_r": 3}, FitError, "has rank 2"),
        ({f"{QKV}.lora_A": (4, 32), f"{QKV}.lora_B": (48, 2)}, False, {}, FitError, "no model_config.yaml"),
        (
            {f"{QKV}.lora_A": (4, 32), f"{QKV}.lora_B": (48, 2)},
            True,
            {"lora_query": True, "lora_key": True, "lora_value": True},
            FitError,
            "not the parts q_proj, k_proj, v_proj",
        ),
        ({f"{QKV}.lora_A": (4, 32), f"{QKV}.lora_B": (48, 2)}, True, {}, FitError, "not the parts q, k and v"),
        (
            {"transformer.h.0.mlp.fc.lora_A": (2, 32), "transformer.h.0.mlp.fc.lora_B": (48, 2)},
            True,
            {},
            FitError,
            "no module of a model with Llama's names",
        ),
        (
            {"transformer.h.0.attn.attn.lora_A": (6, 32), "transformer.h.0.attn.attn.lora_B": (64, 2)},
            True,
            {},
            FitError,
            "before litgpt 0.5",
        ),
    ],
)
def test_what_is_refused(
    tensors: dict, model: bool, settings_: dict, error: type[SurgeryError], said: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "a", tensors, model=model, **{"lora_alpha": 4, **settings_})
    with pytest.raises(error, match=said):
        LITGPT.read(folder)


def test_what_it_writes_and_what_it_drops(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0"
    tensors = {
        f"{prefix}.self_attn.k_proj.lora_A.weight": draw(1, 2, 32),
        f"{prefix}.self_attn.k_proj.lora_B.weight": draw(2, 16, 2),
        f"{prefix}.mlp.up_proj.lora_A.weight": draw(3, 3, 32),
        f"{prefix}.mlp.up_proj.lora_B.weight": draw(4, 48, 3),
    }
    folder = write_peft(tmp_path / "peft", tensors, r=3, lora_alpha=6, rank_pattern={"k_proj": 2})
    result = convert(folder, "litgpt", output=tmp_path / "lit", base=BASE)
    assert result.max_error <= 1e-6
    mine, theirs = merged(BASE, tmp_path / "lit", tmp_path / "a"), merged(BASE, folder, tmp_path / "b")
    assert all(np.allclose(mine[name], theirs[name], rtol=0, atol=1e-5) for name in theirs)
    with pytest.raises(FitError, match="have the sizes of the base"):
        convert(folder, "litgpt", output=tmp_path / "x")
    with pytest.raises(FitError, match="is no Llama or Mistral"):
        convert(GOLDEN / "gguf/qwen2/lora/peft", "litgpt", output=tmp_path / "x", base=GOLDEN / "gguf/qwen2/base")
    with pytest.raises(NotFoundError, match=r"no lit_model\.pth\.lora"):
        LITGPT.read(tmp_path / "peft")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(0.125, 64, width=32), st.integers(0, 2**16))
def test_any_lora_survives_the_way_there_and_back(rank: int, alpha: float, seed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tensors = {}
        for layer in range(2):
            prefix = f"base_model.model.model.layers.{layer}.self_attn"
            for module, out in (("q_proj", 32), ("v_proj", 16)):
                tensors[f"{prefix}.{module}.lora_A.weight"] = draw(seed, rank, 32)
                tensors[f"{prefix}.{module}.lora_B.weight"] = draw(seed + 1, out, rank)
        write_peft(folder / "peft", tensors, r=rank, lora_alpha=alpha)
        convert(folder / "peft", "litgpt", output=folder / "lit", base=BASE)
        convert(folder / "lit", "peft", output=folder / "back")
        back = load_file(folder / "back/adapter_model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
