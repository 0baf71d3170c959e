# SPDX-License-Identifier: Apache-2.0
"""``lokr_*``: LoKr, and DoKr with ``dora_scale`` (LyCORIS 4.1.3, ``modules/lokr.py``; ai-toolkit writes the same).

The scale is ``alpha / rank`` where one of the two matrices is a pair of factors, and 1 where both are whole, whatever
alpha says: LyCORIS, ComfyUI and diffusers agree. PEFT applies its alpha to whole ones too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.kinds.magnitudes import lengths_of, put_lengths
from surgery_formats.adapters.grammar.kinds.pairs import low_rank_pair, put_pair
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scales import Scale, StatedScales
from surgery_formats.adapters.writing import copied
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, LoKr, Update
from surgery_formats.updates.decomposed import Decomposed

__all__ = ["LOKR"]

_FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    parts = module.parts
    beside = next(role for role in _FACTORS if role in parts)
    C, first = _half(module, "lokr_w1", "", beside)
    D, second = _half(module, "lokr_w2", "lokr_t2", beside)
    rank = second or first
    whole = rank is None
    scale = Scale(1.0, None, "none", _noted(module)) if rank is None else scales.of_module(module, rank)
    alpha = None if whole else scale.alpha
    lokr = LoKr(C, D, scale.value, alpha, rank, noted=scale.noted)
    kernel = parts["lokr_w2"].shape[2:] if "lokr_w2" in parts else ()
    kernel = parts["lokr_t2"].shape[2:] if "lokr_t2" in parts else kernel
    if not kernel and "dora_scale" in parts:  # flattened into the factors; the axes of the lengths still tell of it
        kernel = (0,) * max(0, len(parts["dora_scale"].shape) - 2)
    lengths = lengths_of(module, lokr.shape[0], (lokr.shape[1] // (math.prod(kernel) or 1),))
    update: Update = lokr if lengths is None else Decomposed(lokr, *lengths)
    yield ReadUpdate("weight", update, scale.source, kernel)


def _noted(module: ModuleTensors) -> tuple[StoredTensor, ...]:
    return (module.parts["alpha"],) if "alpha" in module.parts else ()


def _half(module: ModuleTensors, whole: str, core: str, beside: str) -> tuple[Factor, int | None]:
    """One of the two matrices, and its rank if it is a pair."""
    pair = [role for role in (f"{whole}_a", f"{whole}_b", core) if role in module.parts]
    if whole in module.parts:
        if pair:
            raise malformed(module.parts[pair[0]], "is there twice: whole and as factors")
        stored = module.matrix(whole, beside)
        return Factor((stored,), stored.matrix), None
    a, b = low_rank_pair(module, f"{whole}_a", f"{whole}_b", core, beside)
    joined = Factor.computed((a, b), (a.shape[0], b.shape[1]), lambda left, right: left @ right)
    return joined, a.shape[1]


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    lokr = update.delta if isinstance(update, Decomposed) else update
    assert isinstance(lokr, LoKr)  # as `writes` says
    pair = lokr.C.terms or lokr.D.terms
    if pair:
        times = writer.put_scale(lokr.scale, (lokr.D.terms or lokr.C.terms)[0].shape[1])
    else:
        times = lokr.scale
        name = writer.spelt("alpha")  # it means nothing here; programs look for it
        if lokr.noted:
            writer.tensors[name] = copied(name, lokr.noted[0])
        elif writer.with_alpha:
            writer.put_scale(1.0, 1)
        if times != 1.0:
            writer.notes.append(f"its scale {times:g} is in 'lokr_w1'")
    if lokr.C.terms:
        put_pair(writer, "lokr_w1_a", "lokr_w1_b", "", lokr.C.terms, times)
    else:
        writer.put("lokr_w1", lokr.C, times=times)
    if lokr.D.terms:
        put_pair(writer, "lokr_w2_a", "lokr_w2_b", "lokr_t2", lokr.D.terms)
    else:
        rows, cols = lokr.D.shape
        writer.put("lokr_w2", lokr.D, (rows, cols // math.prod(writer.sizes), *writer.sizes))
    if isinstance(update, Decomposed):
        put_lengths(writer, update)


LOKR = LeafKind(
    name="LoKr",
    roles=frozenset([*_FACTORS, "alpha", "scale", "dora_scale"]),
    marks=frozenset(_FACTORS),
    read=_read,
    writes=frozenset([LoKr.kind, Decomposed.kinds[1]]),
    write=_write,
)
