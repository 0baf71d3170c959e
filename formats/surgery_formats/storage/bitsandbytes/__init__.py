# SPDX-License-Identifier: Apache-2.0
"""Weights as bitsandbytes stores them, and transformers with it: NF4 and FP4 in blocks, int8 in rows.

Read from bitsandbytes 0.50.2; the names have been the same since 0.41.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.bitsandbytes.absmax import AbsMax, FloatAbsMax, NestedAbsMax
from surgery_formats.storage.bitsandbytes.four_bit import FourBit
from surgery_formats.storage.bitsandbytes.int8 import FORMAT, SCALES, Int8, tiles_of
from surgery_formats.storage.bitsandbytes.state import QuantState, read_state
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["BITSANDBYTES"]

_STATE, _LEVELS = ".quant_state.bitsandbytes__", ".quant_map"
_TYPES = ("nf4", "fp4")
_STORAGES = (DType.U8, DType.I8, DType.BF16, DType.F16, DType.F32)


class _BitsAndBytes:
    name = "bitsandbytes"
    title = "bitsandbytes: NF4, FP4 (plain and nested scales) and LLM.int8"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind`; int8 in tiles is left alone."""
        named = quantisation_of(config).get("quant_method") == self.name
        for name, tensor in tensors.items():
            if name.endswith(_LEVELS):
                yield _four_bit(name.removesuffix(_LEVELS), tensor, tensors)
            elif name.endswith(SCALES):
                stem = name.removesuffix(SCALES)
                if (mark := tensors.get(stem + FORMAT)) is None or not tiles_of(mark):
                    yield _int8(stem, tensor, mark, tensors)
            elif named and tensor.dtype is DType.I8 and name.endswith(".weight"):
                _needed(name.removesuffix(".weight") + SCALES, tensor, tensors)
            elif _STATE in name:
                _needed(name.partition(_STATE)[0] + _LEVELS, tensor, tensors)


BITSANDBYTES = _BitsAndBytes()


def _needed(name: str, beside: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    if name in tensors:
        return tensors[name]
    raise MalformedError(f"there is no '{name}' beside it", file=beside.path, tensor=beside.name)


def _check(tensor: StoredTensor, dtype: DType, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape:
        found, wanted = f"{tensor.dtype.label} {list(tensor.shape)}", f"{dtype.label} {list(shape)}"
        raise MalformedError(f"is {found} where bitsandbytes has {wanted}", file=tensor.path, tensor=tensor.name)


def _four_bit(name: str, levels: StoredTensor, tensors: Mapping[str, StoredTensor]) -> FourBit:
    states = [kind for kind in _TYPES if name + _STATE + kind in tensors]
    if len(states) != 1:
        what = "both an NF4 and an FP4 state" if states else f"no '{name}{_STATE}nf4' (or fp4)"
        raise MalformedError(f"there is {what} beside it", file=levels.path, tensor=levels.name)
    quant_type = states[0]
    stored = tensors[name + _STATE + quant_type]
    state = read_state(stored, quant_type)
    codes = _needed(name, levels, tensors)
    count = math.prod(state.sizes)
    if codes.dtype not in _STORAGES or codes.shape not in ((codes.numel, 1), (codes.numel,)):
        what = f"is {codes.dtype.label} {list(codes.shape)}, not a column of packed codes"
        raise MalformedError(what, file=codes.path, tensor=codes.name)
    if codes.nbytes != -(-count // 2):
        what = f"has {codes.nbytes} bytes of codes, for {list(state.sizes)} of 4 bits"
        raise MalformedError(what, file=codes.path, tensor=codes.name)
    _check(levels, DType.F32, (16,))
    absmax = _absmax(name, -(-count // state.size), state, levels, tensors)
    return FourBit(name, quant_type, state.sizes, state.size, codes, absmax, levels, stored)


def _absmax(
    name: str, blocks: int, state: QuantState, levels: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> AbsMax:
    scales = _needed(f"{name}.absmax", levels, tensors)
    if state.nesting is None:
        if scales.dtype is DType.BF16 and len(scales.shape) == 2 and scales.numel == blocks:
            raise FitError(
                f"is BF16 {list(scales.shape)}: bitsandbytes saved the scales turned round after it computed on a CPU, "
                "and does not turn them back when it loads them",
                file=scales.path,
                tensor=scales.name,
                hint="save the model again before running it",
            )
        _check(scales, DType.F32, (blocks,))
        return FloatAbsMax(scales)
    _check(scales, DType.U8, (blocks,))
    second = _needed(f"{name}.nested_absmax", levels, tensors)
    _check(second, DType.F32, (-(-blocks // state.nesting.size),))
    table = _needed(f"{name}.nested_quant_map", levels, tensors)
    _check(table, DType.F32, (256,))
    return NestedAbsMax(scales, second, table, state.nesting)


def _int8(stem: str, scales: StoredTensor, mark: StoredTensor | None, tensors: Mapping[str, StoredTensor]) -> Int8:
    codes = _needed(f"{stem}.weight", scales, tensors)
    if codes.dtype is not DType.I8 or len(codes.shape) != 2 or 0 in codes.shape:
        what = f"is {codes.dtype.label} {list(codes.shape)}, not a matrix of int8, though it has an SCB"
        raise MalformedError(what, file=codes.path, tensor=codes.name)
    _check(scales, DType.F32, codes.shape[:1])
    return Int8(codes.name, codes, scales, mark)
