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
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.fitting import fit_minmax, fit_symmetric
from surgery_formats.storage.grouped_rows import GroupedRows, Packing
from surgery_formats.storage.module_tensors import FLOATS, check_types, group_size, module_tensors, settings_of
from surgery_formats.storage.packing import words_of
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["GPTQ"]

_BITS = (4, 8, 3, 2)
_MORE_BITS = (5, 6, 7)  # auto-round's; gptqmodel packs these in planes
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_METHODS = {"gptq": "checkpoint_format", "auto-round": "packing_format", "intel/auto-round": "packing_format"}
_SHIFTS = {
    "gptq": 1,
    "gptq_v2": 0,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round": 0,
}
"""What is added to a stored zero point, by the name that the configuration gives the format."""


class _Gptq:
    """See the module."""

    name = "gptq"
    title = "X.qweight, X.qzeros, X.scales, X.g_idx: GPTQ's and auto-round's, 2 to 8 bits in words along the inputs"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[GroupedRows]:
        """See `StorageKind.claim`; what is packed for one kernel (Marlin, planes) is left alone."""
        named = quantisation_of(config)
        shift = _shift(named)
        if shift is None:
            return
        for stem, own in module_tensors(tensors, (".qweight", ".qzeros", ".scales"), (".g_idx",)):
            yield _weight(stem, own, named, str(config.get("model_type")), shift)


GPTQ = _Gptq()


def _shift(named: Mapping[str, Any]) -> int | None:
    """See `_SHIFTS`; None if this is another format."""
    key = _METHODS.get(str(named.get("quant_method", "")).lower())
    if key is None or named.get("is_marlin_format"):
        return None
    default = "gptq" if key == "checkpoint_format" else "auto_round"
    label = str(named.get(key) or named.get("format") or named.get("backend") or default).lower()
    kernel = label.rpartition(":")[2]
    if label not in _SHIFTS and kernel in (
        "exllamav2",
        "tritonv2",
        "marlin",
        "triton",
    ):  # which kernel, not which format
        label = label.rpartition(":")[0]
    return _SHIFTS.get(label)


def _by_gptqmodel(named: Mapping[str, Any]) -> bool:
    meta = named.get("meta")
    return isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")).lower()


def _weight(
    stem: str, own: Mapping[str, StoredTensor], named: Mapping[str, Any], model: str, shift: int
) -> GroupedRows:
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
    if g_idx is None and named.get("desc_act") is True:
        raise MalformedError(
            f"there is no '{show(stem)}.g_idx', which desc_act needs", file=qweight.path, tensor=qweight.name
        )
    settings = settings_of(named)
    bits = _bits(qweight, qzeros, columns, settings.get("bits", ()), str(named.get("quant_method")) != "gptq")
    rows = g_idx.shape[0] if g_idx is not None else qweight.shape[0] * 32 // bits
    if words_of(rows, bits) != qweight.shape[0]:
        raise MalformedError(f"has no {bits} bits for each of {rows} inputs", file=qweight.path, tensor=qweight.name)
    size = group_size(rows, groups, settings.get("group_size", ()), scales)
    last = stem.rpartition(".")[2]
    as_code = last in _CONV1D.get(model, ()) or last in _EMBEDDINGS
    carries = shift == 1 and 32 % bits == 0 and _by_gptqmodel(named)
    packing = Packing(bits, axis=0, shift=shift, carries=carries)
    fitting = fit_minmax if named.get("sym") is False else fit_symmetric
    name = f"{stem}.weight"
    return GroupedRows(
        name, f"GPTQ{bits}", (rows, columns), not as_code, qweight, qzeros, scales, g_idx, packing, size, fitting
    )


def _bits(qweight: StoredTensor, qzeros: StoredTensor, columns: int, named: tuple[int, ...], more: bool) -> int:
    """Bits of a code: words of zero points tell, the configuration where a few columns leave a choice.

    Raises:
        MalformedError: no number of bits fits, or several do.
    """
    known = (*_BITS, *_MORE_BITS) if more else _BITS
    whole = [bits for bits in known if 32 % bits == 0 or columns % 32 == 0]
    fitting = [bits for bits in whole if words_of(columns, bits) == qzeros.shape[1]]
    chosen = [bits for bits in fitting if bits in named] or fitting
    if len(chosen) == 1:
        return chosen[0]
    found = f"{' or '.join(map(str, sorted(chosen)))} bits" if chosen else "no number of bits"
    raise MalformedError(
        f"{found} fit {columns} zero points in {qzeros.shape[1]} words", file=qzeros.path, tensor=qzeros.name
    )
