# SPDX-License-Identifier: Apache-2.0
"""AWQ as autoawq, llm-compressor's predecessor and auto-round save it: X.qweight, X.qzeros and X.scales.

Codes have 4 bits and a value is ``(code - zero) * scale``. There are two layouts, which shapes tell apart (autoawq's
`version`): `gemm` packs along the outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7; `gemv` along the inputs, in order, and
fills the groups' scales and zero points up to a width that its kernel likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.fitting import fit_awq
from surgery_formats.storage.grouped_columns import GroupedColumns
from surgery_formats.storage.grouped_rows import GroupedRows, Packing
from surgery_formats.storage.module_tensors import (
    FLOATS,
    check_bits,
    check_types,
    clear_size,
    group_size,
    is_rotated,
    module_tensors,
    settings_of,
)
from surgery_formats.storage.packing import unit, words_of
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["AWQ"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = (4, 5, 6, 7)  # more than 4: auto-round's
_OTHERS = ("gemv_fast", "marlin", "llm-awq")
"""Versions in the order of one kernel, which are not read."""


class _Awq:
    """See the module."""

    name = "awq"
    title = "X.qweight, X.qzeros, X.scales: AWQ's, 4 bits in words along the outputs (gemm) or the inputs (gemv)"

    def claim(
        self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> Iterator[GroupedRows | GroupedColumns]:
        """See `StorageKind.claim`; what is packed for another kernel is left alone."""
        named = quantisation_of(config)
        if not _is_awq(named):
            return
        settings = settings_of(named)
        for stem, own in module_tensors(tensors, (".qweight", ".qzeros", ".scales")):
            qweight, qzeros, scales = own.values()
            check_types(qweight, (DType.I32,))
            check_types(qzeros, (DType.I32,))
            check_types(scales, FLOATS)
            sizes, bits = settings.get("group_size", ()), settings.get("bits", ())
            if qweight.shape[1] == qzeros.shape[1] and qzeros.shape[0] == scales.shape[0]:
                yield _gemm(f"{stem}.weight", qweight, qzeros, scales, sizes, bits)
            elif qweight.shape[0] == qzeros.shape[0] == scales.shape[0] and scales.shape[1] == 8 * qzeros.shape[1]:
                yield _gemv(f"{stem}.weight", qweight, qzeros, scales, sizes)
            else:
                raise MalformedError(
                    f"{list(qweight.shape)} with zero points {list(qzeros.shape)} and scales {list(scales.shape)} "
                    "is neither AWQ's gemm nor its gemv",
                    file=qweight.path,
                    tensor=qweight.name,
                )


AWQ = _Awq()


def _is_awq(named: Mapping[str, Any]) -> bool:
    if is_rotated(named):
        return False
    method = str(named.get("quant_method", "")).lower()
    version = str(named.get("version") or named.get("checkpoint_format") or named.get("format") or "gemm").lower()
    if method == "awq":
        return version not in _OTHERS and named.get("backend") != "llm-awq"
    return method in ("auto-round", "intel/auto-round") and "auto_awq" in str(named.get("packing_format", ""))


def _gemm(
    name: str,
    qweight: StoredTensor,
    qzeros: StoredTensor,
    scales: StoredTensor,
    sizes: tuple[int, ...],
    named_bits: tuple[int, ...],
) -> GroupedRows:
    rows, columns = qweight.shape[0], scales.shape[1]
    bits = next((bits for bits in _BITS if words_of(columns, bits) == qzeros.shape[1]), 0)
    if not bits or columns % (8 if bits == 4 else 32):
        raise MalformedError(
            f"{columns} zero points are not in {qzeros.shape[1]} words", file=qzeros.path, tensor=qzeros.name
        )
    check_bits(bits, named_bits, qzeros)
    order = tuple(start + place for start in range(0, unit(bits), 8) for place in _ORDER)
    size = group_size(rows, scales.shape[0], sizes, scales)
    packing = Packing(bits, axis=1, order=order)
    return GroupedRows(name, f"AWQ{bits}", (rows, columns), True, qweight, qzeros, scales, None, packing, size, fit_awq)


def _gemv(
    name: str, qweight: StoredTensor, qzeros: StoredTensor, scales: StoredTensor, sizes: tuple[int, ...]
) -> GroupedColumns:
    rows, columns = qweight.shape[0], qweight.shape[1] * 8
    words = qzeros.shape[1]
    unclear = f"{columns} inputs have no clear groups in {words} words"
    size = clear_size(columns, sizes, (128, 64, 32), lambda size: _width(columns, size) == words, unclear, qzeros)
    return GroupedColumns(name, "AWQ4 gemv", (rows, columns), qweight, scales, qzeros, (0, 2, 1), 4, size, fit_awq)


def _width(columns: int, size: int) -> int:
    """Words of zero points in a row: as many as groups need, in multiples for the kernel's loads."""
    multiple = {64: 2, 32: 4}.get(size, 1)
    return -(-words_of(columns // size, 4) // multiple) * multiple
