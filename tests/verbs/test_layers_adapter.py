# SPDX-License-Identifier: Apache-2.0
"""An adapter goes along with the layers that it was trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.verbs.layers import rebuild
from tests.support.kit import ROOT
from tests.support.layered_models import BOTH, load, logits, make, tokenizer


def attached(base: Path, adapter: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    return logits(model)


def lora(base: Path, folder: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    model = peft.get_peft_model(load(base), peft.LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"layers_to_transform": [1, 2, 4]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.4.self_attn.q_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_is_moved_with_its_layers(config: Mapping[str, Any], tmp_path: Path):
    base = make("llama", tmp_path / "base")
    adapter = lora(base, tmp_path / "lora", **config)
    order = (0, 1, 1, 4)
    result = surgery.layers(
        base, output=tmp_path / "out", keep="0-1,1,4", adapter=adapter, adapter_output=tmp_path / "moved"
    )
    whole = peft.PeftModel.from_pretrained(load(base), adapter).base_model.model
    whole.model.layers = nn.ModuleList([copy.deepcopy(whole.model.layers[old]) for old in order])
    whole.config.num_hidden_layers = len(order)
    assert torch.equal(attached(tmp_path / "out", tmp_path / "moved"), logits(whole))
    assert result.adapter is not None
    assert all(".1." not in site and ".0." not in site and ".4." not in site for site in result.adapter.dropped)
    assert bool(result.adapter.copied)
    merged = surgery.merge(tmp_path / "out", tmp_path / "moved", output=tmp_path / "merged")
    assert torch.allclose(logits(load(merged.output)), logits(whole), atol=1e-4)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "OFT"])
def test_other_kinds_are_moved_too(kind: str, tmp_path: Path):
    base = make("llama", tmp_path / "base")
    settings: dict[str, Any] = {
        "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "LoHa": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1, 4]},
        "OFT": {"oft_block_size": 8, "r": 0, "target_modules": ["q_proj"]},
    }[kind]
    torch.manual_seed(1)
    model = peft.get_peft_model(load(base), getattr(peft, f"{kind}Config")(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter + torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    surgery.layers(
        base, output=tmp_path / "out", keep="1,0,4", adapter=tmp_path / "adapter", adapter_output=tmp_path / "moved"
    )
    whole = model.base_model.model
    whole.model.layers = nn.ModuleList([whole.model.layers[old] for old in (1, 0, 4)])
    whole.config.num_hidden_layers = 3
    assert torch.allclose(attached(tmp_path / "out", tmp_path / "moved"), logits(whole), atol=1e-6)


def test_an_adapter_that_changes_only_dropped_layers_is_refused(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    adapter = lora(base, tmp_path / "lora", layers_to_transform=[5])
    with pytest.raises(surgery.FitError, match="changes only layers that are left out"):
        surgery.layers(base, output=tmp_path / "out", drop="5", adapter=adapter, adapter_output=tmp_path / "moved")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_written_can_be_merged_into(tmp_path: Path):
    """Layers, then a merge, without a file between them: the bytes are those of the two commands."""
    base = make("llama", tmp_path / "base")
    adapter = lora(base, tmp_path / "lora")
    order = {"keep": "0-1,1,4"}
    surgery.layers(base, output=tmp_path / "out", **order, adapter=adapter, adapter_output=tmp_path / "moved")
    surgery.merge(tmp_path / "out", tmp_path / "moved", output=tmp_path / "two")
    unwritten = rebuild(surgery.open(base), **order).checkpoint
    surgery.merge(unwritten, tmp_path / "moved", output=tmp_path / "one")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_follows_its_projections(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    adapter = lora(
        base, tmp_path / "lora", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"]
    )
    surgery.layers(
        base, output=tmp_path / "out", fuse=BOTH, drop="1", adapter=adapter, adapter_output=tmp_path / "moved"
    )
    whole = peft.PeftModel.from_pretrained(load(base), adapter).base_model.model
    del whole.model.layers[1]
    whole.config.num_hidden_layers = 5
    assert torch.allclose(attached(tmp_path / "out", tmp_path / "moved"), logits(whole), atol=1e-4)


def test_virtual_tokens_belong_to_no_layer(tmp_path: Path):
    result = surgery.layers(
        "examples/base",
        output=tmp_path / "out",
        keep="0-1",
        adapter="examples/prompt",
        adapter_output=tmp_path / "moved",
    )
    before, after = (Path(one, "adapter_model.safetensors") for one in ("examples/prompt", tmp_path / "moved"))
    assert load_file(before)["prompt_embeddings"].equal(load_file(after)["prompt_embeddings"])
    assert "virtual tokens" in result.summary().as_text()


@pytest.mark.parametrize("given", [{"adapter": "examples/lora"}, {"adapter_output": "moved"}])
def test_an_adapter_without_a_place_is_refused(given: dict[str, str], tmp_path: Path):
    with pytest.raises(surgery.UsageError, match="given together") as caught:
        surgery.layers("examples/base", output=tmp_path / "out", keep="0-1", **given)
    assert caught.value.hint == f"give `{'adapter_output' if 'adapter' in given else 'adapter'}=` too"


ROWS: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [5, 20]}},
}


@pytest.mark.parametrize("what", ROWS)
def test_changes_of_rows_are_not_moved_to_others(what: str, tmp_path: Path):
    """PEFT cannot load them, and rows by id would be those of other tokens; rows that are only added leave ids as they are."""
    base = make("llama", tmp_path / "base")
    tokenizer("BPE", base, [(ROOT / "README.md").read_text()])
    surgery.layers(base, output=tmp_path / "wide", vocab="pad=900")
    adapter = lora(tmp_path / "wide", tmp_path / "lora", **ROWS[what])
    (tmp_path / "ids.json").write_text(json.dumps([*range(10), 500]))
    for name, vocab in (("cut", f"trim={tmp_path / 'ids.json'}"), ("padded", "pad=1000")):
        given = {"vocab": vocab, "adapter": adapter, "adapter_output": tmp_path / f"{name}-lora"}
        if (what, name) == ("rows", "padded"):
            surgery.layers(tmp_path / "wide", output=tmp_path / name, **given)
            before, after = attached(tmp_path / "wide", adapter), attached(tmp_path / name, tmp_path / "padded-lora")
            assert torch.equal(after[..., :900], before)
            continue
        with pytest.raises(surgery.FitError, match="whose rows are others now"):
            surgery.layers(tmp_path / "wide", output=tmp_path / name, **given)
        assert not (tmp_path / name).exists()
