# SPDX-License-Identifier: Apache-2.0
"""A model with other layers is what transformers makes of the same modules in memory, to the bit."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors, trainers
from torch import nn

import surgery
from surgery.verbs.layers import rebuild
from tests.support.kit import ROOT
from tests.support.quantised_folders import FORMATS, quantise_folder

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
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 4}, "model.layers"),
    "phi3 without a window": ("Phi3ForCausalLM", {"sliding_window": None}, "model.layers"),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}, "model.layers"),
    "qwen3 tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, "model.layers"),
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
        ({}, "nothing to change was named"),
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
    copied = shutil.copytree(base, tmp_path / "other place" / "base")
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


BOTH = ("qkv", "gate-up")


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


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "bert", "gemma2", "qwen2"])
def test_a_vocabulary_is_padded_with_the_mean(family: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    surgery.layers(base, output=tmp_path / "out", vocab="pad=64")
    model, before = load(tmp_path / "out"), load(base)
    assert model.config.vocab_size == 128
    old, new = logits(before), logits(model)
    assert torch.equal(new[..., :101], old)
    if family != "gemma2":  # whose logits are capped behind the mean
        assert torch.allclose(new[..., 101:], old.mean(-1, keepdim=True).expand(-1, -1, 27), atol=1e-5)
    assert torch.equal(new.argmax(-1), old.argmax(-1))
    assert torch.equal(model.get_input_embeddings().weight[:101], before.get_input_embeddings().weight)
    with pytest.raises(surgery.NothingChangedError, match="has these 128 rows already"):
        surgery.layers(tmp_path / "out", output=tmp_path / "more", vocab="pad=64")


def tokenizer(kind: str, folder: Path, text: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A trained tokenizer of a kind, of at most 300 tokens."""
    make_model, make_trainer, pre = {
        "BPE": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "WordPiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, pre_tokenizers.Whitespace()),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
    }[kind]
    made = tokenizers.Tokenizer(make_model)
    made.pre_tokenizer = pre
    extra = {"unk_token": "<unk>"} if kind == "Unigram" else {}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "BPE" else []
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        text, make_trainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, **extra)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_a_vocabulary_is_cut_to_the_tokens_that_are_used(kind: str, tmp_path: Path):
    text = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))[:8]]
    fields = {**SMALL, "vocab_size": 640, "eos_token_id": 2, "pad_token_id": None}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    base = tmp_path / "base"
    model.save_pretrained(base)
    before = tokenizer(kind, base, text)
    lines = [line for page in text[:2] for line in page.splitlines()[:40] if line.strip()]
    used = sorted({number for line in lines for number in before(line).input_ids})
    (tmp_path / "used.json").write_text(json.dumps(used))
    result = surgery.layers(base, output=tmp_path / "out", vocab=f"trim={tmp_path / 'used.json'}")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    made = load(tmp_path / "out")
    rows = result.facts["vocabulary"]["after"]
    assert rows == len(after) == made.config.vocab_size < len(before)
    for line in lines:
        old, new = before(line).input_ids, after(line).input_ids
        assert before.convert_ids_to_tokens(old) == after.convert_ids_to_tokens(new)
        kept = torch.tensor(before.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(rows)))))
    with torch.no_grad():
        one = model(torch.tensor([before(lines[3]).input_ids])).logits
        two = made(torch.tensor([after(lines[3]).input_ids])).logits
    assert torch.equal(one[..., kept], two)
    assert made.generation_config.eos_token_id == after.eos_token_id == made.config.eos_token_id
    assert kind == "Unigram" or after.decode(after("ÿ new wörds").input_ids) is not None


def test_a_vocabulary_is_cut_to_the_tokenizers_size(tmp_path: Path):
    base = tmp_path / "base"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 704, "pad_token_id": None})
    )
    model.save_pretrained(base)
    size = len(tokenizer("BPE", base, [(ROOT / "README.md").read_text()]))
    surgery.layers(base, output=tmp_path / "out", vocab="trim")
    made = load(tmp_path / "out")
    assert made.config.vocab_size == size < 704
    assert torch.equal(logits(made), logits(model)[..., :size])
    with pytest.raises(surgery.NothingChangedError):
        surgery.layers(tmp_path / "out", output=tmp_path / "again", vocab="trim")


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_token_that_a_configuration_names_keeps_its_row(where: str, tmp_path: Path):
    """A model whose padding lies behind its rows does not load."""
    base = make("llama", tmp_path / "base")
    size = len(tokenizer("BPE", base, [(ROOT / "README.md").read_text()]))
    surgery.layers(base, output=tmp_path / "wide", vocab=f"pad={size + 50}")
    told = json.loads((tmp_path / "wide" / where).read_text()) | {"pad_token_id": size}
    (tmp_path / "wide" / where).write_text(json.dumps(told))
    with pytest.raises(surgery.FitError, match=f"{where} names the token {size}, and the tokenizer has {size}"):
        surgery.layers(tmp_path / "wide", output=tmp_path / "out", vocab="trim")


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


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"vocab": "pad=0"}, surgery.UsageError, "is no change of a vocabulary"),
        ({"vocab": "trim="}, surgery.UsageError, "is no change of a vocabulary"),
        ({"vocab": "trim"}, surgery.FitError, "has no tokenizer.json"),
        ({"vocab": "trim=nowhere"}, surgery.NotFoundError, "nowhere"),
        ({"split": "qkv", "fuse": "qkv"}, surgery.UsageError, "split and fuse are given together"),
        ({"keep": "1", "drop": "2"}, surgery.UsageError, "keep and drop say the same"),
        ({"fuse": "everything"}, surgery.FitError, "no projection 'everything'"),
    ],
)
def test_changes_that_mean_nothing_are_refused(options: Any, error: type[Exception], text: str, tmp_path: Path):
    base = make("llama", tmp_path / "base")
    with pytest.raises(error, match=text):
        surgery.layers(base, output=tmp_path / "out", **options)


def test_what_has_no_folder_of_its_own_is_refused(tmp_path: Path):
    with pytest.raises(surgery.FitError, match="an adapter where a full model was expected"):
        surgery.layers(ROOT / "examples" / "lora", output=tmp_path / "out", keep="0")
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    save_file({"a.0.weight": torch.ones(2, 2)}, tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text(
        '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(surgery.FitError, match="a pipeline of several models"):
        surgery.layers(tmp_path / "pipe", output=tmp_path / "out", keep="0")


def test_a_quantised_models_configuration_names_the_new_layers(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    named = ["model.layers.1.mlp.up_proj", "lm_head", "re:.*norm"]
    edit(base, lambda config: config.update(quantization_config={"quant_method": "x", "modules_to_not_convert": named}))
    surgery.layers(base, output=tmp_path / "out", keep="1,0,1")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert said == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "lm_head", "re:.*norm"]
    edit(base, lambda config: config["quantization_config"].update(meta={"quantizer": ["some:4.2.0+cu12"]}))
    surgery.layers(base, output=tmp_path / "versions", keep="1,0")
    for pattern in ("re:.*layers\\.[0-3]\\..*", "+:.*\\.2\\..*gate.*", "model.layers.1*", r"re:.*\.3\.mlp\.up_proj"):
        edit(base, lambda config, one=pattern: config["quantization_config"].update(dynamic={one: {"bits": 8}}))
        with pytest.raises(surgery.FitError, match="names layers in a way that is not understood"):
            surgery.layers(base, output=tmp_path / "other", keep="1,0")


def test_a_quantisers_own_file_names_the_new_layers(tmp_path: Path):
    """TensorRT-LLM and vLLM read it, and not config.json."""
    base = make("llama", tmp_path / "base")
    told = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.4.mlp.up_proj"]}}
    (base / "hf_quant_config.json").write_text(json.dumps(told))
    surgery.layers(base, output=tmp_path / "out", keep="0,4-5")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert said == ["lm_head", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_codes_are_copied(format_name: str, tmp_path: Path):
    base = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", format_name)
    surgery.layers(base, output=tmp_path / "out", keep="1,0,1")
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "out"))
    places = {"0": "1", "1": "0", "2": "1"}
    origins = {name: re.sub(r"layers\.(\d+)", lambda found: f"layers.{places[found[1]]}", name) for name in after}
    assert set(origins.values()) == {name for name in before if not re.search(r"layers\.[2-9]", name)}
    for name, origin in origins.items():
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), before[origin].reshape(-1).view(torch.uint8))
    with pytest.raises(surgery.FitError, match="codes are copied"):
        surgery.layers(base, output=tmp_path / "cast", keep="1,0", dtype="fp32")


def test_of_text_and_images_the_text_model_loses_layers(tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    stacks = ("language_model.model.layers", "vision_tower.encoder.layers")
    save_file(
        {f"{stack}.{i}.mlp.weight": torch.full((2, 2), i) for stack in stacks for i in range(3)},
        base / "model.safetensors",
    )
    config = {"model_type": "gemma3", "vision_config": {"num_hidden_layers": 3}}
    config |= {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 2}}
    (base / "config.json").write_text(json.dumps(config))
    surgery.layers(base, output=tmp_path / "out", keep="1-2")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {f"{stacks[0]}.{i}.mlp.weight": i + 1 for i in range(2)} | {
        f"{stacks[1]}.{i}.mlp.weight": i for i in range(3)
    }
    assert {name: int(tensor[0, 0]) for name, tensor in tensors.items()} == kept
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["vision_config"] == {"num_hidden_layers": 3}
    assert said["text_config"]["num_hidden_layers"] == 2
    assert said["text_config"]["layer_types"] == ["full_attention", "sliding_attention"]


def test_a_file_that_carries_its_configuration_is_refused(tmp_path: Path):
    """GGUF: its header says how many layers there are."""
    file = ROOT / "tests" / "containers" / "golden" / "smollm3.gguf"
    with pytest.raises(surgery.FitError, match="its configuration lies in the weight file"):
        surgery.layers(file, output=tmp_path / "out", keep="0")
