# SPDX-License-Identifier: Apache-2.0
"""Bytes that lie: safetensors headers that contradict the file, and pickles that run code when they are loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["LIES", "MARKER", "PICKLES"]

MARKER = "EXECUTED"  # the file that a pickle creates, in the folder that holds the adapter's, when someone runs it
Header = dict[str, Any]


def _parts(data: bytes) -> tuple[Header, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(header: str, body: bytes) -> bytes:
    raw = header.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


def _lie(change: Callable[[Header, list[str]], Any]) -> Callable[[bytes], bytes]:
    """Change the header (tensor names in file order are given) and leave the rest."""

    def lie(data: bytes) -> bytes:
        header, body = _parts(data)
        names = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        change(header, names)
        return _join(json.dumps(header), body)

    return lie


def _move(index: int, begin: int, end: int) -> Callable[[Header, list[str]], None]:
    def change(header: Header, names: list[str]) -> None:
        offsets = header[names[index]]["data_offsets"]
        header[names[index]]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


def _set(index: int, **fields: Any) -> Callable[[Header, list[str]], None]:
    return lambda header, names: header[names[index]].update(fields)


def _duplicate(data: bytes) -> bytes:
    header, body = _parts(data)
    text = json.dumps(header)
    name = next(k for k in header if k != "__metadata__")
    return _join(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}", body)


def _hole(header: Header, names: list[str]) -> None:
    del header[names[1]]


LIES: dict[str, Callable[[bytes], bytes]] = {
    "overlap": _lie(_move(1, -4, -4)),
    "hole": _lie(_hole),
    "duplicate-name": _duplicate,
    "past-the-end": _lie(_move(-1, 1 << 20, 1 << 20)),
    "offsets-backwards": _lie(lambda h, n: h[n[0]]["data_offsets"].reverse()),
    "offset-negative": _lie(_set(0, data_offsets=[-8, 8])),
    "offset-2-to-63": _lie(_set(-1, data_offsets=[2**63, 2**63 + 8])),
    "offset-is-a-float": _lie(_set(0, data_offsets=[0.0, 512.5])),
    "shape-2-to-62": _lie(_set(0, shape=[2**62, 2**62])),
    "shape-overflows-to-zero": _lie(_set(0, shape=[2**32, 2**32])),
    "shape-negative": _lie(_set(0, shape=[-4, -32])),
    "shape-is-a-bool": _lie(_set(0, shape=[True, 128])),
    "shape-too-small": _lie(_set(0, shape=[1])),
    "dtype-unknown": _lie(_set(0, dtype="F12")),
    "dtype-narrower": _lie(_set(0, dtype="F16")),
    "entry-is-a-list": _lie(lambda h, n: h.update({n[0]: []})),
    "is-a-list": lambda data: _join("[]", b""),
    "is-no-json": lambda data: _join("{not json}", b""),
    "is-nested-deep": lambda data: _join('{"a":' * 100_000, b""),
    "longer-than-the-file": lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
    "length-2-to-63": lambda data: struct.pack("<Q", 2**63 + 8) + data[8:],
}


class _Evil:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def _zip(path: Path, marker: Path) -> None:
    torch.save(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32), "x": _Evil(marker)}, path
    )


def _raw(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil(marker)))


def _hidden(path: Path, marker: Path) -> None:
    """Sound tensors, with the call in a value that is thrown away again at once."""
    buffer = io.BytesIO()
    torch.save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                call = pickle.dumps(_Evil(marker), protocol=2)[2:-1]  # without its PROTO and STOP
                data = data[:2] + call + pickle.POP + data[2:]
            new.writestr(item, data)


PICKLES: dict[str, Callable[[Path, Path], None]] = {"zip": _zip, "raw": _raw, "hidden-call": _hidden}
