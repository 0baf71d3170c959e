# SPDX-License-Identifier: Apache-2.0
"""Formats that have a program of their own: what we read, it must read with the same result. We may refuse more than it does."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from surgery_formats.containers.gguf.header import read_header
from surgery_formats.containers.npz import open_npz
from surgery_formats.containers.onnx.graph import open_graph
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.containers.stored_zip import members
from surgery_formats.containers.tar import tar_members
from surgery_formats.containers.torch.pickle_file import read_torch, state_dict
from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor

from ..golden import golden_files, golden_graphs, small_graph
from ..target import Case, DisagreementError, Seed, Target
from ..world import TOKENIZER, graph_first, world

__all__ = ["targets"]


def targets() -> list[Target]:
    """One for each format, if its program is there."""
    return [
        Target(
            "peer:safetensors", _safetensors, partial(golden_files, ".safetensors"), needs=("safetensors",), share=2
        ),
        Target("peer:gguf", _gguf, partial(golden_files, ".gguf"), needs=("gguf",)),
        Target("peer:onnx", _onnx, _graphs, needs=("onnx",)),
        Target("peer:onnx_adapter", _onnx_adapter, partial(golden_files, ".onnx_adapter"), needs=("onnxruntime",)),
        Target(
            "peer:torch", _torch, partial(golden_files, ".bin", ".pt", ".pth", ".ckpt"), needs=("torch",), share=0.5
        ),
        Target("peer:npz", _npz, _arrays),
        Target("peer:zip", _zip, _arrays),
        Target("peer:tar", _tar, partial(golden_files, ".nemo", ".tar")),
        Target("peer:hdf5", _hdf5, partial(golden_files, ".h5"), needs=("h5py",), share=0.5),
        Target("peer:json", _json, _documents, on_disk=False, share=2),
    ]


def _graphs() -> Sequence[Seed]:
    made = [Seed(name, graph_first(world()[name])) for name in ("graph", "swap")]
    return [Seed("small", {"model.onnx": small_graph(), "a.data": bytes(96)}), *made, *golden_graphs()]


def _arrays() -> Sequence[Seed]:
    """Archives of arrays: of each type, with and without axes."""
    kinds = ("<f4", "<f2", "<f8", "<i8", "|u1", "|b1")
    values = {kind: numpy.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    values |= {"one": numpy.array(1.0), "none": numpy.zeros((0, 3))}
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        for name, value in values.items():
            array = io.BytesIO()
            numpy.save(array, value)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array.getvalue())  # numpy.savez would write the time
    return [Seed("numpy", {"a.npz": stored.getvalue()}), *golden_files(".npz")]


def _documents() -> Sequence[Seed]:
    return [Seed("tokenizer", {"tokenizer.json": json.dumps(TOKENIZER).encode()}), *golden_files(".json")]


# --- what we read and what they read --------------------------------------------------------------------------------------


def _agree(ours: Callable[[], Any], theirs: Callable[[], Any], *aside: str) -> str:
    """Whatever we read, they read the same.

    Args:
        ours: What we read.
        theirs: What they read. Their faults are of any type.
        aside: How their messages begin about parts that we do not read.
    """
    try:
        mine = ours()
    except SurgeryError:
        return "refused"
    try:
        other = theirs()
    except Exception as error:
        if str(error).startswith(aside):
            return "refused by it alone"
        raise DisagreementError(f"read here, and refused by its program: {type(error).__name__}: {error}") from error
    if mine != other:
        keys = [key for key in {**mine, **other} if mine.get(key) != other.get(key)] if isinstance(mine, dict) else []
        shown = [(key, str(mine.get(key))[:100], str(other.get(key))[:100]) for key in keys[:3]]
        raise DisagreementError(f"read otherwise than by its program: {shown or (str(mine)[:200], str(other)[:200])}")
    return "the same"


def _bytes_of(tensor: StoredTensor) -> bytes:
    return bytes(tensor.file.read(tensor.offset, tensor.nbytes))


def _safetensors(case: Case) -> str:
    import safetensors

    def ours() -> Mapping[str, Any]:
        return {t.name: (t.dtype.label, list(t.shape), _bytes_of(t)) for t in open_safetensors(case.path).tensors}

    def theirs() -> Mapping[str, Any]:
        found = safetensors.deserialize(case.raw)
        return {name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"])) for name, entry in found}

    return _agree(ours, theirs)


def _gguf(case: Case) -> str:
    import gguf

    def ours() -> Mapping[str, Any]:
        header = read_header(open_file(case.path))
        return {t.name: (t.offset, t.nbytes) for t in header.tensors}

    def theirs() -> Mapping[str, Any]:
        reader = gguf.GGUFReader(case.path)
        return {t.name: (int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}

    return _agree(ours, theirs)


def _onnx(case: Case) -> str:
    import onnx

    graph = open_graph(case.path)

    def inside() -> list[str]:
        own = (tensor.name for tensor in graph.proto.graph.initializer)  # no body's
        return [name for name in own if name in graph.tensors and graph.tensors[name].file is graph.file]

    def ours() -> Mapping[str, Any]:
        return {name: (list(graph.shapes[name]), _bytes_of(graph.tensors[name])) for name in inside()}

    def theirs() -> Mapping[str, Any]:
        found = {t.name: t for t in onnx.load_model_from_string(case.raw).graph.initializer}
        return {name: (list(found[name].dims), found[name].raw_data) for name in inside()}

    return _agree(ours, theirs)


def _onnx_adapter(case: Case) -> str:
    import onnxruntime

    def ours() -> Mapping[str, Any]:
        return {t.name: (list(t.shape), _bytes_of(t)) for t in open_onnx_adapter(case.path).tensors}

    def theirs() -> Mapping[str, Any]:
        found = onnxruntime.AdapterFormat.read_adapter(str(case.path)).get_parameters()
        return {name: (list(value.shape()), value.numpy().tobytes()) for name, value in found.items()}

    return _agree(
        ours, theirs, "/onnxruntime_src/"
    )  # flatbuffers' verifier, which looks at alignment and the ends of texts


def _torch(case: Case) -> str:
    import torch

    def ours() -> Mapping[str, Any]:
        return {
            name: (list(t.shape), t.read().tobytes())
            for name, t in state_dict(read_torch(open_file(case.path))).items()
        }

    def theirs() -> Mapping[str, Any]:
        found = torch.load(case.path, weights_only=True, map_location="cpu")
        found = found.get("state_dict", found) if isinstance(found, dict) else found
        plain = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return {
            name: (list(v.shape), v.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            for name, v in plain.items()
        }

    envelope = (
        "[enforce fail at inline_container",
        "PytorchStreamReader",
        "invalid literal for int()",
        "'utf-8' codec",
    )
    return _agree(
        ours, theirs, *envelope
    )  # members that no tensor needs: a version, an alignment, an id, a name outside


def _npz(case: Case) -> str:
    def ours() -> Mapping[str, Any]:
        return {
            t.name: (t.shape, t.read().tobytes())
            for t in open_npz(case.path).tensors
            if t.dtype.is_float and t.dtype.bits > 16
        }

    def theirs() -> Mapping[str, Any]:
        with numpy.load(io.BytesIO(case.raw), allow_pickle=False) as archive:
            kept = {
                name: archive[name] for name in archive.files if archive[name].dtype in (numpy.float32, numpy.float64)
            }
        return {name: (value.shape, value.tobytes()) for name, value in kept.items()}

    return _agree(ours, theirs, "Bad CRC-32")  # of all bytes, of which we read some


def _zip(case: Case) -> str:
    def ours() -> Mapping[str, Any]:
        file = open_file(case.path)
        return {name: bytes(file.read(m.offset, m.nbytes)) for name, m in members(file).items()}

    def theirs() -> Mapping[str, Any]:
        with zipfile.ZipFile(io.BytesIO(case.raw)) as archive:
            return {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}

    return _agree(ours, theirs, "Bad CRC-32")  # of all bytes, of which we read some


def _tar(case: Case) -> str:
    def ours() -> Mapping[str, Any]:
        file = open_file(case.path)
        return {name: bytes(file.read(m.offset, m.nbytes)) for name, m in tar_members(file).items()}

    def theirs() -> Mapping[str, Any]:
        with tarfile.open(fileobj=io.BytesIO(case.raw), mode="r:") as archive:
            kept = [member for member in archive.getmembers() if member.isreg()]
            return {member.name.removeprefix("./"): _content(archive, member) for member in kept}

    return _agree(ours, theirs)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _hdf5(case: Case) -> str:
    import h5py

    from surgery_formats.containers.hdf5 import datasets

    def ours() -> Mapping[str, Any]:
        return {t.name: (t.shape, _bytes_of(t)) for t in datasets(open_file(case.path))}

    def theirs() -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        with h5py.File(io.BytesIO(case.raw), "r") as file:
            file.visititems(
                lambda name, v: (
                    found.update({name: (v.shape, v[()].tobytes())}) if isinstance(v, h5py.Dataset) else None
                )
            )
        return found

    return _agree(ours, theirs, "")  # it looks at more than the groups and arrays


def _json(case: Case) -> str:
    def theirs() -> Any:
        return json.loads(case.raw)

    return _agree(lambda: parse_object(case.raw, file="a.json"), theirs)
