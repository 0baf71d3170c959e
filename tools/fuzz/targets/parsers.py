# SPDX-License-Identifier: Apache-2.0
"""Parsers alone, on bytes in memory: no file is opened, so that each is executed thousands of times a second."""

from __future__ import annotations

import io
import json
import pickletools
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from surgery.onnx.graph.contract import from_metadata
from surgery_formats.adapters.nemo.config import plain_values
from surgery_formats.containers.gguf.header import read_header as read_gguf
from surgery_formats.containers.hdf5 import datasets
from surgery_formats.containers.npy import npy_array
from surgery_formats.containers.onnx.walk import walk
from surgery_formats.containers.onnx_adapter import arrays_of
from surgery_formats.containers.safetensors import read_header
from surgery_formats.containers.stored_zip import members
from surgery_formats.containers.tar import tar_members
from surgery_formats.containers.torch.pickle_file import read_torch
from surgery_formats.containers.torch.pickle_interpreter import interpret
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.output.journal import parse_line
from surgery_formats.files.raw import File
from tests.support.gguf_file import F32, GgufTensor, RawGguf, text, u32

from ..golden import golden_files, small_graph
from ..target import Case, Seed, Target
from ..world import safetensors_bytes, world

__all__ = ["targets"]

_PATH = Path("input")
Run = Callable[[bytes], object]


def targets() -> list[Target]:
    """One for each parser."""
    parsers: dict[str, tuple[Run, Callable[[], Sequence[bytes]]]] = {
        "json": (lambda raw: parse_object(raw, file=_PATH), _objects),
        "safetensors": (lambda raw: read_header(_file(raw)), _safetensors),
        "npy": (lambda raw: npy_array(_file(raw), "a"), _arrays),
        "zip": (lambda raw: members(_file(raw)), _archives),
        "tar": (lambda raw: tar_members(_file(raw)), _tars),
        "gguf": (lambda raw: read_gguf(_file(raw)), _ggufs),
        "protobuf": (lambda raw: walk(_file(raw)), lambda: [small_graph()]),
        "flatbuffer": (lambda raw: arrays_of(_file(raw)), partial(_small, ".onnx_adapter")),
        "hdf5": (lambda raw: datasets(_file(raw)), partial(_small, ".h5")),
        "pickle": (_pickle, _pickles),
        "torch": (lambda raw: read_torch(_file(raw)), partial(_small, ".pt", ".bin")),
        "journal": (lambda raw: parse_line(raw, "p"), _lines),
        "contract": (lambda raw: from_metadata({"surgery.contract": raw.decode("latin-1")}), _contracts),
        "yaml values": (lambda raw: plain_values(raw.decode("latin-1"), _PATH), partial(_small, ".yaml")),
    }
    return [
        Target(f"parser:{name}", partial(_executed, run), partial(_seeds, seeds), on_disk=False, share=3, quick=True)
        for name, (run, seeds) in parsers.items()
    ]


def _executed(run: Run, case: Case) -> str:
    run(case.raw)
    return "read"


def _seeds(make: Callable[[], Sequence[bytes]]) -> Sequence[Seed]:
    return [Seed(str(number), {"input": raw}) for number, raw in enumerate(make())]


@dataclass(frozen=True)
class _Bytes:
    """Bytes as a file that lies nowhere."""

    data: bytes

    def read_into(self, buffer: memoryview, offset: int) -> int:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def fetch(self, start: int, stop: int) -> memoryview:
        return memoryview(self.data)[start:stop]

    def warm(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def check_unchanged(self) -> None:
        pass

    @property
    def record(self) -> dict[str, str]:
        return {}


def _file(data: bytes) -> File:
    return File(_PATH, None, len(data), (0, 0, len(data), 0), remote=_Bytes(data))


def _pickle(raw: bytes) -> object:
    def locate(key: str, nbytes: int) -> int:
        return 0

    return interpret(io.BytesIO(raw), _file(bytes(64)), locate)


# --- seeds ----------------------------------------------------------------------------------------------------------------


def _small(*endings: str) -> Sequence[bytes]:
    """The smallest golden files."""
    sizes = sorted((next(iter(seed.files.values())) for seed in golden_files(*endings)), key=len)
    return sizes[:4]


def _objects() -> Sequence[bytes]:
    return [
        b'{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9"}, "d": []}',
        b'{"weight_map": {"a": "b.safetensors"}}',
        b"{}",
    ]


def _safetensors() -> Sequence[bytes]:
    tensors = {"a.lora_A.weight": numpy.ones((1, 2)), "b": numpy.ones(()), "c": numpy.zeros((0, 3))}
    return [safetensors_bytes(tensors, {"format": "pt"}), safetensors_bytes({"a": numpy.ones(1)})]


def _arrays() -> Sequence[bytes]:
    made = []
    for kind, shape in (("<f4", (2, 3)), ("<f2", (4,)), ("<i8", ()), ("|u1", (0, 2))):
        buffer = io.BytesIO()
        numpy.save(buffer, numpy.zeros(shape, kind))
        made.append(buffer.getvalue())
    return made


def _archives() -> Sequence[bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/data.pkl", "a/data/0", "a/version"):
            archive.writestr(zipfile.ZipInfo(name), b"0123")
    return [buffer.getvalue()]


def _tars() -> Sequence[bytes]:
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name in ("./a.yaml", "b" * (20 if form == tarfile.USTAR_FORMAT else 120)):
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"0123"))
        made.append(buffer.getvalue()[:6144])
    return made


def _ggufs() -> Sequence[bytes]:
    entries: list[Any] = [("general.architecture", text("llama")), ("split.no", u32(0))]
    return [RawGguf(entries, {"a.weight": GgufTensor(F32, (2, 3), bytes(24))}).data()]


def _pickles() -> Sequence[bytes]:
    """The pickles of torch's archives, without their memory of what is used once."""
    found = []
    for raw in _small(".pt", ".bin", ".ckpt", ".pth"):
        if zipfile.is_zipfile(io.BytesIO(raw)):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                found.append(pickletools.optimize(archive.read(name)))
    return sorted(found, key=len)[:3]


def _lines() -> Sequence[bytes]:
    record = {"xxh3": "0" * 32, "sha256": "0" * 64}
    return [json.dumps({"plan": "p", "name": "model.safetensors", "size": 8, "record": record}).encode()]


def _contracts() -> Sequence[bytes]:
    import onnx

    props = onnx.load_model_from_string(world()["swap"]["model.onnx"]).metadata_props
    return [entry.value.encode() for entry in props if entry.key == "surgery.contract"]
