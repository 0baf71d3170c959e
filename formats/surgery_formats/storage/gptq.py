# SPDX-License-Identifier: Apache-2.0
"""GPTQ as gptqmodel, auto-gptq, optimum and auto-round save it: X.qweight, X.qzeros, X.scales and mostly X.g_idx.

Words hold the codes of inputs, 2 to 8 bits as a stream: of 3 bits 32 are in 3 words. A value is ``(code - zero) *
scale``. The second version of the format stores a zero point as it is, the first minus one. Where that is not possible,
programs part: gptqmodel subtracts one from all zero points of a word at once (of 2, 4 and 8 bits), so that 0 borrows from
the next; others take what is left modulo ``2**bits``. A file is read by the inverse of what its own writer did. The group
of an input is its place divided by the group's size, unless g_idx says otherwise (`desc_act`).

Sizes are read from the shapes, which know them for each layer, and not from the expressions of `dynamic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.fitting import fit_minmax, fit_symmetric
from surgery_formats.storage.grouped_rows import GroupedRows, Packing
from surgery_formats.storage.module_tensors import (
    FLOATS,
    check_bits,
    check_types,
    group_size,
    is_rotated,
    module_tensors,
    settings_of,
)
from surgery_formats.storage.packing import words_of
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["GPTQ"]

_BITS = (4, 8, 3, 2)
_MORE_BITS = (5, 6, 7)  # auto-round's; gptqmodel packs these in planes
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_METHODS = {
    "gptq": ("checkpoint_format", "gptq"),
    "auto-round": ("packing_format", "auto_round:auto_gptq"),
    "intel/auto-round": ("packing_format", "auto_round:auto_gptq"),
}
"""By quant_method: the key that names the format, and what it is where none is named."""
_SHIFTS = {
    "gptq": 1,
    "gptq_v2": 0,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
}
"""What is added to a stored zero point, by the name of the format."""
_KERNELS = (":exllamav2", ":tritonv2", ":triton")  # behind the name of a format


class _Gptq:
    """See the module."""

    name = "gptq"
    title = "X.qweight, X.qzeros, X.scales, X.g_idx: GPTQ's and auto-round's, 2 to 8 bits in words along the inputs"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[GroupedRows]:
        """See `StorageKind.claim`.

        What is packed for one kernel (Marlin, planes), and layers whose inputs are rotated, are left alone.
        """
        said = _said(config)
        if said is not None:
            for stem, own in module_tensors(tensors, (".qweight", ".qzeros", ".scales"), (".g_idx",)):
                yield _weight(stem, own, said)


GPTQ = _Gptq()


@dataclass(frozen=True, slots=True)
class _Said:
    """What a configuration says of all layers.

    Attributes:
        shift: See `_SHIFTS`.
        carries: See `Packing.carries`; of the widths that make whole words.
        ordered: Whether g_idx may be left out.
        symmetric: Whether zero points are all in the middle.
        known: Bits of a code that its program knows.
        bits: Those that are named.
        sizes: Sizes of groups that are named.
        as_code: Last names of modules whose weights the model's code has as ``(in, out)``.
    """

    shift: int
    carries: bool
    ordered: bool
    symmetric: bool
    known: tuple[int, ...]
    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    as_code: tuple[str, ...]


def _said(config: Mapping[str, Any]) -> _Said | None:
    """None if it is another format's."""
    named = quantisation_of(config)
    method = str(named.get("quant_method", "")).lower()
    if method not in _METHODS or named.get("is_marlin_format") or is_rotated(named):
        return None
    key, default = _METHODS[method]
    label = str(named.get(key) or (method == "gptq" and named.get("format")) or default).lower()
    for kernel in _KERNELS:
        label = label.removesuffix(kernel)
    if label not in _SHIFTS:
        return None
    meta, settings = named.get("meta"), settings_of(named)
    return _Said(
        shift=_SHIFTS[label],
        carries=label == "gptq" and isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")).lower(),
        ordered=named.get("desc_act") is not True,
        symmetric=named.get("sym") is not False,
        known=_BITS if method == "gptq" else (*_BITS, *_MORE_BITS),
        bits=settings.get("bits", ()),
        sizes=settings.get("group_size", ()),
        as_code=(*_CONV1D.get(str(config.get("model_type")), ()), *_EMBEDDINGS),
    )


def _weight(stem: str, own: Mapping[str, StoredTensor], said: _Said) -> GroupedRows:
    qweight, qzeros, scales, g_idx = own[".qweight"], own[".qzeros"], own[".scales"], own.get(".g_idx")
    check_types(qweight, (DType.I32,))
    check_types(qzeros, (DType.I32,))
    check_types(scales, FLOATS)
    if g_idx is not None:
        check_types(g_idx, (DType.I32,), (1,))
    groups, columns = scales.shape
    if qweight.shape[1] != columns or qzeros.shape[0] != groups:
        raise MalformedError(
            f"{list(qweight.shape)} does not fit scales {list(scales.shape)} and zero points {list(qzeros.shape)}",
            file=qweight.path,
            tensor=qweight.name,
        )
    if g_idx is None and not said.ordered:
        raise MalformedError(
            f"there is no '{show(stem)}.g_idx', which desc_act needs", file=qweight.path, tensor=qweight.name
        )
    bits = _bits(qzeros, columns, said)
    rows = g_idx.shape[0] if g_idx is not None else qweight.shape[0] * 32 // bits
    if words_of(rows, bits) != qweight.shape[0]:
        raise MalformedError(f"has no {bits} bits for each of {rows} inputs", file=qweight.path, tensor=qweight.name)
    return GroupedRows(
        f"{stem}.weight",
        f"GPTQ{bits}",
        (rows, columns),
        transposed=stem.rpartition(".")[2] not in said.as_code,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        packing=Packing(bits, axis=0, shift=said.shift, carries=said.carries and 32 % bits == 0),
        size=group_size(rows, groups, said.sizes, scales),
        fitting=fit_symmetric if said.symmetric else fit_minmax,
    )


def _bits(qzeros: StoredTensor, columns: int, said: _Said) -> int:
    """Bits of a code: words of zero points tell, the configuration where a few columns leave a choice.

    Raises:
        MalformedError: no number of bits fits, several do, or one that is not named.
    """
    whole = [bits for bits in said.known if 32 % bits == 0 or columns % 32 == 0]
    fitting = [bits for bits in whole if words_of(columns, bits) == qzeros.shape[1]]
    chosen = [bits for bits in fitting if bits in said.bits] or fitting
    if len(chosen) == 1:
        check_bits(chosen[0], said.bits, qzeros)
        return chosen[0]
    found = f"{' or '.join(map(str, sorted(chosen)))} bits" if chosen else "no number of bits"
    raise MalformedError(
        f"{found} fit {columns} zero points in {qzeros.shape[1]} words", file=qzeros.path, tensor=qzeros.name
    )
