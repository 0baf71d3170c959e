# SPDX-License-Identifier: Apache-2.0
"""A configuration that names another method than the weights' own is refused, naming both; without a name, tensors tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery_formats.errors import MalformedError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import make_base, make_lora
from tests.support.quantised_folders import FORMATS, KINDS, quantise_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}


def model(folder: Path, format_name: str, said: dict[str, Any] | None) -> Path:
    """`make_base` in a format, and what its config.json says of it."""
    made = quantise_folder(make_base(folder / "plain"), folder / "model", format_name)
    config = json.loads((made / "config.json").read_text())
    config.pop("quantization_config", None)
    (made / "config.json").write_text(json.dumps(config if said is None else {**config, "quantization_config": said}))
    return made


@pytest.mark.parametrize(
    ("format_name", "said", "words"),
    [
        ("nf4", GPTQ, r"is stored as NF4 \(bitsandbytes\), where the configuration says gptq, 4 bits, groups of 32"),
        ("nf4", FP8, r"is stored as NF4 \(bitsandbytes\), where the configuration says fp8"),
        ("nf4", INT8, r"is stored as NF4 \(bitsandbytes\), where the configuration says bitsandbytes, load_in_8bit"),
        ("nf4", {"load_in_8bit": True}, r"is stored as NF4 .*, load_in_8bit"),
        ("int8", NF4, r"is stored as INT8 \(bitsandbytes\), where the configuration says bitsandbytes, load_in_4bit"),
        ("fp8", NF4, r"is stored as FP8 32x32 \(fp8\), where the configuration says bitsandbytes"),
        ("fp8", {"quant_method": "AWQ"}, r"is stored as FP8 .*, where the configuration says AWQ"),
    ],
)
def test_another_method_is_refused_naming_both(
    format_name: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made = model(tmp_path, format_name, said)
    with pytest.raises(MalformedError, match=words) as refused:
        surgery.merge(made, make_lora(tmp_path / "lora"), output=tmp_path / "out", quantized="requantize")
    assert refused.value.tensor
    assert not (tmp_path / "out").exists()
    (warning,) = surgery.inspect(made).warnings
    assert "where the configuration says" in warning


@pytest.mark.parametrize(
    ("format_name", "said"),
    [
        *((name, said) for name, (_, said) in FORMATS.items()),
        *((name, said) for name in ("nf4", "int8", "fp8", "fp8 tensor") for said in (None, {"quant_method": "mine"})),
    ],
)
def test_its_own_method_none_and_an_unknown_one_are_read(
    format_name: str, said: dict[str, Any] | None, tmp_path: Path
) -> None:
    owners = open_checkpoint(model(tmp_path, format_name, said)).main.owners.values()
    assert {owner.kind for owner in owners} >= {KINDS[format_name]}


def test_a_weight_that_was_cast_to_fp8_is_of_no_method(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    made = model(tmp_path, "nf4", NF4)
    tensors = load_file(made / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    assert {owner.kind for owner in open_checkpoint(made).main.owners.values()} >= {"NF4", "FP8"}
