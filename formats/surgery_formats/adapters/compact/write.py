# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to a compact folder: factors as codes, other tensors unchanged (docs/compact.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery_formats.adapters.compact.files import CONFIG_FILE, MARK, TENSOR_FILE, VERSION
from surgery_formats.adapters.compact.read import leaves, stem_of
from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.peft.carried import held_by_config, stored_transposed, task_of
from surgery_formats.adapters.writing import ConversionLedger, copied, factor_tensor, surviving_metadata, zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import Coding
from surgery_formats.linalg.solutions import RecentSolutions
from surgery_formats.tensors.coded import CodedTensor, code_shape, code_type, pack
from surgery_formats.updates import LoRA, Update

__all__ = ["render_compact"]

Coded = dict[str, Array]


def _size(coded: Coded) -> int:
    return sum(tensor.nbytes for tensor in coded.values())


@dataclass
class _CompactWriter:
    """What has been written so far."""

    coding: Coding
    config: Mapping[str, Any]
    ledger: ConversionLedger = field(default_factory=ConversionLedger)
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    records: dict[Site, list[dict[str, Any]]] = field(default_factory=dict)
    stated: dict[Site, list[Callable[[], float]]] = field(default_factory=dict)
    solutions: RecentSolutions[Coded] = field(default_factory=lambda: RecentSolutions(_size))

    def add(self, *tensors: NewTensor) -> None:
        """Tensors of the file."""
        for tensor in tensors:
            if tensor.name in self.tensors:
                raise FitError("two updates have the same key in this format", tensor=tensor.name)
            self.tensors[tensor.name] = tensor


def render_compact(adapter: Adapter, coding: Coding) -> Rendering:
    """adapter.safetensors and compact.json."""
    state = _CompactWriter(coding, adapter.config)
    for site, chain in adapter.updates.items():
        for update in chain:
            _update(site, update, state)
    state.ledger.drop_prompt(adapter)
    config = _config(adapter, state)
    text = json.dumps(config, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n"
    stated = {site: _together(errors) for site, errors in state.stated.items() if set(errors) != {_none}}
    metadata = surviving_metadata(adapter) | {"format": "pt"}
    metadata |= {"surgery.base": adapter.base_id} if adapter.base_id else {}
    return Rendering(
        TENSOR_FILE,
        tuple(state.tensors[name] for name in sorted(state.tensors)),
        metadata,
        {CONFIG_FILE: text.encode()},
        tuple(state.ledger.entries),
        state.ledger.held,
        stated,
    )


def _none() -> float:
    """The error of an update that is stored unchanged."""
    return 0.0


def _together(errors: list[Callable[[], float]]) -> Callable[[], tuple[float, ...]]:
    return lambda: tuple(error() for error in errors)


def _update(site: Site, update: Update, state: _CompactWriter) -> None:
    if site.grows:
        state.ledger.drop(site, update, "this format has no weights that grow")
        return
    held = contents_of(update)
    loras = held.stack.experts if held.stack else (held.lora,) if held.lora else ()
    wrapped = bool(loras) and site.module_kind == "attention output"
    stem = stem_of(site, len(state.records.get(site, ())), wrapped=wrapped)
    error = _none
    if loras:
        error = _low_rank(stem, held, loras, wrapped, site, state)
    elif offset := held.offset:
        state.add(factor_tensor(f"{stem}.offset", offset.value, offset.value.shape))
        _record(site, {"kind": "offset", "scale": offset.scale}, state)
    elif whole := held.whole:
        state.add(copied(f"{stem}.value", whole.stored))
        implied = held_by_config(site.path, state.config) == whole.held
        _record(site, {"kind": "replacement"} | ({} if implied else {"held": whole.held}), state)
    elif rows := held.rows:
        state.add(factor_tensor(f"{stem}.rows", rows.value, rows.value.shape))
        record = {"kind": "token rows", "indices": list(rows.indices), "vocabulary": rows.vocabulary}
        _record(site, record, state)
    else:
        state.ledger.drop(site, update, f"this format has no {update.kind}")
        return
    state.stated.setdefault(site, []).append(error)
    if error is _none:
        state.ledger.keep(site, update, "folded" if held.folded else "exact", held.folded)
    else:
        how = f"{state.coding.name} codes in groups of {state.coding.group}"
        state.ledger.keep(site, update, "approximated", how)


def _record(site: Site, record: dict[str, Any], state: _CompactWriter) -> None:
    state.records.setdefault(site, []).append(record)


def _low_rank(
    stem: str, held: Contents, loras: tuple[LoRA, ...], wrapped: bool, site: Site, state: _CompactWriter
) -> Callable[[], float]:
    """Store the codes of a LoRA, a DoRA's direction or a stack of experts; returns a function for their error."""
    first = loras[0]
    embedding = site.module_kind == "embedding"
    out, inputs = first.shape
    kept = _kept(loras, state.coding)
    rank = kept[0].sizes[2] if kept else min(max(lora.rank for lora in loras), out, inputs)
    if held.dora:
        magnitude = held.dora.magnitude
        state.add(factor_tensor(f"{stem}.lora_magnitude_vector", magnitude, magnitude.shape))
    names = dict(zip("AB", (f"{stem}.{leaf}" for leaf in leaves(embedding)), strict=True))

    def solve() -> tuple[Coded, float]:
        return _solved(loras, rank, first.scale, state.coding)

    def coded() -> Coded:
        if kept:
            pairs = (zip(("codes", "scales"), factor.coded(), strict=True) for factor in kept)
            return {f"{side}.{what}": t for side, pair in zip("AB", pairs, strict=True) for what, t in pair}
        return state.solutions.of(stem, solve)

    for side, length in (("A", inputs), ("B", out)):
        shapes = (
            ("codes", code_type(state.coding), code_shape(state.coding, len(loras), length, rank)),
            ("scales", DType.BF16, (len(loras), state.coding.scales(length * rank))),
        )
        for what, dtype, shape in shapes:
            load = _load(coded, f"{side}.{what}")
            state.add(NewTensor(f"{names[side]}.{what}", dtype, shape, load, made_with=stem))
    record: dict[str, Any] = {"kind": "DoRA" if held.dora else "LoRA", "scale": first.scale}
    record |= {"rank": rank, "shape": [out, *_columns(site, inputs)]}
    record |= {"alpha": first.alpha} if first.alpha is not None else {}
    record |= {"per_row": held.dora.per_row} if held.dora else {}
    record |= {"experts": len(loras), "either_way": bool(held.stack.if_transposed)} if held.stack else {}
    record |= {"embedding": True} if embedding else {}
    record |= {"wrapped": True} if wrapped else {}
    _record(site, record, state)
    return _none if kept else partial(state.solutions.error_of, stem, solve)


def _load(coded: Callable[[], Coded], name: str) -> Callable[[], Array]:
    return lambda: coded()[name]


def _kept(loras: tuple[LoRA, ...], coding: Coding) -> tuple[CodedTensor, CodedTensor] | None:
    """The two factors, where they are such codes already, and all of them."""
    used = {factor.tensors for lora in loras for factor in (lora.A, lora.B)}
    first = loras[0].A.tensors[0], loras[0].B.tensors[0]
    if used != {first[:1], first[1:]} or len({lora.scale for lora in loras}) > 1:
        return None
    a, b = first
    if not (isinstance(a, CodedTensor) and isinstance(b, CodedTensor)) or a.coding != coding or b.coding != coding:
        return None
    same = a.sizes == (len(loras), loras[0].shape[1], loras[0].rank) and b.sizes[1] == loras[0].shape[0]
    return (a, b) if same and (a.side, b.side) == ("A", "B") else None


def _columns(site: Site, inputs: int) -> tuple[int, ...]:
    """``(in,)``, or ``(in, k, k)`` of a convolution whose kernel is known."""
    known = bool(site.kernel) and all(site.kernel)
    return (inputs // math.prod(site.kernel), *site.kernel) if known else (inputs,)


def _solved(loras: tuple[LoRA, ...], rank: int, scale: float, coding: Coding) -> tuple[Coded, float]:
    """Codes and scales by side, and the error of all experts together."""
    import numpy

    from surgery_formats.linalg.factored import factored_norm
    from surgery_formats.linalg.quantise import quantise_product

    products, lost, whole = [], [], []
    for lora in loras:
        B, A = lora.B.load(DType.F64), lora.A.load(DType.F64)
        if lora.scale != scale:
            B = B * (lora.scale / scale)
        if lora.rank < rank:  # experts of several ranks
            B, A = zero_padded(B, 1, rank), zero_padded(A, 0, rank)
        product = quantise_product(B, A, coding)
        products.append(product)
        whole.append(factored_norm(B, A) * abs(scale))
        lost.append(product.error * whole[-1])
    coded: Coded = {}
    for side in "AB":
        codes = [getattr(product, side) for product in products]
        coded[f"{side}.codes"] = pack(numpy.stack([code.values for code in codes]), coding)
        coded[f"{side}.scales"] = numpy.stack([code.scales for code in codes])
    total = math.hypot(*whole)
    return coded, math.hypot(*lost) / total if total else 0.0


def _config(adapter: Adapter, state: _CompactWriter) -> dict[str, Any]:
    sites = [
        {"path": site.path}
        | ({"component": site.component} if site.component else {})
        | ({"flat": True} if site.flat else {})
        | {"updates": records}
        for site, records in state.records.items()
    ]
    stated: dict[str, Any] = {"task": adapter.task, "stored_transposed": adapter.stored_transposed}
    implied = {"task": task_of(adapter.config), "stored_transposed": stored_transposed(adapter.config)}
    return {
        "format": MARK,
        "version": VERSION,
        "factors": state.coding.name,
        "group": state.coding.group,
        "kind": adapter.kind,
        "base": adapter.base_name,
        "keeps_ties": adapter.keeps_ties,
        "new_modules": sorted(adapter.new_modules),
        "config": dict(adapter.config),
        "parameters": sites,
        **{key: value for key, value in stated.items() if value != implied[key]},
    }
