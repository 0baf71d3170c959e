# SPDX-License-Identifier: Apache-2.0
"""A writer of GGUF that shares nothing with the product: the format as its specification has it."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["F16", "F32", "Q8_0", "GgufTensor", "RawGguf", "text", "u32"]

F32, F16, Q8_0 = 0, 1, 8


@dataclass
class GgufTensor:
    """A tensor: its type's number, sizes as numpy has them, and bytes; `offset` in place of the right one."""

    type: int
    sizes: tuple[int, ...]
    data: bytes
    offset: int | None = None


@dataclass
class RawGguf:
    """A file in parts, any of which may be wrong.

    `entries` are pairs of a key and the bytes of a type and a value, see `u32` and `text`.
    """

    entries: Sequence[tuple[str, bytes]] = ()
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    alignment: int = 32
    counts: tuple[int, int] | None = None
    names: Sequence[bytes] | None = None
    padded: bool = True  # behind the last tensor, which llama.cpp does, and does not insist on

    def header(self) -> bytes:
        """Everything before the data."""
        counts = self.counts or (len(self.tensors), len(self.entries))
        out = self.magic + self.version + struct.pack("<QQ", *counts)
        for key, value in self.entries:
            out += struct.pack("<Q", len(key.encode())) + key.encode() + value
        at = 0
        names = self.names or [name.encode() for name in self.tensors]
        for name, tensor in zip(names, self.tensors.values(), strict=True):
            out += struct.pack("<Q", len(name)) + name
            out += struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes[::-1])
            out += struct.pack("<IQ", tensor.type, at if tensor.offset is None else tensor.offset)
            at += -(-len(tensor.data) // self.alignment) * self.alignment
        return out + bytes(-len(out) % self.alignment)

    def data(self) -> bytes:
        """Header and data."""
        out = self.header()
        for tensor in self.tensors.values():
            out += tensor.data + bytes(-len(tensor.data) % self.alignment)
        last = next(reversed(self.tensors.values()), None)
        return out if self.padded or last is None else out[: len(out) - -len(last.data) % self.alignment]

    def write(self, path: Path) -> Path:
        """The file."""
        path.write_bytes(self.data())
        return path


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<IQ", 8, len(raw)) + raw


def array(item: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IIQ", 9, item, count) + data


def any_value(type_: int, data: Any) -> bytes:
    return struct.pack("<I", type_) + data
