# SPDX-License-Identifier: Apache-2.0
"""``hada_*``: LoHa, and DoHa with ``dora_scale`` (LyCORIS 4.1.3, ``modules/loha.py``)."""

from __future__ import annotations

from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.kinds.magnitudes import lengths_of, put_lengths
from surgery_formats.adapters.grammar.kinds.pairs import low_rank_pair, put_pair
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import LoHa, Update
from surgery_formats.updates.decomposed import Decomposed

__all__ = ["LOHA"]

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    beside = next(role for role in _FACTORS if role in module.parts)
    (A1, B1), (A2, B2) = [low_rank_pair(module, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}", beside) for i in (1, 2)]
    if A1.shape != A2.shape or B1.shape != B2.shape:
        what = f"the first pair makes {[A1.shape[0], B1.shape[1]]}, of rank {A1.shape[1]}"
        raise malformed(module.parts["hada_w2_a"], what)
    scale = scales.of_module(module, A1.shape[1])
    loha = LoHa(A1, B1, A2, B2, scale.value, scale.alpha, scale.noted)
    core = module.parts.get("hada_t1")
    lengths = lengths_of(module, loha.shape[0], (module.parts["hada_w1_b"].shape[1],))
    update: Update = loha if lengths is None else Decomposed(loha, *lengths)
    # Without a core a kernel is flattened into the factors; the axes of the lengths still tell of it.
    flat = (0,) * max(0, len(module.parts["dora_scale"].shape) - 2) if lengths else ()
    yield ReadUpdate("weight", update, scale.source, core.shape[2:] if core else flat)


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    loha = update.delta if isinstance(update, Decomposed) else update
    assert isinstance(loha, LoHa)  # as `writes` says
    times = writer.put_scale(loha.scale, loha.rank)
    for i, pair in enumerate(((loha.A1, loha.B1), (loha.A2, loha.B2)), 1):
        put_pair(writer, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}", pair, times if i == 1 else 1.0)
    if isinstance(update, Decomposed):
        put_lengths(writer, update)


LOHA = LeafKind(
    name="LoHa",
    roles=frozenset([*_FACTORS, "alpha", "scale", "dora_scale"]),
    marks=frozenset(_FACTORS),
    read=_read,
    writes=frozenset([LoHa.kind, Decomposed.kinds[0]]),
    write=_write,
)
