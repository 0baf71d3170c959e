# SPDX-License-Identifier: Apache-2.0
"""A fingerprint is that of the tensors: no file, order, container or metadata is in it, and every value is."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError
from surgery_formats.models.content import merkle_root
from tests.support.kit import ROOT

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"


def _id(path: Path) -> str:
    return surgery.fingerprint(path).models[0].id


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    return load_file(BASE / "model.safetensors")


def test_files_order_metadata_and_container_make_no_difference(values: dict[str, torch.Tensor], tmp_path: Path) -> None:
    known = _id(BASE)
    names = list(values)
    random.Random(0).shuffle(names)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    (tmp_path / "shards").mkdir()
    for file, some in parts.items():
        save_file({name: values[name] for name in some}, tmp_path / "shards" / file, {"format": "pt", "by": file})
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "torch").mkdir()
    turned = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in values.items()}
    torch.save(turned, tmp_path / "torch" / "pytorch_model.bin")
    for folder in ("shards", "torch"):
        (tmp_path / folder / "config.json").write_text((BASE / "config.json").read_text())
        assert _id(tmp_path / folder) == known, folder


@pytest.mark.parametrize("change", ["value", "name", "type", "shape"])
def test_everything_of_a_tensor_is_in_it(change: str, values: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "model.norm.weight"
    value = values.pop(name)
    if change == "value":
        value.view(torch.uint8)[-1] ^= 1
    elif change == "name":
        name = "model.norm.weights"
    elif change == "type":
        value = value.view(torch.int16 if value.element_size() == 2 else torch.int32)
    else:
        value = value[None]
    save_file({**values, name: value}, tmp_path / "model.safetensors")
    assert _id(tmp_path / "model.safetensors") != _id(BASE / "model.safetensors")
    found = surgery.fingerprint(tmp_path / "model.safetensors", against=BASE / "model.safetensors").models[0]
    if change == "name":
        assert (found.added, found.missing, found.changed) == ((name,), ("model.norm.weight",), ())
    else:
        assert (found.added, found.missing, found.changed) == ((), (), (name,))


def test_an_adapter_has_one_of_its_factors(tmp_path: Path) -> None:
    factors = load_file(LORA / "adapter_model.safetensors")
    torch.save(dict(reversed(factors.items())), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text((LORA / "adapter_config.json").read_text())
    result = surgery.fingerprint([LORA, tmp_path])
    assert result.equal
    assert len(result.models[0].tensors) == len(factors)


def test_a_graph_has_one_too() -> None:
    graph = ROOT / "tests" / "golden" / "onnx_graphs" / "optimum-bert" / "model.onnx"
    assert surgery.fingerprint(graph, against=graph).equal


def _graph(path: Path, tensors: list[onnx.TensorProto]) -> Path:
    output = onnx.helper.make_tensor_value_info("y", tensors[0].data_type, None)
    node = onnx.helper.make_node("Identity", [tensors[0].name], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output], tensors)), path)
    return path


KINDS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT64", "INT32", "UINT8", "BOOL", "INT4", "UINT4", "FLOAT8E4M3FN")


def test_values_that_a_graph_writes_one_by_one_are_those_of_raw_data(tmp_path: Path) -> None:
    numbers = [0, 1, 1, 0, 1, 1]
    typed = [onnx.helper.make_tensor(kind, onnx.TensorProto.DataType.Value(kind), (2, 3), numbers) for kind in KINDS]
    raw = [onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one), one.name) for one in typed]
    written, packed = _graph(tmp_path / "typed.onnx", typed), _graph(tmp_path / "raw.onnx", raw)
    assert _id(written) == _id(packed)
    assert len(surgery.fingerprint(written).models[0].tensors) == len(KINDS)
    for place, kind in enumerate(KINDS):
        number = onnx.TensorProto.DataType.Value(kind)
        for shape, values in (((2, 3), [*numbers[:5], 0]), ((3, 2), numbers)):
            others = [*typed[:place], onnx.helper.make_tensor(kind, number, shape, values), *typed[place + 1 :]]
            found = surgery.fingerprint(_graph(tmp_path / "other.onnx", others), against=packed).models[0]
            assert (found.added, found.missing, found.changed) == ((), (), (kind,))


def test_text_in_a_graph_is_refused(tmp_path: Path) -> None:
    text = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, (1,), [b"one"])
    with pytest.raises(FitError, match="a tensor of text"):
        surgery.fingerprint(_graph(tmp_path / "text.onnx", [text]))


def test_the_command_says_which_tensors_differ_and_ends_with_6(values: dict[str, torch.Tensor], tmp_path: Path) -> None:
    values["model.norm.weight"].view(torch.uint8)[0] ^= 1
    save_file(values, tmp_path / "model.safetensors")
    words = ["fingerprint", str(tmp_path / "model.safetensors"), "--against", str(BASE / "model.safetensors")]
    ran = CliRunner().invoke(command, words)
    assert ran.exit_code == 6
    assert "model.norm.weight" in ran.stdout
    ran = CliRunner().invoke(command, ["--json", *words])
    result = json.loads(ran.stdout)["result"]
    assert result["models"][0]["changed"] == ["model.norm.weight"]
    own = hashlib.sha256(values["model.norm.weight"].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert result["models"][0]["tensors"]["model.norm.weight"]["sha256"] == own
    assert CliRunner().invoke(command, ["fingerprint", str(BASE), "--against", str(BASE)]).exit_code == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 13])
def test_the_tree_is_that_of_certificate_transparency(count: int) -> None:
    leaves = [bytes([number]) * 32 for number in range(count)]

    def root(some: list[bytes]) -> bytes:
        if len(some) == 1:
            return some[0]
        left = 1 << (len(some) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + root(some[:left]) + root(some[left:])).digest()

    assert merkle_root(leaves) == (root(leaves).hex() if leaves else hashlib.sha256(b"").hexdigest())
