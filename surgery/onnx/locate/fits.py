# SPDX-License-Identifier: Apache-2.0
"""Weights that a graph does not hold bit for bit: scaled, folded with a norm, as codes, or changed.

Whole weights are tried one below the other, as in `surgery.onnx.locate.whole`, on a few elements. What is proposed here is
compared in full by `measured`; a weight that was changed is never claimed, only told with its distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.onnx.locate.aspect import Aspect
from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.compare import weight_blocks
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, Place
from surgery.onnx.locate.vectors import Vectors
from surgery.onnx.locate.wanted import Wanted
from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy

__all__ = ["NEAR", "Near", "fitting_weights", "measured", "nearest_vector", "nearest_weights"]

_ROUNDING = {DType.F64: 2.0**-50, DType.F32: 2.0**-22, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}
"""Relative error of a product that was rounded once or twice."""
_SMALLEST = {DType.F64: 0.0, DType.F32: 1e-37, DType.F16: 2.0**-23, DType.BF16: 1e-37}
NEAR = 0.5
"""Of a weight: the greatest distance, in its norm, at which another is taken for a changed copy of it."""
_SCALED = 1e-9
"""The misfit of rows with factors of their own: any other way is better."""
_APART = 2.0  # times as far the next vector is, at least
_SUMMED = 2.0**-20
"""Error of a base and an update that others added in another order, relative to the greatest value."""
_FREE = 3  # elements of a row that its factor is told by, at least


@dataclass(frozen=True, slots=True)
class Near:
    """A weight that is in the graph, but with other values.

    Attributes:
        piece: Where.
        distance: Norm of the difference in that of the weight, of a few elements.
    """

    piece: LocatedPiece
    distance: float


@dataclass(frozen=True, slots=True)
class _Fit:
    piece: LocatedPiece
    misfit: float


def fitting_weights(places: Sequence[Place], weights: Sequence[Wanted], vectors: Vectors) -> list[LocatedPiece]:
    """Weights that one of these ways to see a tensor consists of, apart from a factor, a folded vector or rounding to codes.

    Args:
        places: The ways.
        weights: Those that are looked for, in the order in which they are tried.
        vectors: Those that may be folded into columns.
    """
    for place in places:
        for turned in (False, True):
            aspect = Aspect(place, turned)
            if min(aspect.rows, aspect.width) < 2:
                continue
            pieces: list[LocatedPiece] = []
            at = 0
            while at < aspect.rows:
                fit = _best(aspect, at, place, weights, vectors)
                if fit is None:
                    break
                pieces.append(fit)
                at += len(fit.rows)
            if pieces and at == aspect.rows:
                return pieces
    return []


def _best(aspect: Aspect, at: int, place: Place, weights: Iterable[Wanted], vectors: Vectors) -> LocatedPiece | None:
    fits: list[_Fit] = []
    for weight in weights:
        for flipped in (False, True):
            rows, width = (weight.cols, weight.rows) if flipped else (weight.rows, weight.cols)
            if width != aspect.width or at + rows > aspect.rows or weight.is_vector:
                continue
            piece = LocatedPiece(weight, place, aspect.turned, flipped, range(at, at + rows), range(rows))
            fit = _fit(aspect, at, piece, vectors)
            if fit is not None:
                fits.append(fit)
    if not fits:
        return None
    best = min(fits, key=lambda fit: fit.misfit)
    coded = isinstance(place, CodedMatrix)  # within a step the nearest need not be the one that was rounded
    also = [fit.piece for fit in fits if fit is not best and (coded or fit.misfit == best.misfit)]
    return replace(best.piece, also=tuple(dict.fromkeys(one.weight for one in also if _is_alike(one, best.piece))))


def _is_alike(one: LocatedPiece, other: LocatedPiece) -> bool:
    """Whether two weights lie in the same way in the same place."""
    ways = [(piece.flipped, len(piece.rows), piece.factor, piece.fold, piece.fold_plus) for piece in (one, other)]
    return ways[0] == ways[1]


def _samples(aspect: Aspect, at: int, piece: LocatedPiece) -> tuple[list[int], list[int], numpy.ndarray, numpy.ndarray]:
    """Rows and columns of a few elements, as the piece sees them, with the weight's values and the graph's, float64."""
    rows, cols = piece.weight.sampled
    mine = piece.weight.sample
    if piece.flipped:
        rows, cols, mine = cols, rows, mine.T
    there = aspect.points([at + row for row in rows], cols)
    return rows, cols, mine.astype("f8"), there.astype("f8")


def _fit(aspect: Aspect, at: int, piece: LocatedPiece, vectors: Vectors) -> _Fit | None:
    import numpy

    rows, cols, mine, there = _samples(aspect, at, piece)
    if not numpy.isfinite(there).all() or not mine.any() or (mine == mine[0, 0]).all():
        return None
    place = piece.place
    if isinstance(place, CodedMatrix):
        where = ([at + row for row in rows], cols)
        if piece.turned:
            slack = place.slack_at(where[1], where[0], mine.T).T
        else:
            slack = place.slack_at(*where, mine)
        off = numpy.abs(mine - there)
        return _Fit(piece, float(off.sum())) if (off <= slack).all() else None
    factor = float((mine * there).sum() / (mine * mine).sum())
    for constant in (_tidy(factor), factor) if factor else ():
        if _equal(constant * mine, there, place.dtype, summed=bool(piece.weight.operations)):
            return _Fit(replace(piece, factor=constant), 0.0)
    folded = _folded(piece, cols, mine, there, vectors)
    if folded is not None:
        return _Fit(folded, 0.0)
    scaled = _scaled(piece, mine, there)
    return None if scaled is None else _Fit(scaled, _SCALED)


def _equal(mine: numpy.ndarray, there: numpy.ndarray, dtype: DType, *, summed: bool = False) -> bool:
    """Whether values are equal but for rounding; of sums, which may cancel each other, but for that of their terms."""
    import numpy

    slack = _ROUNDING[dtype] * numpy.abs(there) + _SMALLEST[dtype]
    if summed:
        slack += _SUMMED * float(numpy.abs(mine).max(initial=0))
    return bool((numpy.abs(mine - there) <= slack).all())


def _tidy(factor: float) -> float:
    """1, or one over the root of a whole number, if the factor is that but for rounding."""
    if abs(factor - 1) < 1e-4:
        return 1.0
    square = 1 / factor**2
    if square >= 1.5 and abs(square - round(square)) < square * 1e-3:
        return float((1 if factor > 0 else -1) / round(square) ** 0.5)
    return factor


def _folded(
    piece: LocatedPiece, cols: Sequence[int], mine: numpy.ndarray, there: numpy.ndarray, vectors: Vectors
) -> LocatedPiece | None:
    """The piece with the vector of the base that its columns are multiplied by, if there is one."""
    import numpy

    if piece.flipped:
        return None
    usable = (mine != 0).all(axis=0) & (there != 0).all(axis=0)
    if usable.sum() < max(2, len(cols) // 2):
        return None
    assert isinstance(piece.place, Matrix)
    dtype = piece.place.dtype
    ratios, own = there[:, usable] / mine[:, usable], numpy.abs(mine[:, usable])
    allowed = 4 * (_ROUNDING[dtype] * numpy.abs(ratios[0]) + _SMALLEST[dtype] * (1 / own + 1 / own[0]))
    if not (numpy.abs(ratios - ratios[0]) <= allowed).all():
        return None  # no vector can be what the columns were multiplied by
    for vector in vectors.weights:
        if vector.rows * vector.cols != piece.weight.cols:
            continue
        values = vector.block(0, vector.rows).reshape(-1)[list(cols)].astype("f8")
        for plus in (0.0, 1.0):
            factors = values + plus
            if (factors == factors[0]).all():
                continue
            if _equal(mine * factors, there, piece.place.dtype):
                return replace(piece, fold=vector.label, fold_plus=plus)
    return None


def _scaled(piece: LocatedPiece, mine: numpy.ndarray, there: numpy.ndarray) -> LocatedPiece | None:
    """The piece with a factor for each row, if all rows are those of the weight but for that."""
    assert isinstance(piece.place, Matrix)
    if piece.flipped or mine.shape[1] < _FREE or (mine == mine[:, :1]).all():
        return None
    factors = _by_row(mine, there)
    if factors is None or not _equal(mine * factors[:, None], there, piece.place.dtype):
        return None
    found: list[float] = []
    for _, _, block, there in _sides(piece):
        factors = _by_row(block.astype("f8"), there.astype("f8"))
        if factors is None:
            return None
        found += factors.tolist()
    return replace(piece, row_factors=tuple(found))


def _by_row(mine: numpy.ndarray, there: numpy.ndarray) -> numpy.ndarray | None:
    """What each row is multiplied by; None if a row tells nothing."""
    square = (mine * mine).sum(axis=1)
    product = (mine * there).sum(axis=1)
    return product / square if square.all() and product.all() else None


def measured(piece: LocatedPiece, fold: numpy.ndarray | None) -> float | None:
    """The greatest error of a fit over all its elements, in steps of the quantiser; None if one is beyond what it may be.

    Args:
        piece: What was proposed.
        fold: The vector that the columns of the weight are multiplied by, if there is one.
    """
    import numpy

    worst = 0.0
    place = piece.place
    for span, across, block, there in _sides(piece):
        mine = block.astype("f8") * piece.factor
        if piece.row_factors:
            mine *= numpy.array(piece.row_factors[span[0] - piece.graph_rows[0] : span[1] - piece.graph_rows[0]])[
                :, None
            ]
        if fold is not None:
            mine *= fold[across[0] : across[1]]
        off = numpy.abs(mine - there)
        if isinstance(place, CodedMatrix):
            slack = _slack(place, piece.turned, span, across, mine)
            if not (off <= slack).all():
                return None
            worst = max(worst, float((off / numpy.maximum(_steps(place, piece.turned, span, across), 1e-30)).max()))
        elif not _equal(mine, there.astype("f8"), place.dtype, summed=bool(piece.weight.operations)):
            return None
    return worst


Span = tuple[int, int]


def _sides(piece: LocatedPiece) -> Iterator[tuple[Span, Span, numpy.ndarray, numpy.ndarray]]:
    """Rows and columns of the graph's matrix, as a piece sees it, with the weight's values and the graph's, in blocks."""
    place = piece.place
    at, width = piece.graph_rows[0], Aspect(place, piece.turned).width
    held = place.block(0, place.rows) if piece.turned or piece.flipped else None
    for start, stop, block in weight_blocks(piece):
        span, across = (at + start, at + stop), (0, width)
        if piece.flipped:
            block, span, across = block.T, (at, at + len(piece.rows)), (start, stop)
        if held is None:
            there = place.block(*span)[:, across[0] : across[1]]
        elif piece.turned:
            there = held[across[0] : across[1], span[0] : span[1]].T
        else:
            there = held[span[0] : span[1], across[0] : across[1]]
        yield span, across, block, there


def _slack(
    place: CodedMatrix, turned: bool, span: tuple[int, int], across: tuple[int, int], mine: numpy.ndarray
) -> numpy.ndarray:
    import numpy

    whole = numpy.zeros((across[1] - across[0], place.cols) if turned else (span[1] - span[0], place.cols))
    if turned:
        whole[:, span[0] : span[1]] = mine.T
        return place.slack(*across, whole)[:, span[0] : span[1]].T
    whole[:, across[0] : across[1]] = mine
    return place.slack(*span, whole)[:, across[0] : across[1]]


def _steps(place: CodedMatrix, turned: bool, span: tuple[int, int], across: tuple[int, int]) -> numpy.ndarray:
    steps: numpy.ndarray
    if turned:
        steps = abs(place.spread(place.scale_values, *across)[:, span[0] : span[1]].T)
    else:
        steps = abs(place.spread(place.scale_values, *span)[:, across[0] : across[1]])
    return steps


def nearest_weights(places: Sequence[Place], weights: Sequence[Wanted]) -> list[Near]:
    """The weights of which a tensor holds other values, one below the other, if it is made of such ones."""
    import numpy

    for place in places:
        for turned in (False, True):
            aspect = Aspect(place, turned)
            found: list[Near] = []
            at = 0
            while at < aspect.rows:
                best: Near | None = None
                for weight in weights:
                    if weight.cols != aspect.width or at + weight.rows > aspect.rows or weight.is_vector:
                        continue
                    rows = range(at, at + weight.rows)
                    piece = LocatedPiece(weight, place, turned, False, rows, range(weight.rows))
                    _, _, mine, there = _samples(aspect, at, piece)
                    norm = float(numpy.linalg.norm(mine))
                    distance = float(numpy.linalg.norm(mine - there)) / norm if norm else 2.0
                    if distance < NEAR and (best is None or distance < best.distance):
                        best = Near(piece, distance)
                if best is None:
                    break
                found.append(best)
                at += len(best.piece.rows)
            if found and at == aspect.rows:
                return found
    return []


def nearest_vector(place: Matrix, weights: Sequence[Wanted]) -> Near | None:
    """The vector of which a tensor holds other values, if one is by far the nearest."""
    import numpy

    there = place.flat(0, place.numel).astype("f8")
    found: list[Near] = []
    for weight in weights:
        if not weight.is_vector or weight.rows * weight.cols != place.numel:
            continue
        mine = weight.block(0, weight.rows).reshape(-1).astype("f8")
        norm = float(numpy.linalg.norm(mine))
        whole = range(place.numel)
        distance = float(numpy.linalg.norm(mine - there)) / norm if norm else 2.0
        found.append(Near(LocatedPiece(weight, place, False, False, whole, whole), distance))
    found.sort(key=lambda one: one.distance)
    if not found or found[0].distance >= NEAR:
        return None
    return found[0] if len(found) == 1 or found[0].distance * _APART <= found[1].distance else None
