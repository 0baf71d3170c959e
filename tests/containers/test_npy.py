# SPDX-License-Identifier: Apache-2.0
"""Numpy's arrays: what numpy writes is found, headers are numpy's, and pickles, columns and damage are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib import format as npy

from surgery_formats.containers.npy import npy_array, npy_header
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor

TYPES = {
    DType.F64: "<f8",
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.I64: "<i8",
    DType.I32: "<i4",
    DType.I8: "|i1",
    DType.U8: "|u1",
    DType.BOOL: "|b1",
}
SHAPES = [(), (0,), (7,), (1, 3), (2, 3, 5)]


def saved(values: Any, version: tuple[int, int] | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    npy.write_array(stream, np.asanyarray(values), version, **options)
    return stream.getvalue()


def found(path: Path, content: bytes, begin: int = 0, nbytes: int | None = None) -> StoredTensor:
    path.write_bytes(content)
    return npy_array(open_file(path), "x", begin, nbytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.label)
def test_what_numpy_writes_is_found_and_its_header_is_ours(
    dtype: DType, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(TYPES[dtype])
    content = saved(values)
    tensor = found(tmp_path / "a.npy", b"12345" + content + b"6", 5, len(content))
    assert (tensor.dtype, tensor.shape) == (dtype, shape)
    assert np.array_equal(tensor.read(), values)
    assert content == npy_header(dtype, shape) + values.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_is_read(version: tuple[int, int], tmp_path: Path) -> None:
    assert found(tmp_path / "a.npy", saved(np.ones((2, 3)), version)).shape == (2, 3)


def test_two_opaque_bytes_are_a_bfloat16(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5], ml_dtypes.bfloat16)
    tensor = found(tmp_path / "a.npy", saved(values))
    assert tensor.dtype is DType.BF16
    assert np.array_equal(np.asarray(tensor.read()).view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x93NUMPY", "not an array of numpy's"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 100, "header is longer"),
        (b"\x93NUMPY\x09\x00\x10\x00" + b" " * 100, "unknown version"),
        (b"\x93NUMPY\x01\x80\x10\x00" + b" " * 100, "unknown version of the format, 1.128"),
        (b"\x93NUMPY\x01\x00\x14\x00" + b"{'descr': __import__" + b" " * 8, "not that of an array of numbers"),
        (saved(np.array([{"a": 1}], object), allow_pickle=True), "not numbers that are read"),
        (saved(np.zeros(4, [("a", "<f4")])), "not that of an array of numbers"),
        (saved(np.zeros(4, ">f4")), "not numbers that are read"),
        (saved(np.asfortranarray(np.zeros((2, 64)))), "fortran_order"),
        (saved(np.zeros(4)) + b"0", "has 33 bytes for the sizes"),
        (saved(np.zeros(4))[:-1], "has 31 bytes for the sizes"),
    ],
)
def test_what_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=said):
        found(tmp_path / "a.npy", content)


def test_an_array_cut_short_is_never_read(tmp_path: Path) -> None:
    whole = saved(np.ones((2, 3), np.float32))
    for size in range(len(whole)):
        with pytest.raises(MalformedError):
            found(tmp_path / "a.npy", whole[:size])
