# SPDX-License-Identifier: Apache-2.0
"""The configuration of a model with other layers: what it says of each layer stays true, or the change is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from tests.support.layered_models import FAMILIES, SMALL, in_memory, load, logits, make

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
