# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored as codes and that no storage claims: named as what they are, and never taken for numbers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.bitsandbytes.int8 import FORMAT, tiles_of
from surgery_formats.storage.module_tensors import is_rotated
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show

__all__ = ["Unread", "method_of", "unread_weights"]


@dataclass(frozen=True, slots=True)
class _Layout:
    """How programs name the tensors of a quantised weight.

    Attributes:
        method: What the layout is called where no configuration says it.
        suffix: Of the weight's own name.
        parts: Endings of its tensors that stand in place of `suffix`.
        needed: Those without which the weight cannot be read.
        codes: Endings of the tensors that may hold its codes, if the names of the others tell that there were some.
        sure: Whether its names mean nothing else, whatever type the codes are held in.
    """

    method: str
    suffix: str
    parts: tuple[str, ...]
    needed: tuple[str, ...]
    codes: tuple[str, ...] = ()
    sure: bool = False


_LAYOUTS = (
    _Layout("GPTQ or AWQ", ".weight", (".qweight", ".qzeros", ".scales", ".g_idx"), (".qweight", ".scales")),
    _Layout(
        "compressed-tensors", ".weight",
        (
            ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_global_scale",
            ".weight_g_idx", ".weight_scale_2",
        ),
        (".weight_scale",),
        (".weight_packed", ".weight"),
    ),
    _Layout(
        "bitsandbytes, 4 bits", ".weight",
        (
            ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
            ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
        ),
        (".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"),
        (".weight",),
        sure=True,
    ),
    _Layout("bitsandbytes, 8 bits", ".weight", (".SCB", ".weight_format"), (".SCB",), (".weight",)),
    _Layout("float8 in blocks", ".weight", (".weight_scale_inv",), (".weight_scale_inv",), (".weight",)),
    _Layout("float8", ".weight", (".scale_weight",), (".scale_weight",), (".weight",)),
    _Layout("MXFP4", "", ("_blocks", "_scales"), ("_blocks", "_scales")),
)  # fmt: skip
_PARTS = {part: layout for layout in _LAYOUTS for part in layout.parts}
_ENDINGS = tuple(sorted(_PARTS, key=len, reverse=True))
_CAUSES = {
    ".pre_quant_scale": ("ModelOpt with AWQ", "layers multiply their inputs by pre_quant_scale first"),
    ".comfy_quant": ("ComfyUI", "scales lie in tiles, for the tensor cores of a GPU"),
}
"""What a tensor beside a weight that is not read says: who quantised it, and why it is not read."""
_CODES = frozenset(
    {DType.I8, DType.U8, DType.I16, DType.U16, DType.I32, DType.U32, DType.F4, DType.F6_E2M3, DType.F6_E3M2}
)
"""Types in which programs keep codes; indices and counters are I64, masks BOOL."""
_NARROW = _CODES | {DType.F8_E4M3, DType.F8_E5M2}
"""Types whose values need what is stored beside them, if something is."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Weights of one network that are stored as codes, in a format of which no storage is known.

    Attributes:
        method: What quantised them, as config.json or the tensors' names have it. Untrusted text.
        weights: Their names in the model's code, each with the stored tensors it is made of.
        cause: Why the first of them is not read, where that is known; else empty.
        lacking: Stored tensors without which the first of them cannot be read, whoever knows its format.
    """

    method: str
    weights: Mapping[str, tuple[StoredTensor, ...]]
    lacking: tuple[str, ...]
    cause: str = ""

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all their stored tensors."""
        return frozenset(tensor.name for parts in self.weights.values() for tensor in parts)

    @property
    def message(self) -> str:
        """What every command says of them."""
        first, parts = next(iter(self.weights.items()))
        count = len(self.weights)
        what = f"{count} weights are" if count > 1 else "one weight is"
        shape = listing(f"{tensor.name} {tensor.dtype.label} {list(tensor.shape)}" for tensor in parts)
        lacking = f"; without {listing(self.lacking)} it cannot be read at all" if self.lacking else ""
        cause = f" ({self.cause})" if self.cause else ""
        return (
            f"is quantised ({show(self.method, 60)}) in a form that is not read{cause}: {what} stored as codes, such as "
            f"'{show(first)}' ({shape}){lacking}"
        )

    def error(self) -> FitError:
        """The refusal of whatever needs their values."""
        first, parts = next(iter(self.weights.items()))
        hint = "`surgery formats` lists the storages that are read; or take the model as it was before quantisation"
        return FitError(self.message, file=parts[0].path, tensor=first, hint=hint)


def unread_weights(
    plain: Mapping[str, StoredTensor], config: Mapping[str, Any], read: Container[str] = ()
) -> Unread | None:
    """The weights among tensors that no storage claims which are codes, or were and are gone; None if there are none.

    Args:
        plain: Tensors that no storage claims, by name.
        config: config.json of the network.
        read: Names of the tensors that storages claim.
    """
    named = quantisation_of(config)
    groups: dict[str, dict[str, StoredTensor]] = {}
    layouts: dict[str, _Layout] = {}
    modules: set[str] = set()
    for name, tensor in plain.items():
        if name.endswith(_ENDINGS):
            ending = next(ending for ending in _ENDINGS if name.endswith(ending))
            layout = _PARTS[ending]
            weight = name.removesuffix(ending) + layout.suffix
            groups.setdefault(weight, {})[name] = tensor
            layouts.setdefault(weight, layout)
        elif tensor.dtype in _CODES and len(tensor.shape) > 1 and (named or name.endswith(".weight")):
            groups.setdefault(f"{_module(name)}.weight", {})[name] = tensor
            modules.add(_module(name))
    if modules:
        for name, tensor in plain.items():  # what else such a module keeps: codebooks, scales
            if (module := _module(name)) in modules and not name.endswith((".weight", ".bias")):
                groups[f"{module}.weight"][name] = tensor
    weights: dict[str, tuple[StoredTensor, ...]] = {}
    lacking: tuple[str, ...] = ()
    for weight, parts in groups.items():
        if weight in plain:
            parts.setdefault(weight, plain[weight])
        named_as = layouts.get(weight)
        gone = tuple(_codes_gone(weight, named_as, plain, read))
        if not (gone or (named_as and named_as.sure) or any(tensor.dtype in _NARROW for tensor in parts.values())):
            continue  # numbers whose names happen to end so
        if not weights:
            lacking = (*gone, *_lacking(weight, parts, named_as))
            method, cause = _cause(weight, plain) or (named_as.method if named_as else "integers", "")
        weights[weight] = tuple(parts.values())
    return Unread(method_of(config) or method, weights, lacking, cause) if weights else None


def _module(name: str) -> str:
    """The module of a tensor; of ``a.weight._data``, a."""
    return name.rpartition(".")[0].removesuffix(".weight")


def _cause(weight: str, plain: Mapping[str, StoredTensor]) -> tuple[str, str] | None:
    module = weight.removesuffix(".weight")
    mark = plain.get(module + FORMAT)
    if mark is not None and (tiles := tiles_of(mark)):
        return "bitsandbytes, 8 bits", f"codes lie in tiles, {tiles}: a bitsandbytes before 0.42 can save them in rows"
    return next((cause for ending, cause in _CAUSES.items() if module + ending in plain), None)


def _codes_gone(
    weight: str, layout: _Layout | None, plain: Mapping[str, StoredTensor], read: Container[str]
) -> Iterator[str]:
    """The tensor that should hold the codes of a weight, if there is none."""
    if layout is not None and layout.codes:
        names = [weight.removesuffix(layout.suffix) + ending for ending in layout.codes]
        if not any(name in plain or name in read for name in names):
            yield names[0]


def _lacking(weight: str, parts: Mapping[str, StoredTensor], layout: _Layout | None) -> Iterator[str]:
    if layout is not None:
        stem = weight.removesuffix(layout.suffix)
        states = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
        for part in layout.needed:
            either = states if part in states else (part,)
            if not any(stem + each in parts for each in either):
                yield stem + part


def method_of(config: Mapping[str, Any]) -> str:
    """``gptq, 4 bits, groups of 128``: what a config.json says of quantisation; empty if it says nothing."""
    named = quantisation_of(config)
    if not named:
        return ""
    method = named.get("quant_method") or named.get("quant_algo") or named.get("mode") or "by an unnamed method"
    bits = next(
        (named[key] for key in ("bits", "w_bit", "nbits", "weight_bits") if isinstance(named.get(key), int)), None
    )
    group = named.get("group_size", named.get("q_group_size"))
    words = [str(method)]
    labels = (named.get(key) for key in ("format", "checkpoint_format", "packing_format", "version"))
    words += dict.fromkeys(label for label in labels if isinstance(label, str))
    words += ["rotated"] if is_rotated(named) else []
    words += [f"{bits} bits"] if bits else []
    words += [f"groups of {group}"] if isinstance(group, int) and group > 0 else []
    return ", ".join(words)
