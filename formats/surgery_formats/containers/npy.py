# SPDX-License-Identifier: Apache-2.0
r"""Numpy's ``.npy`` arrays (NEP 1), alone or inside a larger file, as byte ranges.

An array is ``\x93NUMPY``, a version, the length of its header, a Python literal with type, order and sizes, and the numbers. The
literal is matched, not evaluated, and arrays of objects, which are pickles, are refused.
"""

from __future__ import annotations

import math
import re
import struct

from surgery_formats.containers.base import MAX_DIMS, is_size
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["MAGIC", "npy_array", "npy_header"]

MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 1 << 16
_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}  # of the header, by the format's version
_ALIGNMENT = 64  # of the numbers, as numpy writes them
_LABELS: dict[str, DType] = {
    "<f8": DType.F64,
    "<f4": DType.F32,
    "<f2": DType.F16,
    "<V2": DType.BF16,  # numpy has no bfloat16: ml_dtypes and TensorRT-LLM have two bytes in its place
    "|V2": DType.BF16,
    "<i8": DType.I64,
    "<i4": DType.I32,
    "|i1": DType.I8,
    "|u1": DType.U8,
    "|b1": DType.BOOL,
}
_WRITTEN = {dtype: label for label, dtype in _LABELS.items()}
_HEADER = re.compile(
    r"\{'descr': '(?P<type>[^'\\]{2,8})', 'fortran_order': (?P<order>False|True), 'shape': "
    r"\((?P<sizes>(?:\d{1,19}(?:, |,?(?=\)))){0,64})\),? ?\} *\n"
)


def npy_array(file: File, name: str, begin: int = 0, nbytes: int | None = None) -> StoredTensor:
    """The array in ``file[begin : begin + nbytes]``, which it has to fill.

    Raises:
        MalformedError: no array of numbers in C order, or one that does not fill its bytes.
    """

    def fail(what: str) -> MalformedError:
        return MalformedError(what, file=file.path, tensor=name)

    end = file.size if nbytes is None else begin + nbytes
    if end - begin < len(MAGIC) + 4 or bytes(file.read(begin, len(MAGIC))) != MAGIC:
        raise fail("not an array of numpy's")
    form = _LENGTHS.get(bytes(file.read(begin + 6, 2)))
    if form is None:
        raise fail(f"an array of an unknown version of the format, {'.'.join(map(str, file.read(begin + 6, 2)))}")
    first = begin + 8 + struct.calcsize(form)
    (length,) = struct.unpack(form, file.read(begin + 8, struct.calcsize(form))) if first <= end else (end,)
    if length > min(_HEADER_LIMIT, end - first):
        raise fail("its header is longer than the array")
    header = _HEADER.fullmatch(file.read(first, length).decode("latin-1"))
    if header is None:
        raise fail("its header is not that of an array of numbers")
    if (dtype := _LABELS.get(header["type"])) is None:
        raise fail(f"holds values of the type {show(header['type'], 20)}, not numbers that are read")
    sizes = tuple(int(size) for size in re.findall(r"\d+", header["sizes"]))
    if header["order"] == "True" and sum(size != 1 for size in sizes) > 1:  # MLX says so of a row or a column
        raise fail("its columns lie one after the other (fortran_order)")
    if len(sizes) > MAX_DIMS or not all(map(is_size, sizes)) or dtype.nbytes(math.prod(sizes)) != end - first - length:
        raise fail(f"has {end - first - length} bytes for the sizes {list(sizes)}")
    return StoredTensor(name, dtype, sizes, file, first + length, end - first - length)


def npy_header(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers of an array."""
    sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{_WRITTEN[dtype]}', 'fortran_order': False, 'shape': ({sizes}), }}".encode()
    start = len(MAGIC) + 4
    text += b" " * (-(start + len(text) + 1) % _ALIGNMENT) + b"\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text
