# SPDX-License-Identifier: Apache-2.0
"""Pickles of torch written by hand, opcode by opcode."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from surgery_formats.containers.torch.pickle_file import read_torch
from surgery_formats.files.raw import open_file

__all__ = ["TENSOR", "Write", "long", "open_torch", "tensor"]

Write = Callable[..., Path]
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def open_torch(path: Path) -> object:
    """The object in the torch checkpoint at `path`."""
    return read_torch(open_file(path))


def tensor(
    offset: int = 0,
    size: bytes = b"K\x02\x85",
    stride: bytes = b"K\x01\x85",
    *,
    numel: int = 2,
    kind: bytes = b"ctorch\nFloatStorage\n",
    pid: bytes | None = None,
    tail: bytes = b"\x89)",
) -> bytes:
    """The opcodes of a float tensor of two elements in storage 0, with faults."""
    pid = pid or b"(X\x07\0\0\0storage" + kind + b"X\x01\0\0\x000X\x03\0\0\0cpu" + long(numel) + b"tQ"
    return TENSOR + b"(" + pid + long(offset) + size + stride + tail + b"tR"


def long(value: int) -> bytes:
    """The opcode LONG1 and its number."""
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw
