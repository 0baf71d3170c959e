# SPDX-License-Identifier: Apache-2.0
"""Whether a DoRA says more than a LoRA of as many numbers, and if so, the DoRA.

``use_dora`` holds for every module of a PEFT adapter: linear layers and convolutions get the alternation's magnitudes, embeddings keep
their factors and get the magnitudes of least squares beside them. PEFT has no DoRA for experts that are one parameter, so a model with such
a change stays a LoRA. What is stored as a copy, a bias or rows of tokens is the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from surgery.extraction.factorise import Factored, Piece
from surgery.extraction.findings import Kind, KindFacts
from surgery.extraction.noise import at_rows, read_rows, sample_runs
from surgery.extraction.pairing import Delta, Strip
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.scan import HELD
from surgery.extraction.stream.scratch import ScratchFile, ScratchSlot
from surgery.extraction.targets import LowRankTarget
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.dora import Alternated, Fitted, HeldPair, PairSource, alternate, best_columns, row_share
from surgery_formats.linalg.noise import survival
from surgery_formats.linalg.survival import Survival

__all__ = ["Decision", "Magnitude", "decide", "kept_lora"]

_WORTH_A_LOOK = 0.03
"""Share of what a LoRA leaves that row scales alone explain, beyond chance. Dense changes: below 0.006; rescaled rows: above 0.09."""
_CLEARLY = 0.9
"""A DoRA is taken where it leaves less than this of what a LoRA of as many numbers leaves."""
_NORM_ROUNDING = {DType.BF16: 1.66e-3, DType.F16: 2.08e-4}
"""PEFT rounds row norms to the type of the layer's weight; the relative error this makes in a row, root mean square over a binade."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Of one unit.

    Attributes:
        values: ``(1, rows)``, in the scratch file.
        gains: What each row of ``W + BA`` is multiplied with, likewise.
        per_row: False for an embedding: PEFT's belong to its columns.
        size: ``||W'||_F``; 0 for an embedding, which nobody asks for.
        rounding: Energy that PEFT's rounding of norms adds where the model is loaded in its stored type.
    """

    values: ScratchSlot
    gains: ScratchSlot
    per_row: bool
    size: float
    rounding: float

    @property
    def count(self) -> int:
        """Numbers."""
        return self.values.shape[1]

    def load_gains(self) -> torch.Tensor:
        """``(rows,)``."""
        return self.gains.scratch.get(self.gains)[0]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen; nothing takes the place of the LoRA's factors unless it is a DoRA.

    Attributes:
        facts: What either leaves.
        factored: By unit path, what takes the place of the LoRA's factors.
        magnitudes: By unit path.
        kept: What a merge of the LoRA would keep, by path of the units where that was worked out on the way.
    """

    facts: KindFacts
    factored: Mapping[str, Factored] = field(default_factory=dict)
    magnitudes: Mapping[str, Magnitude] = field(default_factory=dict)
    kept: Mapping[str, Survival] = field(default_factory=dict)


def kept_lora(why: str, kept: Mapping[str, Survival] | None = None, **figures: float) -> Decision:
    """A LoRA, for a reason."""
    return Decision(KindFacts("lora", why, **figures), kept=kept or {})


def decide(
    kind: Kind,
    units: Sequence[LowRankTarget],
    factored: Mapping[str, Factored],
    ranks: Mapping[str, int],
    lora_ranks: Mapping[str, int],
    scratch: ScratchFile,
    device: str,
    workers: int,
    tuned: Path,
) -> Decision:
    """Choose between the kinds.

    Args:
        kind: What the user wants.
        units: What becomes factors.
        factored: The LoRA's, by unit path.
        ranks: Of a DoRA, by path.
        lora_ranks: Of a LoRA; under a budget they are higher, for a DoRA spends a part of it on magnitudes.
        scratch: Where new factors go.
        device: Where SVDs are made.
        workers: Threads.
        tuned: For messages.

    Raises:
        FitError: a DoRA was asked for, and no module can take one.
    """
    able = [unit for unit in units if unit.form in ("linear", "conv")]
    if kind == "lora":
        return kept_lora("as asked")
    if reason := _obstacle(units, able):
        if kind == "dora":
            raise FitError(f"no DoRA can be made: {reason}", file=tuned, hint="--kind lora")
        return kept_lora(reason)
    lora = _relative(able, factored, (factored[unit.path].residual(lora_ranks[unit.path]) for unit in able))
    share, kept = math.nan, dict[str, Survival]()
    if kind == "auto":
        share, kept = _row_share(able, factored, lora_ranks, workers)
        if share < _WORTH_A_LOOK:
            why = f"rescaling rows would take away {max(share, 0):.1%} of what a LoRA leaves"
            return kept_lora(why, kept, lora=lora, rows=share)
    try:
        made = _alternated(able, ranks, device, workers, scratch, factored)
        rest = {u.path: _beside(u, factored[u.path], ranks[u.path], scratch) for u in units if u.form == "embedding"}
    except FitError as error:
        if kind == "dora":
            raise
        return kept_lora(error.message, kept, lora=lora, rows=share)
    dora = _relative(able, factored, (one.factored.residual(ranks[path]) for path, one in made.items()))
    equal = lora
    if ranks == lora_ranks:
        equal = _relative(able, factored, (_equal(factored[u.path], ranks[u.path], made[u.path]) for u in able))
    rounding = _relative(able, factored, (one.magnitude.rounding for one in made.values()))
    wins = math.hypot(dora, rounding) < _CLEARLY * equal
    why = (
        f"a DoRA leaves {dora:.2%} of the change of {len(able)} modules, a LoRA of as many numbers at least {equal:.2%}"
    )
    if rounding > 0:
        why += f"; PEFT rounds norms, which in the model's stored type adds {rounding:.2%} to the DoRA's"
    figures = {"lora": lora, "equal": equal, "dora": dora, "rows": share, "rounding": rounding}
    if kind == "auto" and not wins:
        return kept_lora(why, kept, **figures)
    every = made | rest
    return Decision(
        KindFacts("dora", why if wins else f"as asked; {why}", **figures),
        {path: one.factored for path, one in every.items()},
        {path: one.magnitude for path, one in every.items()},
    )


def _obstacle(units: Sequence[LowRankTarget], able: Sequence[LowRankTarget]) -> str:
    if not able:
        return "no linear layer or convolution becomes factors"
    if experts := [unit.path for unit in units if unit.form == "experts"]:
        return f"PEFT has no DoRA for experts ('{experts[0]}'), and an adapter is DoRA for all modules or none"
    return ""


def _relative(units: Iterable[LowRankTarget], factored: Mapping[str, Factored], left: Iterable[float]) -> float:
    energy = math.fsum(factored[unit.path].energy for unit in units)
    return math.sqrt(max(math.fsum(left), 0.0) / energy) if energy else 0.0


def _row_share(
    units: Sequence[LowRankTarget], factored: Mapping[str, Factored], ranks: Mapping[str, int], workers: int
) -> tuple[float, dict[str, Survival]]:
    """Share of what the LoRA leaves that lies along the rows that it makes, from some rows of each matrix.

    Where these are stored rows, what a merge of the LoRA would keep of them is told too: the noise report looks at the same.
    """
    shares: dict[str, float] = {}
    kept: dict[str, Survival] = {}

    def work(unit: LowRankTarget, stop: Callable[[], bool]) -> None:
        if stop():
            return
        left, right = factored[unit.path].factors(0, ranks[unit.path])
        runs, base, tuned = _sampled(unit.deltas[0])
        change = at_rows(left, runs) @ right
        along, energy = row_share((tuned - base) - change.to(base.dtype), base + change)
        shares[unit.path] = along / energy if energy > 0 else 0.0
        if not unit.deltas[0].transposed:
            kept[unit.path] = survival(base, change, unit.deltas[0].strips[0].base.tensor.dtype)

    in_threads([partial(work, unit) for unit in units], workers)
    left = {unit.path: factored[unit.path].residual(ranks[unit.path]) for unit in units}
    total = math.fsum(left.values())
    return (math.fsum(left[path] * shares[path] for path in left) / total if total > 0 else 0.0), kept


def _sampled(delta: Delta) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """Some logical rows: their numbers, W and W' there."""
    pair = _pair(delta)
    runs = list(sample_runs(*pair.shape))
    if isinstance(pair, HeldPair):
        return runs, at_rows(pair.base, runs), at_rows(pair.tuned, runs)
    (strip,) = delta.strips
    base, tuned = (read_rows(side, strip.first, runs) for side in (strip.base, strip.tuned))
    exact = torch.promote_types(base.dtype, tuned.dtype)
    return runs, base.to(exact), tuned.to(exact)


@dataclass(frozen=True)
class _StoredRows:
    """A pair read when asked; satisfies `surgery_formats.linalg.dora.PairSource`."""

    strip: Strip

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.strip.last - self.strip.first, self.strip.tuned.shape[1]

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Widened to what both sides fit in."""
        low, high = self.strip.first + start, self.strip.first + stop
        base, tuned = self.strip.base.get(low, high), self.strip.tuned.get(low, high)
        exact = torch.promote_types(base.dtype, tuned.dtype)
        return base.to(exact), tuned.to(exact)


def _pair(delta: Delta) -> PairSource:
    """As it lies in the files, or turned and held where the files hold its transpose."""
    (strip,) = delta.strips  # only experts have several
    stored = _StoredRows(strip)
    return _held(stored, turned=True) if delta.transposed else stored


def _held(pair: _StoredRows, *, turned: bool) -> HeldPair:
    base, tuned = pair.rows(0, pair.shape[0])
    return HeldPair(base.T.contiguous(), tuned.T.contiguous()) if turned else HeldPair(base, tuned)


@dataclass(frozen=True, slots=True)
class _DoraCandidate:
    factored: Factored
    magnitude: Magnitude


def _alternated(
    units: Sequence[LowRankTarget],
    ranks: Mapping[str, int],
    device: str,
    workers: int,
    scratch: ScratchFile,
    factored: Mapping[str, Factored],
) -> dict[str, _DoraCandidate]:
    found: dict[str, _DoraCandidate] = {}

    def work(unit: LowRankTarget, stop: Callable[[], bool]) -> None:
        if stop():
            return
        delta = unit.deltas[0]
        pair = _pair(delta)
        if isinstance(pair, _StoredRows) and math.prod(pair.shape) <= HELD["cpu"]:
            pair = _held(pair, turned=False)
        try:
            made = alternate(pair, ranks[unit.path], device=device)
        except FitError as error:
            raise FitError(error.message, file=_file(delta), tensor=unit.names[0]) from error
        found[unit.path] = _stored(unit, made, factored[unit.path], scratch)

    in_threads([partial(work, unit) for unit in units], workers)
    return {unit.path: found[unit.path] for unit in units}


def _file(delta: Delta) -> Path:
    return delta.strips[0].tuned.tensor.file.path


def _stored(unit: LowRankTarget, made: Alternated, lora: Factored, scratch: ScratchFile) -> _DoraCandidate:
    left = scratch.put(made.B.T)
    right = scratch.put(made.A)
    # the square roots of the singular values are in the factors' lengths; they are known to be all that is kept
    values = tuple((made.B.norm(dim=0) * made.A.norm(dim=1)).tolist())
    piece = Piece(left, right, values, lora.energy, made.residual**2, 1.0, lora.pieces[0].edge)
    return _DoraCandidate(Factored(unit, (piece,)), _magnitude(unit, made, made.size, scratch))


def _magnitude(unit: LowRankTarget, found: Alternated | Fitted, size: float, scratch: ScratchFile) -> Magnitude:
    step = _NORM_ROUNDING.get(unit.deltas[0].strips[0].base.tensor.dtype, 0.0)
    places = scratch.put(found.magnitude[None]), scratch.put(found.gain[None])
    return Magnitude(*places, unit.form != "embedding", size, (step * size) ** 2)


def _equal(lora: Factored, rank: int, made: _DoraCandidate) -> float:
    """Least energy that a LoRA could leave with the DoRA's numbers: part of the next direction, at most as large as the last known."""
    (piece,) = lora.pieces
    following = piece.values[rank : rank + 1] or piece.values[-1:]
    more = made.magnitude.count / lora.unit.cost
    return max(piece.residual(rank) - more * math.fsum(value * value for value in following), 0.0)


def _beside(unit: LowRankTarget, lora: Factored, rank: int, scratch: ScratchFile) -> _DoraCandidate:
    """An embedding's factors as they are, and the best lengths of its columns."""
    left, right = lora.factors(0, rank)
    (piece,) = lora.pieces
    fitted = best_columns(_StoredRows(unit.deltas[0].strips[0]), left, right)
    places = scratch.put(left.T), scratch.put(right)
    kept = Piece(*places, piece.values[:rank], lora.energy, fitted.residual**2, piece.bound, piece.edge)
    return _DoraCandidate(Factored(unit, (kept,)), _magnitude(unit, fitted, 0.0, scratch))
