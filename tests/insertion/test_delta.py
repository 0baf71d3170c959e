# SPDX-License-Identifier: Apache-2.0
"""`insert` puts what a fine-tune changed into the base to the byte, and names which part of the model that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from tests.support.kit import HIDDEN, make_base, make_lora
from tests.support.tiny_models import tiny

BIASES = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(HIDDEN) for layer in (0, 1)}
NORMS = {f"model.layers.{layer}.input_layernorm.weight": torch.ones(HIDDEN) for layer in (0, 1)}


def tuned_from(base: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], out: Path) -> Path:
    """A copy of `base` in which the tensors that `change` gives have other values."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(7)
    changed = {name: new for name, old in tensors.items() if (new := change(name, old.clone())) is not None}
    assert changed
    save_file(tensors | changed, out / "model.safetensors", {"format": "pt"})
    return out


def rows_of_embedding(name: str, old: torch.Tensor) -> torch.Tensor | None:
    if name != "model.embed_tokens.weight":
        return None
    old[[3, 5]] = torch.randn(2, HIDDEN).to(old.dtype)
    return old


def where(word: str) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    return lambda name, old: old + torch.randn_like(old) if word in name else None


def layer_1(name: str, old: torch.Tensor) -> torch.Tensor | None:
    return old + torch.randn_like(old) if ".layers.1." in name and old.ndim == 2 else None


CASES = {
    "layers": (layer_1, "only layer 1 of 2 changed"),
    "biases": (where(".bias"), "only biases changed (BitFit)"),
    "norms": (where("norm"), "only norms changed"),
    "rows": (rows_of_embedding, "only 2 of 64 rows of model.embed_tokens.weight changed"),
}


@pytest.mark.parametrize("tuned", CASES)
def test_a_delta_gives_the_fine_tune_to_the_byte_and_its_share_is_told(tuned: str, tmp_path: Path):
    change, said = CASES[tuned]
    base = make_base(tmp_path / "base", **BIASES, **NORMS)
    fine = tuned_from(base, change, tmp_path / "fine")
    found = surgery.extract_lora(base, fine, output=tmp_path / "delta", matrices="full")
    result = surgery.insert(base, tmp_path / "delta", output=tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (fine / "model.safetensors").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, fine))
    total = sum(tensor.numel() for tensor in before.values())
    trained = sum(new.numel() for name, new in after.items() if not torch.equal(new, before[name]))
    trained = 2 * HIDDEN if tuned == "rows" else trained
    assert result.tuned.tuned == tuned
    assert result.share == pytest.approx(trained / total)
    compared = surgery.diff(base, fine)
    assert found.tuned == compared.tuned == result.tuned
    for shown in (result, found, compared):
        assert f"{said}: {trained / total:.2%} of the parameters" in str(shown)
        assert shown.as_json()["tuned"]["share"] == pytest.approx(trained / total, rel=1e-5)
    assert json.loads(json.dumps(result.as_json()))["tuned"]["numbers"] == trained


def test_a_change_of_all_layers_has_no_name(tmp_path: Path):
    base = make_base(tmp_path / "base")
    fine = tuned_from(base, where("q_proj"), tmp_path / "fine")
    assert surgery.extract_lora(base, fine, dry_run=True).tuned is None
    assert surgery.diff(base, fine).tuned is None
    found = surgery.extract_lora(base, fine, output=tmp_path / "delta", matrices="full")
    assert not any(row.rank for row in found.rows)
    surgery.insert(base, tmp_path / "delta", output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (fine / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "gpt_oss", "phi3", "vit", "whisper"])
def test_a_fine_tune_of_everything_comes_back_to_the_byte(model_type: str, tmp_path: Path):
    tiny(model_type).save_pretrained(tmp_path / "base")
    fine = tuned_from(
        tmp_path / "base",
        lambda _, old: old + torch.randn_like(old) if old.is_floating_point() else None,
        tmp_path / "fine",
    )
    surgery.extract_lora(tmp_path / "base", fine, output=tmp_path / "delta", matrices="full")
    surgery.insert(tmp_path / "base", tmp_path / "delta", output=tmp_path / "out")
    back, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", fine))
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())


def test_experts_in_parts_have_no_copy(tmp_path: Path):
    tiny("mixtral").save_pretrained(tmp_path / "base")
    fine = tuned_from(tmp_path / "base", where("experts.0.w1"), tmp_path / "fine")
    with pytest.raises(surgery.FitError, match="is made of several tensors: no copy of a module holds them"):
        surgery.extract_lora(tmp_path / "base", fine, output=tmp_path / "delta", matrices="full")


def test_what_is_computed_is_left_to_merge(tmp_path: Path):
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    with pytest.raises(surgery.FitError, match="has a LoRA, which is computed") as caught:
        surgery.insert(base, lora, output=tmp_path / "out")
    assert "surgery merge" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_numbers_that_would_be_rounded_are_refused(tmp_path: Path):
    wide = make_base(tmp_path / "wide", torch.float32, **BIASES)
    fine = tuned_from(wide, where(".bias"), tmp_path / "fine")
    surgery.extract_lora(wide, fine, output=tmp_path / "delta")
    weights = tmp_path / "delta" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})  # without the record of its base
    narrow = make_base(tmp_path / "narrow", torch.bfloat16, **BIASES)
    with pytest.raises(surgery.FitError, match="it would be rounded"):
        surgery.insert(narrow, tmp_path / "delta", output=tmp_path / "out")


def test_nothing_named_is_a_usage_error(tmp_path: Path):
    with pytest.raises(surgery.UsageError):
        surgery.insert(make_base(tmp_path / "base"), output=tmp_path / "out")
