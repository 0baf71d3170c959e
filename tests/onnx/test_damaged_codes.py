# SPDX-License-Identifier: Apache-2.0
"""What is wrong of codes is refused, told, or made up for: damage after the export, and values that no scale of 16 bits holds."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.onnx.export.coded_plan import QUANTISED
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError, MalformedError, ProofError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.oracles import recipes
from tests.support.block_codes import decoded
from tests.support.quantised_folders import quantise_folder

WEIGHT = "model.layers.1.mlp.up_proj.weight"
WIDE = {"hidden_size": 64, "intermediate_size": 192}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", **WIDE)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("graph") / "out"
    export_onnx(base, output=out, weights_type="int4", symmetric=False)
    return out


def changed(folder, target, change):
    """A copy of a model, of whose tensors some are changed."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def scale(raw: bytearray) -> None:
    raw[:2] = (np.frombuffer(bytes(raw[:2]), np.float16) * np.float16(1.25)).tobytes()


def nibbles(raw: bytearray) -> None:
    place = next(number for number, byte in enumerate(raw) if byte & 15 != byte >> 4)
    raw[place] = raw[place] >> 4 | (raw[place] & 15) << 4


def zero_point(raw: bytearray) -> None:
    raw[0] ^= 1


@pytest.mark.parametrize(("part", "damage"), [("scales", scale), ("codes", nibbles), ("zero_points", zero_point)])
def test_one_changed_scale_nibble_or_zero_point_is_found(exported, tmp_path, part, damage):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    data = bytearray((out / QUANTISED).read_bytes())
    behind = 8 + struct.unpack("<Q", data[:8])[0]
    start, stop = (behind + at for at in json.loads(data[8:behind])[f"{WEIGHT}.{part}"]["data_offsets"])
    raw = data[start:stop]
    damage(raw)
    assert raw != data[start:stop]
    data[start:stop] = raw
    (out / QUANTISED).write_bytes(data)
    with pytest.raises(ProofError, match=rf"up_proj.weight.{part}': its bytes have changed"):
        surgery.verify(out)


def products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "MatMulNBits" and "mlp" in node.input[1]]


def without_zero_points(model: onnx.ModelProto) -> None:
    del products(model.graph)[0].input[3:]


def others_scales(model: onnx.ModelProto) -> None:
    first, *rest = products(model.graph)
    other = next(node for node in rest if list(node.attribute) == list(first.attribute))
    first.input[2], other.input[2] = other.input[2], first.input[2]


def other_blocks(model: onnx.ModelProto) -> None:
    next(one for one in products(model.graph)[0].attribute if one.name == "block_size").i = 64


def other_blocks_stated(model: onnx.ModelProto) -> None:
    entry = next(one for one in model.metadata_props if one.key == "surgery.contract")
    stated = json.loads(entry.value)
    stated["quantised"][0]["block"] = 64
    entry.value = json.dumps(stated)


@pytest.mark.parametrize("damage", [without_zero_points, others_scales, other_blocks, other_blocks_stated])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_graph_that_reads_codes_otherwise_is_refused_with_and_without_a_manifest(
    exported, tmp_path, damage, manifest
):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    damage(model)
    onnx.save(model, out / "model.onnx")
    if not manifest:
        (out / MANIFEST).unlink()
    with pytest.raises(ProofError if manifest or damage is not other_blocks_stated else MalformedError):
        surgery.verify(out)


def test_without_a_manifest_another_base_is_still_refused_and_what_is_not_known_is_said(base, exported, tmp_path):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    (out / MANIFEST).unlink()
    assert any("how far the codes were" in note for note in surgery.verify(out, against=base).notes)
    other = changed(base, tmp_path / "other", lambda tensors: tensors[WEIGHT].neg_())
    with pytest.raises(ProofError, match="its codes are off by 2"):
        surgery.verify(out, against=other)


@pytest.mark.parametrize("factor", [1e-8, 1e7])
def test_weights_beyond_scales_of_16_bits_are_named(base, tmp_path, factor):
    odd = changed(base, tmp_path / "base", lambda tensors: tensors[WEIGHT].mul_(factor))
    result = export_onnx(odd, output=tmp_path / "out", weights_type="int4")
    (warning,) = (one for one in result.warnings if "scales of 16 bits" in one)
    assert WEIGHT in warning
    surgery.verify(tmp_path / "out", against=odd)
    assert not any("16 bits" in one for one in export_onnx(base, output=tmp_path / "b", weights_type="int4").warnings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"weights_type": "int4"}, {"weights_type": "int8", "symmetric": False}])
def test_what_is_no_number_is_refused(base, tmp_path, value, options):
    odd = changed(base, tmp_path / "base", lambda tensors: tensors[WEIGHT][3, 5:6].fill_(value))
    with pytest.raises(FitError, match=f"up_proj.weight': .*{value}"):
        export_onnx(odd, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("block", [32, 128])
def test_widths_that_are_no_multiples_and_blocks_of_zeros_are_right(tmp_path, symmetric, kind, block):
    """60 and 77 inputs, 77 and 101 outputs: half a byte of zero points is left over, too."""
    odd = recipes.build("llama", tmp_path / "odd", hidden_size=60, intermediate_size=77, vocab_size=101, head_dim=14)
    base = changed(odd, tmp_path / "base", lambda tensors: tensors[WEIGHT][:, :32].zero_())
    export_onnx(base, output=tmp_path / "out", weights_type=kind, symmetric=symmetric, block=block)
    values = decoded(tmp_path / "out")[WEIGHT]
    assert values.shape[0] == 77
    assert block == 128 or not values[:, :32].any()
    assert not values[:, 60:].any() or not symmetric
    assert surgery.verify(tmp_path / "out", against=base).difference < 1e-4


def scales_of(kind: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor], str]:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stem = "model.layers.1.mlp.down_proj" if kind != "packed" else "model.layers.1.mlp.up_proj"
    return path, tensors, f"{stem}.{'weight_scale' if kind == 'packed' else 'scales'}"


@pytest.mark.parametrize("kind", ["gptq", "awq", "packed"])
def test_groups_of_no_scale_behind_the_rows_that_are_looked_at_are_zeros(base, kind, tmp_path):
    """A scale of 0 says that all codes are 0, whatever the zero point; one was an error in the middle of an export."""
    folder = quantise_folder(base, tmp_path / "base", kind)
    path, tensors, name = scales_of(kind, folder)
    tensors[name][(150, 1) if kind == "packed" else (5, 3)] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    result = export_onnx(folder, output=tmp_path / "out", weights_type="int4")
    weight = f"{name.rpartition('.')[0]}.weight"
    values = read_rows(open_checkpoint(folder).main.parameters[weight].storage)
    assert np.array_equal(decoded(tmp_path / "out")[weight][:, : values.shape[1]], values)
    assert not any("second time" in warning for warning in result.warnings)
    surgery.verify(tmp_path / "out", against=folder)


def test_rows_whose_scales_do_not_fit_are_rounded_again_alone_and_named(base, tmp_path):
    """bf16 holds scales that are less than any of float16, behind the rows by which the format is chosen."""
    folder = quantise_folder(base, tmp_path / "base", "packed")
    path, tensors, name = scales_of("packed", folder)
    tensors[name] = tensors[name].bfloat16()
    tensors[name][150] = 1.1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    result = export_onnx(folder, output=tmp_path / "out", weights_type="int4", dtype="fp32")
    weight = f"{name.rpartition('.')[0]}.weight"
    (warning,) = (one for one in result.warnings if "second time" in one)
    assert weight in warning
    values = read_rows(open_checkpoint(folder).main.parameters[weight].storage)
    found = decoded(tmp_path / "out")[weight][:, : values.shape[1]]
    wrong = np.flatnonzero((found != values).any(1))
    assert wrong.tolist() == [150]
    assert 0 < np.linalg.norm(found[150] - values[150]) / np.linalg.norm(values[150]) < 0.2
    surgery.verify(tmp_path / "out", against=folder)
