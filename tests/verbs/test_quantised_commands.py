# SPDX-License-Identifier: Apache-2.0
"""Every command on a model in every format that can be made here: commands know weights, and not how they are stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.reference import forward, open_reference
from surgery_formats.arrays import as_torch
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.support.kit import ROOT
from tests.support.quantised_folders import FORMATS, KINDS, quantise_folder

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"
IDS = torch.tensor([[1, 5, 9, 200, 7, 31]])

pytestmark = pytest.mark.parametrize("format_name", FORMATS)


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight as a reader of the folder gets it."""
    return {name: as_torch(read_rows(one.storage)) for name, one in open_checkpoint(folder).main.parameters.items()}


@pytest.fixture
def coded(format_name: str, tmp_path: Path) -> Path:
    return quantise_folder(BASE, tmp_path / "coded", format_name)


def test_inspect_counts_weights_and_says_how_they_are_stored(format_name: str, coded: Path) -> None:
    found, plain = surgery.inspect(coded), surgery.inspect(BASE)
    assert found.parameters == plain.parameters
    (part,), (other,) = found.components, plain.components
    assert {role: total.parameters for role, total in part.roles.items()} == {
        role: total.parameters for role, total in other.roles.items()
    }
    (group,) = part.quantised
    assert (group.kind, group.weights, group.of) == (KINDS[format_name], 42, 57)
    stored = open_checkpoint(coded).main
    nbytes = sum(tensor.nbytes for name, tensor in stored.tensors.items() if "_proj" in name)
    assert group.bits == pytest.approx(8 * nbytes / (294_912 + 811_008))
    assert re.search(rf"quantised +{re.escape(group.kind)}, [\d.]+ bits per weight, 42 of 57 weights", str(found))
    assert not found.warnings


def test_report_counts_the_bytes_that_are_stored(format_name: str, coded: Path) -> None:
    result, plain = surgery.report(LORA, base=coded), surgery.report(LORA, base=BASE)
    assert result.base is not None
    assert plain.base is not None
    assert result.base.parameters == plain.base.parameters
    assert result.base.nbytes == (coded / "model.safetensors").stat().st_size
    assert result.adapters[0].share == plain.adapters[0].share
    assert KINDS[format_name] in str(result)


def test_diff_against_the_release_is_the_error_of_the_codes(format_name: str, coded: Path) -> None:
    before, after = values(BASE), values(coded)
    for one, other in ((BASE, coded), (coded, BASE)):
        found = surgery.diff(one, other)
        statuses = {tensor.name: tensor.status for tensor in found.tensors}
        assert statuses == {name: "dtype" if "_proj" in name else "equal" for name in before}
        for tensor in found.tensors:
            if tensor.values is not None:
                apart = (after[tensor.name].double() - before[tensor.name].double()).norm()
                assert tensor.values.difference == pytest.approx(float(apart), rel=1e-5), tensor.name
        (loss,) = found.quantisation
        assert (loss.kind, loss.other, loss.weights) == (KINDS[format_name], "BF16", 42)
        assert loss.relative == pytest.approx(loss.rounding, rel=1e-3)  # these encoders round to nearest
        assert loss.nearest > 0.99


def test_diff_of_two_quantised_models(format_name: str, coded: Path, tmp_path: Path) -> None:
    same = quantise_folder(BASE, tmp_path / "same", format_name)
    assert surgery.diff(coded, same).equal
    other = quantise_folder(BASE, tmp_path / "other", "int8" if format_name != "int8" else "nf4")
    found, before, after = surgery.diff(coded, other), values(coded), values(other)
    assert not found.quantisation
    squares = sum(float((after[name].double() - before[name].double()).norm() ** 2) for name in before)
    norm = sum(float(before[name].double().norm() ** 2) for name in before if "_proj" in name)
    assert found.difference == pytest.approx((squares / norm) ** 0.5, rel=1e-4)


def test_a_merge_dequantises_and_verify_proves_it(format_name: str, coded: Path, tmp_path: Path) -> None:
    surgery.merge(coded, LORA, output=tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out").main
    assert {weight.kind for weight in merged.owners.values()} == {"BF16"}
    assert not merged.config.keys() & {"quantization_config", "quantization"}
    assert surgery.verify(tmp_path / "out", against=coded).kind == "folder"
    logits = forward(open_reference(merged), IDS).logits
    dense = tmp_path / "dense"
    surgery.merge(coded, LORA, output=dense, dtype="fp32")
    assert torch.allclose(logits, forward(open_reference(open_checkpoint(dense).main), IDS).logits, atol=0.1)


@pytest.mark.parametrize("merge_to", ["delta", "full"])
def test_a_graph_has_the_values_of_the_codes(format_name: str, merge_to: str, coded: Path, tmp_path: Path) -> None:
    surgery.export_onnx(coded, output=tmp_path / "graph", merge_to=merge_to, dtype="fp32")
    assert surgery.verify(tmp_path / "graph", against=coded).kind == "graph"
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "quantization"}
    computed = load_file(tmp_path / "graph" / ("delta.safetensors" if merge_to == "delta" else "model.safetensors"))
    wanted = values(coded)
    for name, tensor in computed.items():
        assert tensor.equal(wanted[name].to(torch.bfloat16)), name
    assert len(computed) == (42 if merge_to == "delta" else 57)


def test_a_graph_with_an_adapter_is_verified_against_the_quantised_base(
    format_name: str, coded: Path, tmp_path: Path
) -> None:
    surgery.export_onnx(coded, LORA, output=tmp_path / "graph", dtype="fp32")
    assert surgery.verify(tmp_path / "graph", against=coded).kind == "graph"


def test_adapters_are_converted_combined_and_resized_by_a_quantised_base(
    format_name: str, coded: Path, tmp_path: Path
) -> None:
    for base, name in ((coded, "coded"), (BASE, "plain")):
        surgery.convert(LORA, to="mlx", base=base, output=tmp_path / f"mlx {name}")
        surgery.combine([(LORA, 0.5), (LORA, 0.25)], base=base, output=tmp_path / f"sum {name}")
        surgery.resize(LORA, rank=4, base=base, output=tmp_path / f"small {name}")
    for one in (
        "mlx {}/adapters.safetensors",
        "sum {}/adapter_model.safetensors",
        "small {}/adapter_model.safetensors",
    ):
        left, right = (load_file(tmp_path / one.format(name)) for name in ("coded", "plain"))
        assert left.keys() == right.keys()
        assert all(left[key].equal(right[key]) for key in left)
