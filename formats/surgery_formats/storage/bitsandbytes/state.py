# SPDX-License-Identifier: Apache-2.0
"""``X.quant_state.bitsandbytes__nf4``: JSON in a tensor of bytes, with what the other tensors do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["Nesting", "QuantState", "read_state"]

_LIMIT = 1 << 16
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LARGEST = 3e38
_DTYPES = {str(dtype.torch_name): dtype for dtype in (DType.F32, DType.F16, DType.BF16)}


@dataclass(frozen=True, slots=True)
class Nesting:
    """How the scales are themselves stored as codes.

    Attributes:
        size: Scales of a block.
        offset: Added to every scale.
        dtype: In which scales are computed.
    """

    size: int
    offset: float
    dtype: DType


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the JSON says.

    Attributes:
        sizes: Shape of the weight.
        size: Elements of a block.
        nesting: None where scales are stored as they are.
    """

    sizes: tuple[int, ...]
    size: int
    nesting: Nesting | None


def read_state(tensor: StoredTensor, quant_type: str) -> QuantState:
    """The state in `tensor`.

    Raises:
        MalformedError: not what bitsandbytes writes.
    """

    def fail(what: str) -> NoReturn:
        raise MalformedError(what, file=tensor.path, tensor=tensor.name)

    if tensor.dtype is not DType.U8 or len(tensor.shape) != 1 or not 0 < tensor.nbytes <= _LIMIT:
        fail(f"is {tensor.dtype.label} {list(tensor.shape)}, not the bytes of a quantisation state")
    try:
        fields = parse_object(tensor.read().tobytes(), file=tensor.path)
    except MalformedError as error:
        fail(error.message)
    if fields.get("quant_type") != quant_type:
        fail(f"its quant_type is '{show(fields.get('quant_type'))}', not '{quant_type}'")
    size, sizes = fields.get("blocksize"), fields.get("shape")
    if type(size) is not int or size not in _BLOCKS:
        fail(f"a blocksize of '{show(size)}': bitsandbytes has {', '.join(map(str, _BLOCKS))}")
    if not isinstance(sizes, list) or not sizes or not all(type(each) is int and 0 < each < 1 << 40 for each in sizes):
        fail(f"its shape is '{show(sizes)}'")
    if (dtype := fields.get("dtype")) not in list(_DTYPES):
        fail(f"a dtype of '{show(dtype)}': bitsandbytes has {', '.join(_DTYPES)}")
    nesting = None
    if any(key.startswith("nested_") for key in fields):
        nesting = _nesting(fields, fail)
    return QuantState(tuple(sizes), size, nesting)


def _nesting(fields: dict[str, Any], fail: Callable[[str], NoReturn]) -> Nesting:
    size, offset, dtype = (fields.get(f"nested_{key}") for key in ("blocksize", "offset", "dtype"))
    if not isinstance(size, int) or not 0 < size <= 1 << 20:
        fail(f"a nested_blocksize of '{show(size)}'")
    if not isinstance(offset, int | float) or not abs(offset) < _LARGEST:
        fail(f"a nested_offset of '{show(offset)}'")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        fail(f"a nested_dtype of '{show(dtype)}': bitsandbytes has {', '.join(_DTYPES)}")
    return Nesting(size, float(offset), _DTYPES[dtype])
