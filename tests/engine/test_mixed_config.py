# SPDX-License-Identifier: Apache-2.0
"""A model of which only touched weights are dequantised says which these are, in the words of its readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from transformers.quantizers.quantizers_utils import should_convert_module

import surgery
from surgery.engine.quantised.mixed_config import leave_alone, torn_apart
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.verbs.test_bitsandbytes_base import LORA, quantised

PLAIN = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
QUANTISED = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("k_proj", "o_proj")]


@pytest.mark.parametrize(
    ("config", "key", "found"),
    [
        ({"quant_method": "bitsandbytes"}, "llm_int8_skip_modules", ["lm_head", *PLAIN]),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["x"]}, "llm_int8_skip_modules", ["x", *PLAIN]),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head"]}, "ignore", ["lm_head", *PLAIN]),
        ({"quant_method": "fp8", "modules_to_not_convert": None}, "modules_to_not_convert", ["lm_head", *PLAIN]),
        ({"quant_method": "awq"}, "modules_to_not_convert", PLAIN),
    ],
)
def test_a_list_of_the_method_names_what_is_left_alone(config: dict[str, Any], key: str, found: list[str]) -> None:
    leave_alone(config, PLAIN, QUANTISED, "lm_head")
    assert config[key] == found
    assert not any(should_convert_module(name, config[key]) for name in PLAIN)
    assert all(should_convert_module(name, config[key]) for name in [*QUANTISED, "model.layers.10.self_attn.q_proj"])


def test_gptq_has_patterns_and_names_that_hold_for_every_block() -> None:
    config: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
    leave_alone(config, PLAIN, QUANTISED, "lm_head")
    assert config["dynamic"] == {rf"-:^model\.layers\.{i}\.self_attn\.q_proj$": {} for i in (0, 1)}
    assert config["modules_in_block_to_quantize"] == [["self_attn.k_proj"], ["self_attn.o_proj"]]
    uneven: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
    leave_alone(uneven, PLAIN[:1], [*QUANTISED, PLAIN[1]], "lm_head")
    assert "modules_in_block_to_quantize" not in uneven


def test_mlx_has_false_for_a_module() -> None:
    config: dict[str, Any] = {"group_size": 64, "bits": 4}
    leave_alone(config, PLAIN, QUANTISED, "")
    assert config == {"group_size": 64, "bits": 4, **dict.fromkeys(PLAIN, False)}


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(FitError, match=r"'mine'.* is not known"):
        leave_alone({"quant_method": "mine"}, PLAIN, QUANTISED, "")


def test_modules_that_servers_join_are_named_where_only_some_are_quantised() -> None:
    assert torn_apart(PLAIN, QUANTISED) == tuple(PLAIN)
    assert torn_apart([*PLAIN, QUANTISED[0]], QUANTISED[1:2]) == ()


def only(folder: Path, module: str) -> Path:
    """The shipped LoRA for one kind of module."""
    folder.mkdir()
    factors = load_file(LORA / "adapter_model.safetensors")
    save_file({key: factor for key, factor in factors.items() if module in key}, folder / "adapter_model.safetensors")
    config = json.loads((LORA / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [module]}))
    return folder


def test_only_touched_weights_are_dequantised_and_the_rest_is_copied(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4")
    lora = only(tmp_path / "lora", "o_proj")
    result = surgery.merge(base, lora, output=tmp_path / "out", only_touched=True)
    before, after = open_checkpoint(base).main, open_checkpoint(tmp_path / "out").main
    touched = [name for name in before.parameters if "o_proj" in name]
    for name, parameter in after.parameters.items():
        assert (parameter.storage.kind == "BF16") == (name in touched or before.parameters[name].storage.kind == "BF16")
        if name not in touched:
            assert [t.read().tobytes() for t in parameter.sources] == [
                t.read().tobytes() for t in before.parameters[name].sources
            ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", *(name.removesuffix(".weight") for name in touched)]
    assert "6 weights from NF4 to BF16" in str(result)
    assert "36 weights stay NF4" in str(result)
    plain = surgery.merge(base, lora, output=tmp_path / "plain")
    assert result.nbytes < 0.6 * plain.nbytes
