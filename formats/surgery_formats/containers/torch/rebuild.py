# SPDX-License-Identifier: Apache-2.0
"""Find the bytes of a tensor that a torch pickle describes; every number is checked.

Sources: ``torch._utils._rebuild_tensor_v2`` and ``_rebuild_tensor_v3`` (their arguments),
    ``torch.serialization`` (persistent ids).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery_formats.containers.base import MAX_DIMS, SIZE_LIMIT, is_size
from surgery_formats.dtypes import DType
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["DTYPES", "STORAGES", "UNTYPED", "PickledStorage", "are_sizes", "rebuild"]

STORAGES = {
    "torch.DoubleStorage": DType.F64,
    "torch.FloatStorage": DType.F32,
    "torch.HalfStorage": DType.F16,
    "torch.BFloat16Storage": DType.BF16,
    "torch.LongStorage": DType.I64,
    "torch.IntStorage": DType.I32,
    "torch.ShortStorage": DType.I16,
    "torch.CharStorage": DType.I8,
    "torch.ByteStorage": DType.U8,
    "torch.BoolStorage": DType.BOOL,
    "torch.ComplexFloatStorage": DType.C64,
}
UNTYPED = frozenset(("torch.storage.UntypedStorage", "torch.UntypedStorage"))
DTYPES = {f"torch.{dtype.torch_name}": dtype for dtype in DType if dtype.torch_name}

# An expanded tensor (stride 0) of a few bytes may claim any size. It may grow to this, or to the size of its
# storage.
_SPREAD_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """The bytes that a persistent id names; `dtype` is None for an untyped storage."""

    key: str
    dtype: DType | None
    offset: int
    nbytes: int


def are_sizes(value: Any) -> bool:
    """Whether `value` is a tuple of sizes, of at most as many as a tensor has axes."""
    return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(is_size(n) for n in value)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the order is C. The stride of an axis of size 1 is never used, and an empty tensor has no order."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def rebuild(args: tuple[Any, ...], *, v3: bool, file: File) -> StoredTensor | str:
    """Return the tensor that ``_rebuild_tensor_v2(*args)`` (or ``_v3``) describes, or what is wrong with it.

    Args:
        args: ``(storage, offset, size, stride, requires_grad, hooks, [dtype in v3], [metadata])``; in
            elements.
        v3: Whether the storage is untyped and the dtype among the arguments.
        file: Where the storage lies.
    """
    fixed = 7 if v3 else 6
    if len(args) not in (fixed, fixed + 1) or not isinstance(args[0], PickledStorage):
        return "a tensor without a storage"
    storage, first, shape, strides = args[:4]
    if any(args[fixed:]):
        return "a tensor with a pending conjugation or negation"
    dtype = args[6] if v3 else storage.dtype
    if not isinstance(dtype, DType) or (v3 and storage.dtype is not None):
        return "a tensor without an element type"
    if not (is_size(first) and are_sizes(shape) and are_sizes(strides) and len(shape) == len(strides)):
        return "a tensor with an invalid offset, size or stride"
    item = dtype.bits // 8
    numel = 1
    for size in shape:
        numel *= size
        if numel * item >= SIZE_LIMIT:
            return "a tensor whose size overflows"
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if numel else 0
    if (first + span) * item > storage.nbytes:
        return f"a tensor reaches beyond its storage '{show(storage.key)}'"
    if numel * item > max(_SPREAD_LIMIT, storage.nbytes):
        return f"a tensor of {numel} elements in a storage of {storage.nbytes} bytes"
    start = storage.offset + (first * item if span else 0)
    stored = None if _contiguous(shape, strides) else strides
    return StoredTensor(f"storage {storage.key}", dtype, shape, file, start, span * item, stored)
