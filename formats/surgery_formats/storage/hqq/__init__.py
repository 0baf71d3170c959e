# SPDX-License-Identifier: Apache-2.0
"""HQQ: ``X.W_q`` with scales, zero points and a tensor for every setting, as ``HQQLinear.state_dict`` writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.hqq.weight import PACKINGS, WEIGHT, HQQWeight
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["HQQ"]

_CODES = ".W_q"
_NEEDED = ("scale", "zero", "nbits", "group_size", "shape", "axis", "packing")
_OTHER = (
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
_FLOATS = (DType.F16, DType.BF16, DType.F32)
_NBITS = {"8bit_u8": (8, 6, 5), "4bit_u8": (4,), "3bit_32": (3,), "2bit_u8": (2, 1.58), "1bit_u8": (1,)}


class _HQQ:
    name = "hqq"
    title = "HQQ: 1 to 8 bits, groups along either axis"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind`."""
        for name, tensor in tensors.items():
            if name.endswith(_CODES):
                yield _weight(name.removesuffix(_CODES), tensor, tensors)


HQQ = _HQQ()


def _weight(stem: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> HQQWeight:
    found = {key: tensors[f"{stem}.{key}"] for key in (*_NEEDED, *_OTHER) if f"{stem}.{key}" in tensors}
    if missing := next((key for key in _NEEDED if key not in found), None):
        raise MalformedError(f"there is no '{stem}.{missing}' beside it", file=codes.path, tensor=codes.name)
    for key in ("quant_scale", "quant_zero"):
        if key in found and _number(found[key]):
            what = f"says that {key.removeprefix('quant_')}s are themselves quantised, which HQQ no longer writes"
            raise FitError(what, file=found[key].path, tensor=found[key].name)
    packing, nbits = _text(found["packing"]), _number(found["nbits"])
    if packing not in PACKINGS or not any(math.isclose(nbits, each, rel_tol=1e-6) for each in _NBITS[packing]):
        what = f"'{show(packing)}' is no packing of {nbits:g} bits"
        raise MalformedError(what, file=codes.path, tensor=found["packing"].name)
    axis, size = _number(found["axis"]), _number(found["group_size"])
    shape = tuple(int(each) for each in _vector(found["shape"]))
    count = math.prod(shape)
    if len(shape) != 2 or min(shape) < 1 or axis not in (0, 1) or size < 1 or size % 1 or count % int(size):
        what = f"groups of {size:g} along axis {axis:g} of a weight of {list(shape)}"
        raise MalformedError(what, file=codes.path, tensor=codes.name)
    settings = tuple(tensor for key, tensor in found.items() if key not in ("scale", "zero"))
    largest = round(2**nbits - 1)
    kind = PACKINGS[packing]
    weight = HQQWeight(
        stem + WEIGHT, shape, int(axis), int(size), kind, largest, codes, found["scale"], found["zero"], settings
    )
    groups = count // int(size)
    for tensor in (weight.scale, weight.zero):
        if tensor.dtype not in _FLOATS or tensor.numel != groups:
            what = f"is {tensor.dtype.label} {list(tensor.shape)}, where the weight has {groups} groups"
            raise MalformedError(what, file=tensor.path, tensor=tensor.name)
    if codes.dtype.bits % 8 or codes.nbytes != weight.words * kind.width:
        what = f"has {codes.nbytes} bytes of codes, for {list(shape)} in {packing}"
        raise MalformedError(what, file=codes.path, tensor=codes.name)
    return weight


def _vector(tensor: StoredTensor) -> list[float]:
    """The few numbers of a setting."""
    if tensor.nbytes > 64 or tensor.dtype not in (DType.U8, DType.I32, DType.I64, DType.F32):
        what = f"is {tensor.dtype.label} {list(tensor.shape)}, not a setting of HQQ"
        raise MalformedError(what, file=tensor.path, tensor=tensor.name)
    return [float(each) for each in tensor.read().reshape(-1)]


def _number(tensor: StoredTensor) -> float:
    numbers = _vector(tensor)
    if len(numbers) != 1 or not math.isfinite(numbers[0]):
        raise MalformedError("is not one number", file=tensor.path, tensor=tensor.name)
    return numbers[0]


def _text(tensor: StoredTensor) -> str:
    return "".join(chr(int(each)) for each in _vector(tensor) if 0 <= each < 128)
