# SPDX-License-Identifier: Apache-2.0
"""Which weight of a checkpoint every tensor of a graph holds, by value.

Names are not asked, except of weights that have equal values. A search over few elements of each row proposes; a
comparison of all elements decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from surgery.engine.execute import default_workers
from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.coded_nodes import coded_matrices
from surgery.onnx.locate.compare import differing_rows, is_there, is_weight_there
from surgery.onnx.locate.fits import Near, fitting_weights, measured, nearest_vector, nearest_weights
from surgery.onnx.locate.matrix import Matrix, float_matrices
from surgery.onnx.locate.pieces import LocatedPiece, Place, compact, count_of
from surgery.onnx.locate.rows import RowIndex, scattered_rows
from surgery.onnx.locate.tables import known_table
from surgery.onnx.locate.ties import affinity, names_beside, settled_ties
from surgery.onnx.locate.vectors import Vectors, vectors_in
from surgery.onnx.locate.wanted import Wanted
from surgery.onnx.locate.whole import Beginnings, whole_weights
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.threads import one_thread

if TYPE_CHECKING:
    import numpy

__all__ = ["Located", "located_weights"]

_LEAST = 16  # elements of a matrix that rows are looked for in
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Located:
    """What a graph holds of a checkpoint.

    Attributes:
        graph: The graph.
        weights: What was looked for.
        pieces: What was found, in the order of the graph.
        tables: Tensors that are no weights, by name, with what they are.
        near: Weights that are there with other values.
        others: Names of tensors of numbers of which nothing is known.
        coded: Every tensor of codes by name, whether a weight was found in it or not.
    """

    graph: OnnxGraph
    weights: tuple[Wanted, ...]
    pieces: tuple[LocatedPiece, ...]
    tables: Mapping[str, str] = field(default_factory=dict)
    near: tuple[Near, ...] = ()
    others: tuple[str, ...] = ()
    coded: Mapping[str, CodedMatrix] = field(default_factory=dict)

    @cached_property
    def of_weight(self) -> Mapping[str, tuple[LocatedPiece, ...]]:
        """The pieces of every weight, by label; also those that it shares."""
        found: dict[str, list[LocatedPiece]] = {}
        for piece in self.pieces:
            for weight in (piece.weight, *piece.also):
                found.setdefault(weight.label, []).append(piece)
        return {label: tuple(pieces) for label, pieces in found.items()}

    @cached_property
    def covered(self) -> Mapping[str, float]:
        """The share of the rows of every weight that was found."""
        return {weight.label: _share(weight, self.of_weight.get(weight.label, ())) for weight in self.weights}

    @property
    def whole(self) -> tuple[Wanted, ...]:
        """Weights that are in the graph wholly."""
        return tuple(weight for weight in self.weights if self.covered[weight.label] == 1)

    @property
    def missing(self) -> tuple[Wanted, ...]:
        """Weights that are not, or not wholly."""
        return tuple(weight for weight in self.weights if self.covered[weight.label] < 1)


def _share(weight: Wanted, pieces: Sequence[LocatedPiece]) -> float:
    straight = [piece for piece in pieces if not piece.flipped]
    flipped = [piece for piece in pieces if piece.flipped]
    size = weight.rows * weight.cols if weight.is_vector else weight.rows
    return max(count_of(straight, size) / size, count_of(flipped, weight.cols) / weight.cols if flipped else 0.0)


def located_weights(
    graph: OnnxGraph,
    weights: Sequence[Wanted],
    *,
    touched: Collection[str] | None = None,
    tables: bool = True,
    compare: bool = True,
    workers: int | None = None,
) -> Located:
    """Find weights in a graph.

    Args:
        graph: The graph.
        weights: What is looked for.
        touched: Labels of the weights that matter: what else is found is not compared in full. None is all.
        tables: Whether tensors that are no weight are looked at, too.
        compare: Whether whole weights that are there bit for bit, by their samples, are compared in full; a caller who
            reads them all anyway does that himself.
        workers: Threads that compare.

    Raises:
        MalformedError: a file ends before, or codes and scales do not fit each other.
    """
    search = _Search(graph, weights, touched, workers or default_workers(), compare=compare)
    with one_thread():
        return search.run(tables=tables)


class _Search:
    """One search; what is found leaves less to look for."""

    def __init__(
        self,
        graph: OnnxGraph,
        weights: Sequence[Wanted],
        touched: Collection[str] | None,
        workers: int,
        *,
        compare: bool,
    ) -> None:
        self.compare = compare
        self.graph, self.weights, self.touched, self.workers = graph, tuple(weights), touched, workers
        self.coded = dict(coded_matrices(graph))
        self.plain = {name: matrices for name, matrices in float_matrices(graph) if name not in self.coded}
        self.vectors = Vectors(weights)
        self.found: dict[str, list[LocatedPiece]] = {}

    def run(self, *, tables: bool) -> Located:
        """All of it."""
        beginnings = Beginnings(self.weights)
        proposed: dict[str, list[LocatedPiece]] = {}
        for name, matrices in self.plain.items():
            one = matrices[0] if matrices else None
            if one is not None and one.cols == 1:
                if pieces := vectors_in(one, self.vectors):
                    self.found[name] = pieces
            elif matrices and (pieces := whole_weights(matrices, beginnings)):
                proposed[name] = pieces
        self._keep_whole(proposed)
        self._scattered()
        self._fits()
        order = {name: number for number, name in enumerate((*self.plain, *self.coded))}
        names = sorted(self.found, key=order.__getitem__)
        pieces = settled_ties([piece for name in names for piece in self.found[name]], self.graph.proto)
        coded = {name: matrices[0] for name, matrices in self.coded.items()}
        located = Located(self.graph, self.weights, tuple(pieces), near=self._changed_copies(), coded=coded)
        return self._with_rest(located) if tables else located

    def _changed_copies(self) -> tuple[Near, ...]:
        """Tensors with other values of weights that matter and were found elsewhere: half of a tied pair, say."""
        if self.touched is None or self._left():
            return ()
        every = [weight for weight in self.weights if not weight.is_vector]
        near: list[Near] = []
        for name in (*self.plain, *self.coded):
            places: Sequence[Place] = self.coded.get(name) or self.plain[name]
            if name not in self.found and places and places[0].cols > 1:
                near += [one for one in nearest_weights(places, every) if one.piece.weight.label in self.touched]
        return tuple(near)

    def _matters(self, piece: LocatedPiece) -> bool:
        labels = {weight.label for weight in (piece.weight, *piece.also)}
        return self.touched is None or not labels.isdisjoint(self.touched)

    def _each(self, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        if self.workers < 2 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(self.workers, "surgery-compare") as pool:
            return list(pool.map(work, items))

    def _keep_whole(self, proposed: Mapping[str, list[LocatedPiece]]) -> None:
        every = [(name, piece) for name, pieces in proposed.items() for piece in pieces]
        kept: dict[str, list[LocatedPiece]] = {name: [] for name in proposed}
        for (name, _), piece in zip(every, self._each(self._compared, [piece for _, piece in every]), strict=True):
            kept[name] += [] if piece is None else [piece]
        self.found |= {name: pieces for name, pieces in kept.items() if len(pieces) == len(proposed[name])}

    def _compared(self, piece: LocatedPiece) -> LocatedPiece | None:
        """The piece with those of its weights that are there in full; of several always, of one if that is asked for."""
        if not self._matters(piece) or not (self.compare or piece.also):
            return piece
        there = [one for one in (piece.weight, *piece.also) if is_weight_there(piece, one)]
        return replace(piece, weight=there[0], also=tuple(there[1:])) if there else None

    def _left(self) -> list[Wanted]:
        """Weights that matter and are not found wholly yet."""
        located = Located(self.graph, self.weights, tuple(p for pieces in self.found.values() for p in pieces))
        return [w for w in located.missing if self.touched is None or w.label in self.touched]

    def _scattered(self) -> None:
        """Rows, where whole weights were not found."""
        places = {
            name: matrices
            for name, matrices in self.plain.items()
            if name not in self.found and matrices and matrices[0].numel >= _LEAST and matrices[0].cols > 1
        }
        if not places or not any(not weight.is_vector for weight in self._left()):
            return
        index = RowIndex(self.weights)
        for name, matrices in places.items():
            proposed = scattered_rows(matrices, index)
            kept = [piece for piece in self._each(_only_equal, proposed) if len(piece.rows)]
            if kept:
                self.found[name] = kept

    def _fits(self) -> None:
        """Factors, folds and codes, where values were not found."""
        left = [weight for weight in self._left() if not weight.is_vector]
        beside = names_beside(self.graph.proto) if self.coded or left else {}
        wanted = [w for w in self.weights if not w.is_vector]  # in a second place, too; and those with equal values
        partly = {name for name, pieces in self.found.items() if left and not _fills(pieces)}
        names = [name for name in (*self.plain, *self.coded) if name not in self.found or name in partly]
        by_label = {weight.label: weight for weight in self.weights}

        def fit(name: str) -> list[LocatedPiece]:
            places: Sequence[Place] = self.coded.get(name) or self.plain[name]
            if not places or places[0].cols == 1:
                return []
            texts = beside.get(name, ((name, 0.0),))
            here = [piece.weight for piece in self.found.get(name, ()) if piece.weight not in left]
            some = wanted if name in self.coded or name not in self.found else (*left, *here)
            likely = sorted(some, key=lambda each: -affinity(each, texts))
            found = []
            for piece in fitting_weights(places, likely, self.vectors):
                fold = by_label[piece.fold] if piece.fold else None
                values = None if fold is None else fold.block(0, fold.rows).reshape(-1).astype("f8") + piece.fold_plus
                tries = [(replace(piece, weight=one, also=()), values) for one in (piece.weight, *piece.also)]
                errors = [(one.weight, _error(one, fold)) for one, fold in tries]
                fits = [(weight, error) for weight, error in errors if error is not None]
                if not fits:
                    return []
                also = tuple(weight for weight, _ in fits[1:])
                found.append(replace(piece, weight=fits[0][0], error=fits[0][1], also=also))
            return found

        for name, pieces in zip(names, self._each(fit, names), strict=True):
            if pieces:
                self.found[name] = pieces

    def _with_rest(self, located: Located) -> Located:
        """With what is known of all other tensors."""
        tables: dict[str, str] = {}
        others: list[str] = []
        near: list[Near] = []
        left = [weight for weight in located.missing if not weight.is_vector]
        vectors = [weight for weight in located.missing if weight.is_vector]
        scales = {one.scales.name for (one,) in self.coded.values() if one.scales is not None}
        for name in (*self.plain, *self.coded):
            pieces = self.found.get(name, ())
            if pieces and (not left or _fills(pieces) or pieces[0].weight.is_vector):
                continue
            places: Sequence[Place] = self.coded.get(name) or self.plain[name]
            if not places:
                continue
            first = places[0]
            if pieces:  # beside what was found
                here = [piece.weight for piece in pieces if piece.weight not in left]
                near += [one for one in nearest_weights(places, [*left, *here]) if one.piece.weight in left]
            elif name in scales:
                tables[name] = "scales of codes"
            elif isinstance(first, Matrix) and (what := known_table(first)):
                tables[name] = what
            elif isinstance(first, Matrix) and first.cols == 1 and (close := nearest_vector(first, vectors)):
                near.append(close)
            elif first.cols > 1 and left and (changed := nearest_weights(places, left)):
                near += changed
            else:
                others.append(name)
        return replace(located, tables=tables, near=tuple(near), others=tuple(others))


def _only_equal(piece: LocatedPiece) -> LocatedPiece:
    """The piece without the rows that only began alike."""
    wrong = differing_rows(piece)
    if not wrong:
        return piece
    kept = [number for number in range(len(piece.rows)) if number not in wrong]
    graph_rows, rows = (compact([index[number] for number in kept]) for index in (piece.graph_rows, piece.rows))
    return replace(piece, graph_rows=graph_rows, rows=rows)


def _error(piece: LocatedPiece, fold: numpy.ndarray | None) -> float | None:
    """See `measured`; what should be there bit for bit has no error, or is not there."""
    if not piece.is_scaled and not piece.weight.operations and isinstance(piece.place, Matrix):
        return 0.0 if is_there(piece) else None
    return measured(piece, fold)


def _fills(pieces: Iterable[LocatedPiece]) -> bool:
    """Whether pieces are all of a tensor."""
    some = list(pieces)
    return sum(len(p.graph_rows) * (p.place.rows if p.turned else p.place.cols) for p in some) >= some[0].place.numel
