# SPDX-License-Identifier: Apache-2.0
"""Containers: all keep the contract, the registry finds the right one, and a plugin is one file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

import surgery
from surgery_formats.arrays import Array, as_torch, dtype_of
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.base import FileContainer
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.pipeline import PIPELINE
from surgery_formats.containers.registry import ENTRY_POINTS, container_at, containers
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.sharded import SHARDED
from surgery_formats.containers.torch import TORCH
from surgery_formats.containers.weight_files import UNREAD_SUFFIXES, open_shard
from surgery_formats.errors import MalformedError, ProofError, SurgeryError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.testing.container import CONTAINER_CHECKS, ContainerCase
from surgery_formats.testing.plugins import installed, installed_project
from tests.support.kit import ROOT, make_base, make_lora

TOY = ROOT / "tests" / "plugins" / "toy_container"
Tensors = Mapping[str, Array]


def in_torch(arrays: Tensors) -> dict[str, torch.Tensor]:
    """What the original programs save; without the memory of others."""
    return {name: as_torch(array).clone() for name, array in arrays.items()}


def write_safetensors(folder: Path, tensors: Tensors) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.torch.save(in_torch(tensors), {"format": "pt", "by": "hand"}))
    return path


def write_torch(folder: Path, tensors: Tensors) -> Path:
    torch.save(in_torch(tensors), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_old_torch(folder: Path, tensors: Tensors) -> Path:
    torch.save(in_torch(tensors), folder / "model.ckpt", _use_new_zipfile_serialization=False)
    return folder / "model.ckpt"


def write_sharded(folder: Path, tensors: Tensors) -> Path:
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        (folder / shard).write_bytes(safetensors.torch.save(in_torch({name: tensors[name] for name in part})))
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_pipeline(folder: Path, tensors: Tensors) -> Path:
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    write_safetensors(folder / "unet", tensors)
    index = {"_class_name": "X", "scheduler": ["diffusers", "Y"], "unet": ["diffusers", "Z"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_onnx(folder: Path, tensors: Tensors) -> Path:
    """Every other tensor in the graph, the rest in a file beside it."""
    made, data = [], b""
    for number, (name, array) in enumerate(tensors.items()):
        tensor = onnx.numpy_helper.from_array(array, name)
        if number % 2:
            for key, value in (("location", "model.data"), ("offset", len(data)), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            data += array.tobytes()
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
        made.append(tensor)
    (folder / "model.data").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], made)).SerializeToString())
    return path


def write_toyz(folder: Path, tensors: Tensors, config: Mapping[str, object] = {}) -> Path:
    entries, data = [], b""
    for name, tensor in tensors.items():
        entries.append([name, dtype_of(tensor).label, list(tensor.shape), len(data)])
        data += tensor.tobytes()
    header = json.dumps({"tensors": entries, "config": config}).encode()
    path = folder / "model.toyz"
    path.write_bytes(b"TOYZ" + struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.fixture
def toyz() -> Iterator[FileContainer]:
    """The plugin's container, while its package is installed."""
    with installed_project(TOY):
        container = containers()["toyz"]
        assert isinstance(container, FileContainer)
        yield container


# ------------------------------------------------------------------------------------------------ the contract

BUILT_IN = {
    "safetensors": ContainerCase(SAFETENSORS, write_safetensors),
    "torch": ContainerCase(TORCH, write_torch),
    "torch before 1.6": ContainerCase(TORCH, write_old_torch),
    "onnx": ContainerCase(ONNX, write_onnx),
    "sharded": ContainerCase(SHARDED, write_sharded),
    "pipeline": ContainerCase(PIPELINE, write_pipeline),
}
checks = pytest.mark.parametrize("check", CONTAINER_CHECKS, ids=lambda check: check.__name__)


@pytest.mark.parametrize("case", BUILT_IN)
@checks
def test_every_container_keeps_the_contract(
    check: Callable[[ContainerCase, Path], None], case: str, tmp_path: Path
) -> None:
    check(BUILT_IN[case], tmp_path)


@checks
def test_the_toy_keeps_the_contract(
    check: Callable[[ContainerCase, Path], None], toyz: FileContainer, tmp_path: Path
) -> None:
    check(ContainerCase(toyz, write_toyz), tmp_path)


# ------------------------------------------------------------------------------------------------ the registry


def test_every_container_is_found_where_it_is(toyz: FileContainer, tmp_path: Path) -> None:
    cases = {**BUILT_IN, "toyz": ContainerCase(toyz, write_toyz)}
    for number, case in enumerate(cases.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert container_at(case.write(folder, {"a": np.ones(2, np.float32)})) is case.container
    assert container_at(tmp_path / "3" / "model.safetensors.index.json") is SHARDED


@pytest.mark.parametrize("suffix", [*sorted({*UNREAD_SUFFIXES} - {".onnx"}), ".toyz", ".txt"])
def test_a_file_that_no_container_reads_is_refused_by_its_name(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"TOYZ")
    with pytest.raises(MalformedError, match="by its name"):
        open_checkpoint(tmp_path / f"model{suffix}")


def test_a_misnamed_file_is_refused_with_its_real_container(toyz: FileContainer, tmp_path: Path) -> None:
    for write, name in (
        (write_safetensors, ".safetensors"),
        (write_torch, ".bin, .pt, .pth or .ckpt"),
        (write_toyz, ".toyz"),
    ):
        written = write(tmp_path, {"a": np.ones(2, np.float32)})
        for other in (".safetensors", ".bin", ".toyz", ".txt"):
            if other != written.suffix:
                (path := tmp_path / f"misnamed{other}").write_bytes(written.read_bytes())
                with pytest.raises(MalformedError, match=f"name it {name}"):
                    open_shard(path)


def test_of_two_containers_with_one_ending_the_content_decides(tmp_path: Path) -> None:
    class Ggml:
        name, title, written_as, suffixes = "ggml", "ggml-model.bin", "safetensors", (".bin",)

        def detect(self, path: Path) -> bool:
            return path.read_bytes()[:4] == b"lmgg"

        def open(self, path: Path) -> None:
            raise MalformedError("this one was asked", file=path)

    (tmp_path / "ggml-model.bin").write_bytes(b"lmgg")
    with installed(ENTRY_POINTS, "ggml", Ggml()):
        with pytest.raises(MalformedError, match="this one was asked"):
            open_checkpoint(tmp_path / "ggml-model.bin")
        assert open_checkpoint(write_torch(tmp_path, {"a": np.ones(2, np.float32)})).main.tensors.keys() == {"a"}


def test_a_plugin_must_not_take_the_name_of_another_container() -> None:
    with (
        installed(ENTRY_POINTS, "thief", replace(SAFETENSORS, name="pipeline")),
        pytest.raises(SurgeryError, match="taken"),
    ):
        containers()


def test_a_container_that_is_only_read_must_name_one_that_is_written(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (base / "model.safetensors").rename(tmp_path / "model.x")
    readable = replace(SAFETENSORS, name="x", suffixes=(".x",), written_as="torch")
    with installed(ENTRY_POINTS, "x", readable), pytest.raises(SurgeryError, match="written as 'torch'"):
        surgery.merge(tmp_path / "model.x", lora, output=tmp_path / "out")


def test_outputs_of_a_container_that_is_only_read_are_of_the_one_it_names(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    surgery.merge(base / "model.safetensors", lora, output=tmp_path / "usual")
    (base / "model.safetensors").rename(tmp_path / "model.x")
    with installed(ENTRY_POINTS, "x", replace(SAFETENSORS, name="x", suffixes=(".x",), written_as="safetensors")):
        surgery.merge(tmp_path / "model.x", lora, output=tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "usual/model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ one file is enough


@pytest.fixture
def toy_base(toyz: FileContainer, tmp_path: Path) -> Path:
    """The base of `make_base` in one .toyz file that holds its configuration too."""
    made = make_base(tmp_path / "base")
    tensors = values(made)
    (tmp_path / "toy").mkdir()
    return write_toyz(tmp_path / "toy", tensors, json.loads((made / "config.json").read_text()))


def values(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).main.tensors.items()}


def test_a_toy_base_is_listed_inspected_and_reported(toy_base: Path, tmp_path: Path) -> None:
    entry = next(entry for entry in surgery.formats().containers if entry.name == "toyz")
    assert (entry.files, entry.writes, entry.built_in) == ("model.toyz: a JSON header and raw data", True, False)
    assert "JSON header and raw data (plugin)" in str(surgery.formats().summary())
    (component,) = surgery.inspect(toy_base).components
    assert (component.family, component.facts["layers"]) == ("llama", 2)
    assert [file.container for file in component.files] == ["toyz"]
    assert component.roles == surgery.inspect(tmp_path / "base").components[0].roles
    assert surgery.report(make_lora(tmp_path / "lora"), base=toy_base).as_json()["base"]["path"] == str(toy_base)


def test_a_merge_into_a_toy_base_is_a_toy_with_the_values_of_any_other(toy_base: Path, tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora")
    surgery.merge(tmp_path / "base", lora, output=tmp_path / "usual")
    surgery.merge(toy_base, lora, output=tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "README.md",
        "config.json",
        "model.toyz",
        "surgery_manifest.json",
    ]
    merged, usual = values(tmp_path / "merged"), values(tmp_path / "usual")
    assert merged.keys() == usual.keys()
    assert all(np.array_equal(merged[name], usual[name]) for name in usual)
    assert surgery.diff(tmp_path / "merged", tmp_path / "usual").equal
    assert not surgery.diff(tmp_path / "merged", toy_base).equal
    assert surgery.verify(tmp_path / "merged", against=toy_base).checks


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_a_toy_output_that_changed_does_not_verify(name: str, toy_base: Path, tmp_path: Path) -> None:
    """A tensor that the merge computed, and one that it copied."""
    surgery.merge(toy_base, make_lora(tmp_path / "lora"), output=tmp_path / "merged")
    tensor = open_checkpoint(tmp_path / "merged").main.tensors[name]
    raw = bytearray(tensor.path.read_bytes())
    raw[tensor.offset] ^= 1
    tensor.path.write_bytes(raw)
    with pytest.raises(ProofError):
        surgery.verify(tmp_path / "merged", against=toy_base)


def test_toys_are_shards_of_a_folder_and_networks_of_a_pipeline(toy_base: Path, tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora")
    surgery.merge(toy_base, lora, output=tmp_path / "sharded", shard_size=20_000)
    assert (tmp_path / "sharded/model.toyz.index.json").exists()
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.toyz"))) > 1
    again = surgery.merge(tmp_path / "sharded", lora, output=tmp_path / "again")
    assert {file.name for file in again.ledger.plan.files} == {
        path.name for path in (tmp_path / "sharded").glob("*.toyz")
    }
    write_toyz(write_pipeline(tmp_path, {"a": np.ones(2, np.float32)}) / "scheduler", {"b": np.ones(3, np.float32)})
    pipeline = open_checkpoint(tmp_path)
    assert {name: list(component.tensors) for name, component in pipeline.components.items()} == {
        "scheduler": ["b"],
        "unet": ["a"],
    }


@pytest.mark.usefixtures("toyz")
def test_a_packed_output_is_safetensors_whatever_the_base_is(tmp_path: Path) -> None:
    base, lora = ROOT / "examples/base", ROOT / "examples/lora"
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(base).main.tensors.items()}
    toy = write_toyz(tmp_path, tensors, json.loads((base / "config.json").read_text()))
    surgery.merge(toy, lora, output=tmp_path / "packed", layout="packed")
    surgery.merge(base, lora, output=tmp_path / "usual", layout="packed")
    assert (tmp_path / "packed/model.safetensors").read_bytes() == (tmp_path / "usual/model.safetensors").read_bytes()
    assert not (tmp_path / "packed/model.toyz").exists()


@pytest.mark.usefixtures("toyz")
def test_an_adapter_in_a_toy_file_is_read_as_in_any_other(tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora")
    usual = surgery.open(lora)
    write_toyz(lora, load_file(lora / "adapter_model.safetensors")).rename(lora / "adapter_model.toyz")
    (lora / "adapter_model.safetensors").unlink()
    adapter = surgery.open(lora)
    assert isinstance(adapter, Adapter)
    assert isinstance(usual, Adapter)
    assert [(t.name, t.path.name) for t in adapter.tensors] == [(t.name, "adapter_model.toyz") for t in usual.tensors]
