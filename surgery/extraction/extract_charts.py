# SPDX-License-Identifier: Apache-2.0
"""Pictures of an extraction: what ranks cost and leave, spectra beside the edge of noise, and what is missing where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from surgery.extraction.figures import AS_AUTO, ExtractRow, RankChoice
from surgery.extraction.spectra import RoleSpectrum
from surgery.reports.drawings import Lines, Mark
from surgery.reports.layer_grid import layer_chart
from surgery.reports.sections import Chart, Column, Facts, Table
from surgery.reports.values import Cell, Phrase, Piece, Value

__all__ = ["extract_charts", "knee_of", "rank_advice", "rank_chart"]

_LEAST_FALL = 0.01
"""Of the change: where all ranks together bring less, none is a reason to choose."""
_NEARLY = 0.9  # of what the best rank recovers
_OF = {"attention": "only attention", "mlp": "only MLP", AS_AUTO: "all, as auto"}
_CHOICES = (
    Column("rank", "integer", says="directions that each matrix gets"),
    Column("factors for", says="the layers that get factors; the change of all others is left out, and counted as missing"),
    Column("missing of all", "share", says="of the change of the whole model, what such an adapter lacks (Frobenius norm)"),
    Column("parameters", "count", says="numbers in the adapter"),
    Column("size", "bytes"),
)  # fmt: skip

_WORTH = (
    Column("bits per byte", "fixed", 4, says="that BASE with such an adapter needs for the text: fewer are better"),
    Column("recovered", "share", 1, says="of TUNED's gain on the text"),
)


def _layers_of(choice: RankChoice) -> str:
    """Which layers get factors, in words."""
    return _OF.get(choice.layers, choice.layers)


def rank_chart(choices: Sequence[RankChoice]) -> Chart:
    """What each rank leaves, over the rank and over the size of the adapter, with the knee and the choice of ``auto``.

    Beside it what those that were measured on a text are worth there: a share of the gain, or bits where there was none.
    """
    measured = any(choice.score is not None for choice in choices)
    rows = tuple(_choice(choice, measured=measured) for choice in choices)
    of_all = [choice for choice in choices if choice.layers == "all"]
    knee = knee_of([(choice.rank, choice.residual) for choice in of_all])
    auto = next((choice for choice in choices if choice.layers == AS_AUTO), None)
    ranks, sizes = [], []
    if knee is not None:
        ranks.append(Mark(f"knee: {knee}", x=knee))
        sizes.append(
            Mark(f"knee: rank {knee}", x=next(float(choice.nbytes) for choice in of_all if choice.rank == knee))
        )
    if auto is not None:
        ranks.append(Mark(f"auto: up to {auto.rank}", x=auto.rank))
        sizes.append(Mark("auto", x=float(auto.nbytes)))
    drawings: tuple[Lines, ...] = (
        Lines(x=0, y=(2,), by=1, log_x=True, marks=tuple(ranks)),
        Lines(x=4, y=(2,), by=1, log_x=True, marks=tuple(sizes)),
    )
    if not measured:
        return Chart("Missing of the whole change, by rank and size", Table(_CHOICES, rows), drawings)
    shown = (5,) if all(choice.recovered is None for choice in choices) else (6,)
    drawings += Lines(x=0, y=shown, log_x=True), Lines(x=4, y=shown, log_x=True)
    title = "Missing of the whole change, and recovered on the text, by rank and size"
    return Chart(title, Table(_CHOICES + _WORTH, rows), drawings)


def _choice(choice: RankChoice, *, measured: bool) -> tuple[Cell, ...]:
    row = (choice.rank, _layers_of(choice), choice.residual, choice.parameters, choice.nbytes)
    if not measured:
        return row
    return *row, None if choice.score is None else choice.score.bits_per_byte, choice.recovered


def rank_advice(choices: Sequence[RankChoice]) -> Facts:
    """Which rank to take: what the chart marks, and what neither of its marks says."""
    of_all = {choice.rank: choice for choice in choices if choice.layers == "all"}
    auto = next((choice for choice in choices if choice.layers == AS_AUTO), None)
    knee = knee_of([(rank, choice.residual) for rank, choice in of_all.items()])
    bend: Phrase = f"there is no knee: none of ranks {min(of_all)} to {max(of_all)} stands out"
    if knee is not None:
        bend = f"the knee is at rank {knee} (", Value(of_all[knee].nbytes, "bytes"), "): more directions bring less"
    own: Phrase = "what rank auto takes is not known: more directions may be above the noise than were looked at"
    if auto is not None:
        own = f"rank auto takes up to {auto.rank} (", Value(auto.nbytes, "bytes"), ")"
    worth: Phrase = "what a rank is worth may be far more than its missing part suggests: --eval TEXT measures it"
    shares = {rank: choice.recovered for rank, choice in of_all.items() if choice.recovered is not None}
    if shares and (best := max(shares.values())) > 0:
        rank = min(rank for rank, share in shares.items() if share >= _NEARLY * best)
        more = "more directions little more" if rank < max(shares) else "no smaller rank nearly as much"
        worth = f"rank {rank} recovers ", Value(shares[rank], "share", 1), f" on the text, and {more}"
    return Facts((("choice", bend), ("", own), ("", worth)))


def knee_of(points: Sequence[tuple[int, float]]) -> int | None:
    """The rank from which on more directions bring less: the point farthest below the line from the first to the last.

    Over the logarithm of the rank, both axes scaled to 1, as Kneedle does (Satopaa et al. 2011, "Finding a Kneedle in a
    Haystack"). None where the curve has no knee: it is straight, or bends the other way.
    """
    if len(points) < 3:
        return None
    xs = [math.log2(rank) for rank, _ in points]
    fall = points[0][1] - points[-1][1]
    if fall < _LEAST_FALL:
        return None
    below = [
        (1 - (x - xs[0]) / (xs[-1] - xs[0])) - (left - points[-1][1]) / fall
        for x, (_, left) in zip(xs, points, strict=True)
    ]
    most = max(below)
    return points[below.index(most)][0] if most > 0.05 else None


def extract_charts(spectra: Sequence[RoleSpectrum], rows: Sequence[ExtractRow]) -> Iterator[Chart]:
    """Spectra by role, and how large the change is and what is missing of it by layer."""
    if any(len(spectrum.values) > 1 for spectrum in spectra):
        yield _spectra(spectra)
    changed = [row for row in rows if row.energy > 0]
    sizes = ((row.name, row.energy, float(math.prod(row.shape))) for row in changed)
    missing = ((row.name, row.energy * row.residual**2, row.energy) for row in changed if row.form)
    charts = (
        layer_chart("Change of a value (RMS, absolute)", sizes, _root, log=True),
        layer_chart("Missing of the change of each weight", missing, _root, type="share", digits=2, low=0.0, high=1.0),
    )
    yield from filter(None, charts)


def _spectra(spectra: Sequence[RoleSpectrum]) -> Chart:
    by_edge = all(spectrum.by_edge for spectrum in spectra)
    unit = "times the edge of noise" if by_edge else "of the first"
    columns = Column("direction", "integer"), *(Column(spectrum.role, "number", 3) for spectrum in spectra)
    longest = max(len(spectrum.values) for spectrum in spectra)
    rows = tuple(
        (index + 1, *(spectrum.values[index] if index < len(spectrum.values) else None for spectrum in spectra))
        for index in range(longest)
    )
    marks = (Mark("edge of rounding noise", y=1.0),) if by_edge else ()
    drawing = Lines(x=0, y=tuple(range(1, len(columns))), log_x=True, log_y=True, label="singular value", marks=marks)
    return Chart(f"Spectra of the change, {unit}", Table(columns, rows), drawing, _above(spectra, by_edge=by_edge))


def _above(spectra: Sequence[RoleSpectrum], *, by_edge: bool) -> Phrase:
    said: list[Piece] = []
    for spectrum in spectra:
        said += [", " if said else "", f"{spectrum.role} "]
        if by_edge:
            said += ["" if spectrum.complete else "at least ", Value(spectrum.above, "number", 3)]
            least, most = spectrum.of
            said.append(f" of {most}" if least == most else f" (median) of {least} to {most}")
        else:
            said.append(f"{len(spectrum.values)} directions")
    return (*said, " directions above the noise" if by_edge else "")


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.nan
