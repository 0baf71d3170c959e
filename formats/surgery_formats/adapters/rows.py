# SPDX-License-Identifier: Apache-2.0
"""Updates of some rows of a weight, and LoRAs and DoRAs of rows as one of the whole: both are exact.

A cut keeps A and takes rows of B. Parts with one A, as after a cut, become a LoRA of its rank. Others lie side by side: A's below
each other, and B's along the diagonal, as sd-scripts merges its split projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.adapters.writing import factor_dtype
from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.computed import ComputedTensor, computed
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.tensors.views import Index, View
from surgery_formats.updates import Factor, LoRA, Offset, Update, equal_factors, is_directed, low_rank_part

__all__ = ["Span", "cut", "joined", "joined_lengths", "joined_loras", "narrowed", "row_slice", "widened"]

Span = tuple[int, int]
"""First row, and the one behind the last."""


def cut(update: Update, spans: Sequence[Span]) -> Update | None:
    """The update of some rows of its weight, in this order; None if it is of a kind that has none of its own.

    Lengths of columns, for one, belong to all rows.
    """
    if tuple(spans) == ((0, update.shape[0]),):
        return update
    if is_directed(update) and update.per_row:
        direction = replace(update.direction, B=_rows_of(update.direction.B, spans))
        return update.rebuilt(direction, _rows_of(update.magnitude, spans))
    if isinstance(update, LoRA):
        return replace(update, B=_rows_of(update.B, spans))
    return replace(update, value=_rows_of(update.value, spans)) if isinstance(update, Offset) else None


def row_slice(lora: LoRA, start: int, stop: int) -> LoRA:
    """The LoRA of rows ``[start, stop)`` of its weight: the same A, a part of B."""
    return replace(lora, B=_rows_of(lora.B, [(start, stop)]))


def _rows_of(factor: Factor, spans: Sequence[Span]) -> Factor:
    """Rows of a matrix, or numbers of a vector. Those of a stored one that lie together are a stored tensor, and copied as such."""
    shape = (sum(stop - start for start, stop in spans), *factor.shape[1:])
    stored = factor.tensors[0]
    plain = len(spans) == 1 and factor.view is None
    if plain and isinstance(stored, StoredTensor) and stored.strides is None and not stored.packed_as:
        start, row = spans[0][0], stored.nbytes // factor.shape[0]
        part = replace(stored, shape=shape, offset=stored.offset + start * row, nbytes=shape[0] * row)
        return Factor((part,), shape)

    def rows(*values: object) -> Array:
        shown = factor.show(values)
        parts = [shown[start:stop] for start, stop in spans]
        return parts[0] if len(parts) == 1 else namespace(shown).concat(parts, axis=0)

    return Factor(factor.tensors, shape, rows)


def narrowed(update: Update) -> Update:
    """The same LoRA or DoRA without columns of B that are zero: what a cut of joined parts leaves of the others."""
    if is_directed(update):
        return update.rebuilt(_narrowed(update.direction), update.magnitude)
    return _narrowed(update) if isinstance(update, LoRA) else update


def _narrowed(lora: LoRA) -> LoRA:
    """The first row of a block on a diagonal shows them already, so that no other LoRA is read."""
    tensor = lora.B.tensors[0]
    if lora.B.view is not None or tensor.shape != lora.B.shape or cast(tensor.read(0, 1), DType.F64).all():
        return lora
    used = (lora.B.load(DType.F64) != 0).any(axis=0).nonzero()[0]
    if not 0 < len(used) < lora.rank:
        return lora
    a, b = lora.A, lora.B
    down = Factor(a.tensors, (len(used), a.shape[1]), lambda *stored: a.show(stored)[used])
    up = Factor(b.tensors, (b.shape[0], len(used)), lambda *stored: b.show(stored)[:, used])
    return replace(lora, A=down, B=up, alpha=None)


def widened(lora: LoRA, view: View, shape: tuple[int, int]) -> LoRA:
    """The LoRA of what `view` shows of a weight as one of all of it, ``shape``, with zeros elsewhere."""
    rows = range(view.row_origin, view.row_origin + len(view.rows))
    cols = range(view.col_origin, view.col_origin + len(view.cols))
    height, width = reversed(shape) if view.transposed else shape
    of_rows = _scattered(lora.B, 0, (height, lora.rank), rows, view.rows)
    of_cols = _scattered(lora.A, 1, (lora.rank, width), cols, view.cols)
    wide = replace(lora, A=of_cols, B=of_rows)
    return wide.transpose() if view.transposed else wide


def _scattered(factor: Factor, axis: int, shape: tuple[int, int], taken: Index, to: Index) -> Factor:
    """Rows of a factor, or columns (axis 1), at their places in a larger one."""

    def places(at: Index) -> tuple[slice | list[int], ...]:
        index: slice | list[int] = list(at)
        if isinstance(at, range) and at.step > 0:
            index = slice(at.start, at.stop, at.step)
        return (*(slice(None),) * axis, index)

    def scattered(*stored: object) -> Array:
        values = factor.show(stored)
        wide = namespace(values).zeros(shape, dtype=values.dtype)
        wide[places(to)] = values[places(taken)]
        return wide

    return Factor(factor.tensors, shape, scattered)


Part = tuple[LoRA, Sequence[tuple[Span, int]]]
"""A LoRA of rows of a weight, and which of its own rows lie at which row of the weight."""


def joined(name: str, parts: Sequence[tuple[Update, Sequence[tuple[Span, int]]]], height: int) -> Update | str:
    """One LoRA or DoRA of a weight that does what those of its rows do; or why there is none.

    Args:
        name: Of the weight, for messages.
        parts: Each update, and which of its rows lie at which row of the weight.
        height: Rows of the weight; of LoRAs those that no part has stay as they are.
    """
    directed = [(update, rows) for update, rows in parts if is_directed(update) and update.per_row]
    if not directed:
        return joined_loras(name, [(lora, rows) for update, rows in parts if (lora := low_rank_part(update))], height)
    if len(directed) < len(parts):
        return f"of the rows of '{name}', in which this format holds it, only some have lengths"
    lengths = joined_lengths(name, [(update.magnitude, rows) for update, rows in directed], height)
    if lengths is None:
        return f"other rows of '{name}', in which this format holds it, have no lengths"
    low_rank = joined_loras(name, [(update.direction, rows) for update, rows in directed], height)
    return directed[0][0].rebuilt(low_rank, lengths)


def joined_lengths(name: str, parts: Sequence[tuple[Factor, Sequence[tuple[Span, int]]]], height: int) -> Factor | None:
    """The lengths of all rows of a weight; None unless each row has one."""
    pieces = sorted(((row, span, lengths) for lengths, places in parts for span, row in places), key=lambda p: p[0])
    ends = [row + stop - start for row, (start, stop), _ in pieces]
    if [row for row, _, _ in pieces] != [0, *ends[:-1]] or ends[-1] != height:
        return None

    def beside() -> Array:
        import numpy

        return numpy.concat([lengths.load(DType.F64)[start:stop] for _, (start, stop), lengths in pieces])

    factors = [lengths for _, _, lengths in pieces]
    return Factor.of(computed(f"{name}.magnitude", (height,), _stored(factors), beside, _type_of(factors)))


def joined_loras(name: str, parts: Sequence[Part], height: int) -> LoRA:
    """One LoRA of a weight that does what LoRAs of its rows do; rows that no part has stay as they are."""
    loras = [lora for lora, _ in parts]
    first, alike = loras[0], all(lora.scale == loras[0].scale for lora in loras)
    shared = len(loras) > 1 and all(equal_factors(first.A, lora.A) for lora in loras[1:])
    downs, ups = [lora.A for lora in loras[: 1 if shared else None]], [lora.B for lora in loras]
    rank = sum(down.shape[0] for down in downs)
    dtype, wider = _type_of(ups, scaled=not alike), None if alike and _are_moved(ups) else DType.F64

    def below() -> Array:
        import numpy

        return numpy.concat([down.load(DType.F64) for down in downs])

    def beside() -> Array:
        import numpy

        whole = numpy.zeros((height, rank), (wider or dtype).numpy)
        column = 0
        for lora, places in parts:
            part = lora.B.load(wider) if alike else lora.B.load(wider) * lora.scale
            for (start, stop), row in places:
                whole[row : row + stop - start, column : column + lora.rank] = part[start:stop]
            column += 0 if shared else lora.rank
        return whole

    below_each_other = _stack(parts, height) if shared and wider is None else ()
    A = (
        first.A
        if shared
        else Factor.of(computed(f"{name}.A", (rank, first.shape[1]), _stored(downs), below, _type_of(downs)))
    )
    sources = below_each_other or tuple(dict.fromkeys(source for tensor in _stored(ups) for source in tensor.sources))
    B = ComputedTensor(f"{name}.B", dtype, (height, rank), sources, beside, stacked=bool(below_each_other))
    noted = tuple(tensor for lora in loras for tensor in lora.noted)
    return LoRA(A, Factor.of(B), first.scale if alike else 1.0, None, noted)


def _stack(parts: Sequence[Part], height: int) -> tuple[StoredTensor, ...]:
    """The stored B's of all parts from top to bottom, if they are all rows of the weight; else none."""
    found, end = [], 0
    for row, span, factor in sorted(
        ((row, span, lora.B) for lora, places in parts for span, row in places), key=lambda part: part[0]
    ):
        stored = factor.tensors[0]
        if not isinstance(stored, StoredTensor) or (row, span) != (end, (0, factor.shape[0])):
            return ()
        found.append(stored)
        end += factor.shape[0]
    return tuple(found) if end == height else ()


def _stored(factors: Sequence[Factor]) -> list[Tensor]:
    return [tensor for factor in factors for tensor in factor.tensors]


def _type_of(factors: Sequence[Factor], *, scaled: bool = False) -> DType:
    """Numbers that are only moved keep their type."""
    return factor_dtype(factors, folded=scaled or any(len(factor.tensors) > 1 or factor.terms for factor in factors))


def _are_moved(factors: Sequence[Factor]) -> bool:
    """Whether the numbers of all are those of tensors of one type of floats, which need no wider one on their way."""
    types = {tensor.dtype for tensor in _stored(factors)}
    return len(types) == 1 and types.pop().is_float and not any(factor.view for factor in factors)
