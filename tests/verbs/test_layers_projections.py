# SPDX-License-Identifier: Apache-2.0
"""Projections that are fused or split compute the same, in the class that has them so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.support.layered_models import BOTH, load, logits, make


@pytest.mark.parametrize(
    ("family", "becomes"),
    [("phi3", "MistralForCausalLM"), ("phi3 without a window", "LlamaForCausalLM")],
)
def test_phi3_in_parts_is_a_llama_and_fused_again_the_same_bytes(family: str, becomes: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    parted = surgery.layers(base, output=tmp_path / "parts", split=BOTH)
    model = load(tmp_path / "parts")
    assert type(model).__name__ == becomes
    assert torch.equal(
        model.model.layers[2].mlp.up_proj.weight, load(base).model.layers[2].mlp.gate_up_proj.weight[48:]
    )
    # Three products in place of one: the sums may be taken in another order.
    assert torch.allclose(logits(model), logits(load(base)), atol=1e-5)
    assert not parted.warnings
    fused = surgery.layers(tmp_path / "parts", output=tmp_path / "fused", fuse=BOTH)
    assert torch.equal(logits(load(tmp_path / "fused")), logits(load(base)))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "fused"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for result in (parted, fused):
        assert "cast" not in result.ledger.classes
        assert result.ledger.classes["moved"] in (12, 30)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_fused_projections_make_a_phi3(family: str, tmp_path: Path):
    base = make(family, tmp_path / "base", max_shard_size="30KB")  # parts in several files
    surgery.layers(base, output=tmp_path / "out", fuse=BOTH)
    model = load(tmp_path / "out")
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert torch.allclose(logits(model), logits(load(base)), atol=1e-5)


def test_projections_without_a_class_are_told(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    result = surgery.layers(base, output=tmp_path / "out", fuse="gate-up", drop="1")
    assert "no class of transformers is known" in result.warnings[0]
    made, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    rows = [own[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(made["model.layers.1.mlp.gate_up_proj.weight"], torch.cat(rows))
    with pytest.raises(surgery.FitError, match=r"has no self_attn\.qkv_proj"):
        surgery.layers(base, output=tmp_path / "other", split="qkv")
