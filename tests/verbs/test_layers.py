# SPDX-License-Identifier: Apache-2.0
"""A model with other layers is what transformers makes of the same modules in memory, to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.verbs.layers import rebuild

SMALL: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: Mapping[str, Any] = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": 101}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}, "model.layers"),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", {"max_window_layers": 4}, "model.layers"),
    "qwen2 windows": (
        "Qwen2ForCausalLM",
        {"max_window_layers": 3, "use_sliding_window": True, "sliding_window": 4},
        "model.layers",
    ),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "smollm3": ("SmolLM3ForCausalLM", {}, "model.layers"),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 4}, "model.layers"),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}, "model.layers"),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
        },
        "model.layers",
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, "transformer.h"),
    "bert": ("BertForMaskedLM", {}, "bert.encoder.layer"),
}
ORDERS: Mapping[str, tuple[Mapping[str, str], tuple[int, ...]]] = {
    "keep": ({"keep": "0-1,4-5"}, (0, 1, 4, 5)),
    "drop": ({"drop": "2"}, (0, 1, 3, 4, 5)),
    "repeat": ({"repeat": "1-2x3"}, (0, 1, 2, 1, 2, 1, 2, 3, 4, 5)),
    "any order": ({"keep": "5,0,3-,0"}, (5, 0, 3, 4, 5, 0)),
}
IDS = torch.tensor([[1, 17, 44, 3, 90, 5, 61, 8, 22, 100, 7, 33]])


def make(family: str, folder: Path, **more: Any) -> Path:
    """A tiny model of a family, with values that differ everywhere."""
    name, fields, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**({} if "n_layer" in fields else dict(SMALL)) | dict(fields))
    torch.manual_seed(3)
    model = cls(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    model.tie_weights()
    model.save_pretrained(folder, **more)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS, **({"use_cache": False} if "Bert" not in type(model).__name__ else {}))
    return found.logits


def in_memory(folder: Path, path: str, order: Sequence[int]) -> torch.Tensor:
    """The logits of the model with its modules put in this order: each runs as the layer that it was."""
    model = load(folder)
    parent = model.get_submodule(path.rpartition(".")[0])
    stack = parent.get_submodule(path.rpartition(".")[2])
    types = getattr(model.config, "layer_types", None)
    setattr(parent, path.rpartition(".")[2], nn.ModuleList([copy.deepcopy(stack[old]) for old in order]))
    model.config.num_hidden_layers = len(order)
    if types is not None:
        model.config.layer_types = [types[old] for old in order]
    return logits(model)


def load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, told = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    assert not told["mismatched_keys"], told
    return model


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_its_modules_do_in_this_order(family: str, how: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    options, order = ORDERS[how]
    result = surgery.layers(base, output=tmp_path / "out", **options)
    model = load(tmp_path / "out")
    assert model.config.num_hidden_layers == len(order)
    assert torch.equal(logits(model), in_memory(base, FAMILIES[family][2], order))
    assert set(result.ledger.classes) <= {"copied", "dropped"}
    surgery.verify(tmp_path / "out", against=base)


PATTERNS = ("gemma2", "gemma3", "gpt_oss", "qwen2 windows", "smollm3")


def edit(folder: Path, change: Any) -> None:
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", PATTERNS)
def test_a_pattern_that_no_longer_holds_is_written_out(family: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    edit(base, lambda config: [config.pop(key, None) for key in ("layer_types", "no_rope_layers")])
    result = surgery.layers(base, output=tmp_path / "out", keep="5,0,3-4,1")
    assert torch.equal(logits(load(tmp_path / "out")), in_memory(base, FAMILIES[family][2], (5, 0, 3, 4, 1)))
    assert "would run this model wrongly" in " ".join(result.warnings)


def test_a_pattern_that_still_holds_is_left_to_the_family(tmp_path: Path):
    base = make("gemma2", tmp_path / "base")
    edit(base, lambda config: config.pop("layer_types"))
    result = surgery.layers(base, output=tmp_path / "out", keep="0-1,4-5")
    assert "layer_types" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not result.warnings


def test_layers_without_experts_stay_without(tmp_path: Path):
    base = make("qwen2_moe", tmp_path / "base")
    surgery.layers(base, output=tmp_path / "out", keep="1-3,5")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1])
    assert torch.equal(logits(load(tmp_path / "out")), in_memory(base, "model.layers", (1, 2, 3, 5)))


def test_the_first_layers_are_dense_in_deepseek(tmp_path: Path):
    fields = {**SMALL, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    fields |= {"topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
    fields |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    fields.pop("head_dim")
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))
    model.save_pretrained(tmp_path / "base")
    surgery.layers(tmp_path / "base", output=tmp_path / "out", keep="1-4")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["first_k_dense_replace"] == 1
    assert torch.equal(logits(load(tmp_path / "out")), in_memory(tmp_path / "base", "model.layers", (1, 2, 3, 4)))
    with pytest.raises(surgery.FitError, match="without experts would stand behind"):
        surgery.layers(tmp_path / "base", output=tmp_path / "other", keep="3,0-1")


def test_layers_that_differ_by_no_known_rule_are_refused(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(surgery.FitError, match="layers 0 and 2 consist of different tensors"):
        surgery.layers(base, output=tmp_path / "out", keep="0-3")


@pytest.mark.parametrize(
    ("family", "change", "error"),
    [
        ("llama", {"attn_layer_period": 4}, "every 4. layer is of another kind"),
        ("llama", {"num_kv_shared_layers": 2}, "ties layers to their places"),
        ("llama", {"odd_things": [1, 2, 3, 4, 5, 6]}, "whether there is one for each layer is not known"),
        ("llama", {"layer_types": ["full_attention"]}, "has 1 layer_types for 6 layers"),
        ("llama", {"model_type": "kimi_linear"}, "layers of 'kimi_linear' are of several types"),
        ("llama", {"num_hidden_layers": 7}, "config.json says 7 layers, and the weights have 6 at 'model.layers.'"),
        ("llama", {"is_encoder_decoder": True}, "two stacks of layers"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "no layer can move"),
    ],
)
def test_a_configuration_that_could_not_be_true_is_refused(family: str, change: Any, error: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    edit(base, lambda config: config.update(change))
    with pytest.raises(surgery.FitError, match=error):
        surgery.layers(base, output=tmp_path / "out", keep="5,1-2")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep": "0-6"}, "there is no layer 6"),
        ({"keep": "3-1"}, "ends before it begins"),
        ({"keep": "first"}, "is no range of layers"),
        ({"keep": "0-5"}, "these are all 6 layers"),
        ({"keep": "0-1x9999"}, "is no range of layers"),
        ({"keep": "0-5x999"}, "are more than 4096"),
        ({"drop": "0-5"}, "no layer would be left"),
        ({"drop": "1x2"}, "a layer is dropped once"),
        ({"repeat": "1-2,2-3"}, "names a layer in two ranges"),
        ({"repeat": "1-2x1"}, "repeats nothing"),
        ({}, "nothing was asked for"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: Mapping[str, str], error: str, tmp_path: Path):
    base = make("llama", tmp_path / "base")
    with pytest.raises(surgery.FitError, match=error):
        surgery.layers(base, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_lose_their_layers_and_are_numbered_anew(tmp_path: Path):
    base = make("llama", tmp_path / "base", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 4
    surgery.layers(base, output=tmp_path / "out", keep="0,5")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    assert torch.equal(logits(load(tmp_path / "out")), in_memory(base, "model.layers", (0, 5)))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = sum(
        tensor.numel() * 4 for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert index["metadata"]["total_size"] == sizes


def test_a_pickle_becomes_safetensors_and_a_type_is_cast(tmp_path: Path):
    base = make("llama tied", tmp_path / "base")
    model = load(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    surgery.layers(base, output=tmp_path / "out", drop="1", dtype="bf16")
    made = load(tmp_path / "out")
    assert made.dtype == torch.bfloat16
    assert made.lm_head.weight.data_ptr() == made.model.embed_tokens.weight.data_ptr()
    del model.model.layers[1]
    for name, parameter in model.to(torch.bfloat16).named_parameters():
        assert torch.equal(parameter, made.get_parameter(name)), name


def test_the_same_command_gives_the_same_bytes_and_a_dry_run_none(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    copied = shutil.copytree(base, tmp_path / "other place")
    for number, folder in enumerate((base, copied)):
        surgery.layers(folder, output=tmp_path / f"out{number}", repeat="1-2", workers=number + 1)
    names = sorted(path.name for path in (tmp_path / "out0").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out1").iterdir())
    for name in names:
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes(), name
    planned = surgery.layers(base, output=tmp_path / "none", repeat="1-2", dry_run=True)
    assert not (tmp_path / "none").exists()
    assert planned.nbytes == surgery.layers(base, output=tmp_path / "again", repeat="1-2").nbytes


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
