# SPDX-License-Identifier: Apache-2.0
"""What people see of quantised weights: weights are counted and listed, not the tensors beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from tests.support.kit import ROOT
from tests.support.quantised_folders import quantise_folder

BASE, LORA = (ROOT / "examples" / name for name in ("base", "lora"))


@pytest.fixture
def nf4(tmp_path: Path) -> Path:
    return quantise_folder(BASE, tmp_path / "base", "nf4")


def test_layers_whose_descriptions_differ_in_length_are_one_row(nf4: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps a JSON text beside each weight, which has an offset of more or fewer digits in it."""
    odd = tmp_path / "odd"
    shutil.copytree(nf4, odd)
    tensors = load_file(odd / "model.safetensors")
    for number, name in enumerate(name for name in sorted(tensors) if name.endswith("bitsandbytes__nf4")):
        state = json.loads(bytes(tensors[name].tolist()))
        raw = json.dumps({**state, "note": "x" * (number % 5)}).encode()
        tensors[name] = torch.tensor(list(raw), dtype=torch.uint8)
    save_file(tensors, odd / "model.safetensors", {"format": "pt"})
    plain, found = (surgery.inspect(folder).components[0] for folder in (nf4, odd))
    assert [node.name for _, node in found.tree.walk()] == [node.name for _, node in plain.tree.walk()]
    (layers,) = [node for _, node in found.tree.walk() if node.name == "model.layers.0-5"]
    assert layers.repeated == 6
    weights = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    assert layers.nbytes == sum(tensor.nbytes for tensor in weights.values())
    assert found.parameters == plain.parameters == surgery.inspect(BASE).parameters


def test_a_dry_run_counts_and_lists_weights(nf4: Path) -> None:
    shown = str(surgery.merge(nf4, LORA, quantized="requantize", dry_run=True).summary(verbose=True))
    assert "absmax" not in shown
    (line,) = [line.split() for line in shown.splitlines() if line.startswith("model.safetensors")]
    assert line[-2:] == ["15", "42"]
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("model.layers.0.mlp.up_proj.weight")]
    assert row[-2:] == ["352x128", "NF4"]


def test_tensors_that_are_in_the_lora_of_a_residual_are_used(nf4: Path) -> None:
    result = surgery.merge(nf4, LORA, quantized="residual", dry_run=True)
    assert result.ledger.adapter_tensors == 84
    assert "84 tensors used, 0 without effect; 84 of them in the LoRA beside the model" in str(result.summary())


@pytest.mark.parametrize(
    ("weight", "options", "verdict"),
    [
        (1.0, {}, "good"),
        (0.25, {}, "good"),
        (0.25, {"rounding": "nearest"}, "poor"),
    ],
)
def test_the_verdict_on_requantised_codes_is_what_was_measured(
    weight: float, options: dict[str, str], verdict: str, nf4: Path, tmp_path: Path
) -> None:
    result = surgery.merge(
        nf4, (LORA, weight), output=tmp_path / "out", quantized="requantize", accept_loss=True, **options
    )
    (said,) = [line for line in str(result.summary()).splitlines() if line.startswith("verdict")]
    held = f"{100 * result.ledger.survival:.2f}% of the update; "
    assert said.removeprefix("verdict").strip().startswith(f"{verdict} by the codes, which hold {held}")
    assert said.endswith("surgery eval measures what that is worth on a text")
    assert ("--quantized residual" in said) == (verdict == "poor")


def test_the_share_that_is_kept_is_that_of_the_base(nf4: Path, tmp_path: Path) -> None:
    """Of a dequantised base the output is larger than what was kept is for."""
    result = surgery.merge(nf4, LORA, output=tmp_path / "out", reversible=True)
    share = 100 * result.rounding_nbytes / (nf4 / "model.safetensors").stat().st_size
    assert share > 30
    assert f"{share:.2f}% of the base's weights" in str(result.summary())
