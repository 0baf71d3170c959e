# SPDX-License-Identifier: Apache-2.0
"""Arrays: numpy's on the CPU, torch's on a GPU, one set of names for both.

Equations are written once, against the array API standard (https://data-apis.org/array-api/2024.12): they take the
functions they call from `namespace` of their arguments. Importing torch takes a second, and several with CUDA, so only
a device other than the CPU imports it. numpy has no bfloat16; ``ml_dtypes`` adds that type and its conversions, which
round to nearest even like torch's.

Array API functions return new arrays. Where memory is the cost (blocks of a weight), operators that assign
(``block += delta``, ``block[...] = values``) work in place in both libraries.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = [
    "Array",
    "all_finite",
    "array_of",
    "as_torch",
    "assign",
    "cast",
    "device_of",
    "dtype_of",
    "empty",
    "energy",
    "inner",
    "is_torch",
    "namespace",
    "same_memory",
    "to_cpu",
    "to_device",
    "wide",
]

Array: TypeAlias = Any
"""A ``numpy.ndarray`` or a ``torch.Tensor``. No static type describes both; docstrings give shape and element type."""


def is_torch(array: Array) -> bool:
    """Whether `array` is a torch tensor; asking does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def namespace(*arrays: Array) -> Any:
    """The array API functions for `arrays`, which all belong to one library."""
    if any(is_torch(array) for array in arrays):
        import array_api_compat

        return array_api_compat.array_namespace(*arrays)
    import numpy  # from version 2 on its own namespace follows the standard

    return numpy


def device_of(array: Array) -> str:
    """``cpu``, ``cuda:0`` ...: where `array` is, and where arithmetic with it runs."""
    return str(array.device) if is_torch(array) else "cpu"


def dtype_of(array: Array) -> DType:
    """Element type of `array`.

    Raises:
        TypeError: safetensors has no such type.
    """
    return DType.of(array.dtype)


def empty(shape: tuple[int, ...], dtype: DType, device: str = "cpu") -> Array:
    """An array whose values are yet to be written."""
    if device == "cpu":
        import numpy

        return numpy.empty(shape, dtype.numpy)
    import torch

    return torch.empty(shape, dtype=dtype.torch, device=device)


def array_of(values: Any, dtype: DType, like: Array) -> Array:
    """Python numbers, or an array, as an array of the library, and on the device, of `like`."""
    if not is_torch(like):
        import numpy

        return numpy.asarray(values, dtype.numpy)
    import torch

    return torch.as_tensor(values, dtype=dtype.torch, device=like.device)


def cast(array: Array, dtype: DType) -> Array:
    """`array` with elements of `dtype`, rounded to nearest even; `array` itself if they are."""
    if is_torch(array):
        return array.to(dtype.torch)
    if array.dtype == dtype.numpy:
        return array
    import numpy

    values = numpy.empty_like(array, dtype=dtype.numpy)
    assign(values, array)
    return values


def assign(target: Array, values: Array) -> None:
    """Write `values` into `target`, of the same shape, rounded to its type to nearest even; devices may differ."""
    if is_torch(target):
        # narrow values cross to the device as they are, and are widened there
        target.copy_(values if is_torch(values) else as_torch(values).to(target.device))
        return
    if is_torch(values):
        as_torch(target).copy_(values)
        return
    import numpy

    from surgery_formats.halves import narrow, widen

    types = (values.dtype, target.dtype) if target.flags.c_contiguous else None
    with numpy.errstate(over="ignore", invalid="ignore"):  # callers look for Inf and NaN themselves
        if types == (numpy.float16, numpy.float32):
            widen(values.ravel(), target.reshape(-1))
        elif types == (numpy.float32, numpy.float16):
            narrow(values.ravel(), target.reshape(-1))
        else:
            numpy.copyto(target, values, casting="unsafe")


_INFINITIES = {DType.F16: 0x7C00, DType.BF16: 0x7F80}
"""The bits of Inf in types of two bytes."""


def all_finite(array: Array) -> bool:
    """Whether no value is NaN or Inf. A finite sum of squares proves it, many times faster than testing each value."""
    dtype = dtype_of(array)
    if not dtype.is_float_or_fp8:
        return True
    if dtype in _INFINITIES and not is_torch(array) and array.flags.c_contiguous:
        from surgery_formats.halves import are_finite

        return are_finite(array.reshape(-1), _INFINITIES[dtype])
    values = cast(array, wide(dtype))
    return math.isfinite(energy(values)) or bool(namespace(values).isfinite(values).all())


def energy(array: Array) -> float:
    """Sum of squares, in the type of `array`: one fast pass. If it is finite, no value is greater than its root."""
    return inner(array, array)


def inner(left: Array, right: Array) -> float:
    """Sum of products of two arrays of one shape and type, in that type."""
    left, right = left.reshape(-1), right.reshape(-1)
    if is_torch(left):
        return float(left @ right)
    import numpy

    return float(numpy.vdot(left, right))  # unlike ``@``, it lets other threads run; unlike `dot`, it warns of no Inf


def wide(dtype: DType) -> DType:
    """The type that arithmetic with values of `dtype` runs in: float64 for float64, else float32."""
    return DType.F64 if dtype is DType.F64 else DType.F32


def to_device(array: Array, device: str, dtype: DType | None = None) -> Array:
    """`array` on `device`, with elements of `dtype` if given; shares memory where nothing changes.

    A narrow type crosses to the device as it is and is widened there.
    """
    if device == "cpu":
        values: Array = to_cpu(array)
    else:
        values = (array if is_torch(array) else as_torch(array)).to(device)
    return values if dtype is None else cast(values, dtype)


def to_cpu(array: Array) -> numpy.ndarray:
    """`array` as numpy has it; shares memory with arrays that are on the CPU."""
    values: numpy.ndarray = array
    if is_torch(array):
        import torch

        tensor: torch.Tensor = array.detach().cpu()
        dtype = DType.of(tensor.dtype)
        if dtype.numpy_is_native:
            values = tensor.numpy()
        else:
            bits = {8: torch.uint8, 16: torch.int16}[dtype.bits]
            values = tensor.view(bits).numpy().view(dtype.numpy)
    return values


def as_torch(array: numpy.ndarray) -> torch.Tensor:
    """A torch tensor on the CPU that shares the memory of `array`."""
    import torch

    dtype = DType.of(array.dtype)
    if dtype.numpy_is_native:
        return torch.from_numpy(array)
    bits = {8: "u1", 16: "i2"}[dtype.bits]
    return torch.from_numpy(array.view(bits)).view(dtype.torch)


def same_memory(first: Array, second: Array) -> bool:
    """Whether both begin at the same element in memory."""
    if is_torch(first):
        return bool(first.data_ptr() == second.data_ptr())
    return bool(first.ctypes.data == second.ctypes.data)
