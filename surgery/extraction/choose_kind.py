# SPDX-License-Identifier: Apache-2.0
"""Choose between LoRA and DoRA: compute the DoRA where it may hold more of the change than a LoRA of as many numbers.

PEFT's ``use_dora`` holds for every module of an adapter. Linear layers and convolutions get factors and magnitudes by
alternation; embeddings keep their factors and get the magnitudes that fit best. PEFT has no DoRA for experts stacked in
one parameter, so a model with such a change stays a LoRA. Copies, biases and token rows are the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from surgery.extraction.factorise import FactorisedMatrix, TargetFactors, row_lengths
from surgery.extraction.findings import Kind, KindFacts
from surgery.extraction.pairing import Delta, Strip, path_of
from surgery.extraction.sampling import at_rows, read_runs, sample_runs
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.scan_plan import HELD
from surgery.extraction.stream.scratch import ScratchFile, ScratchSlot, Workspace
from surgery.extraction.targets import LowRankTarget
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.fit_dora import (
    DoRAFit,
    HeldPair,
    Magnitudes,
    PairSource,
    alternate,
    best_columns,
    row_share,
)
from surgery_formats.linalg.noise import survival
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.base import read_values

__all__ = ["KindDecision", "Magnitude", "choose_kind", "lora_decision"]

_WORTH_A_LOOK = 0.03
"""Share of what a LoRA leaves that row scales alone explain, beyond chance. Dense changes: below 0.006; rescaled rows:
above 0.09."""
_CLEARLY = 0.9
"""A DoRA is taken where it leaves less than this of what a LoRA of as many numbers leaves."""
_NORM_ROUNDING = {DType.BF16: 1.66e-3, DType.F16: 2.08e-4}
"""PEFT rounds row norms to the type of the layer's weight; the relative error this makes in a row, root mean square
over a binade."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The magnitudes of one target.

    Attributes:
        values: ``(1, rows)``, in the scratch file.
        gains: Factor of each row of ``W + BA``, likewise.
        size: ``||W'||_F``; 0 for an embedding, where it is not needed.
        rounding: Error energy that PEFT's rounding of norms adds in a model that is loaded in its stored type.
    """

    values: ScratchSlot
    gains: ScratchSlot
    size: float
    rounding: float

    @property
    def count(self) -> int:
        """Number of magnitudes."""
        return self.values.shape[1]

    def load_gains(self) -> Array:
        """The gains, ``(rows,)``."""
        return self.gains.read()[0]


@dataclass(frozen=True, slots=True)
class KindDecision:
    """The kind that was chosen, and the factors of a DoRA.

    Attributes:
        facts: What either kind leaves.
        factored: A DoRA's factors, which replace the LoRA's, by target path; empty for a LoRA.
        magnitudes: By target path; empty for a LoRA.
        survivals: What a merge of the LoRA would keep, for the targets where that was computed on the way.
    """

    facts: KindFacts
    factored: Mapping[str, TargetFactors] = field(default_factory=dict)
    magnitudes: Mapping[str, Magnitude] = field(default_factory=dict)
    survivals: Mapping[str, Survival] = field(default_factory=dict)


def lora_decision(why: str, survivals: Mapping[str, Survival] | None = None, **figures: float) -> KindDecision:
    """The decision for a LoRA; `why` is shown to the user."""
    return KindDecision(KindFacts("lora", why, **figures), survivals=survivals or {})


def choose_kind(
    kind: Kind,
    targets: Sequence[LowRankTarget],
    factored: Mapping[str, TargetFactors],
    ranks: Mapping[str, int],
    lora_ranks: Mapping[str, int],
    workspace: Workspace,
    tuned: Path,
) -> KindDecision:
    """Choose between LoRA and DoRA.

    `factored` has the LoRA's factors by target path, `ranks` the ranks of a DoRA, and `lora_ranks` those of a LoRA:
    higher under a budget, of which a DoRA spends a part on magnitudes.

    Raises:
        FitError: a DoRA was asked for, and no module can take one.
    """
    able = [target for target in targets if target.form in ("linear", "conv")]
    if kind == "lora":
        return lora_decision("as asked")
    if reason := _obstacle(targets, able):
        if kind == "dora":
            raise FitError(f"no DoRA can be made: {reason}", file=tuned, hint='`kind="lora"`')
        return lora_decision(reason)
    lora = _relative(able, factored, (factored[target.path].residual(lora_ranks[target.path]) for target in able))
    share, survivals = math.nan, dict[str, Survival]()
    if kind == "auto":
        share, survivals = _row_share(able, factored, lora_ranks, workspace.workers)
        if share < _WORTH_A_LOOK:
            why = f"rescaling rows would take away {max(share, 0):.1%} of what a LoRA leaves"
            return lora_decision(why, survivals, lora=lora, rows=share)
    try:
        candidates = _alternated(able, ranks, factored, workspace)
        rest = {
            u.path: _beside(u, factored[u.path], ranks[u.path], workspace.scratch)
            for u in targets
            if u.form == "embedding"
        }
    except FitError as error:
        if kind == "dora":
            raise
        return lora_decision(error.message, survivals, lora=lora, rows=share)
    dora = _relative(
        able, factored, (candidate.factored.residual(ranks[path]) for path, candidate in candidates.items())
    )
    equal = lora
    if ranks == lora_ranks:
        equal = _relative(able, factored, (_equal(factored[u.path], ranks[u.path], candidates[u.path]) for u in able))
    rounding = _relative(able, factored, (candidate.magnitude.rounding for candidate in candidates.values()))
    wins = math.hypot(dora, rounding) < _CLEARLY * equal
    why = (
        f"a DoRA leaves {dora:.2%} of the change of {len(able)} modules, a LoRA of as many numbers at least {equal:.2%}"
    )
    if rounding > 0:
        why += f"; PEFT rounds norms, which in the model's stored type adds {rounding:.2%} to the DoRA's"
    figures = {"lora": lora, "equal": equal, "dora": dora, "rows": share, "rounding": rounding}
    if kind == "auto" and not wins:
        return lora_decision(why, survivals, **figures)
    all_candidates = candidates | rest
    return KindDecision(
        KindFacts("dora", why if wins else f"as asked; {why}", **figures),
        {path: candidate.factored for path, candidate in all_candidates.items()},
        {path: candidate.magnitude for path, candidate in all_candidates.items()},
    )


def _obstacle(targets: Sequence[LowRankTarget], able: Sequence[LowRankTarget]) -> str:
    if not able:
        return "no linear layer or convolution becomes factors"
    if experts := [target.path for target in targets if target.form == "experts"]:
        return f"PEFT has no DoRA for experts ('{experts[0]}'), and an adapter is DoRA for all modules or none"
    for target in targets:
        if target.order or len(target.deltas[0].strips) > 1:
            return f"'{target.path}' lies in several tensors, or in another order"
    return ""


def _relative(targets: Iterable[LowRankTarget], factored: Mapping[str, TargetFactors], left: Iterable[float]) -> float:
    energy = math.fsum(factored[target.path].energy for target in targets)
    return math.sqrt(max(math.fsum(left), 0.0) / energy) if energy else 0.0


def _row_share(
    targets: Sequence[LowRankTarget], factored: Mapping[str, TargetFactors], ranks: Mapping[str, int], workers: int
) -> tuple[float, dict[str, Survival]]:
    """The share of the LoRA's error that rescaling rows would remove, estimated from some rows of each matrix.

    Also returns what a merge of the LoRA would keep, where these are stored rows: the noise report needs the same rows.
    """
    survivals: dict[str, Survival] = {}

    def share_of(target: LowRankTarget) -> float:
        matrix, rank = factored[target.path].matrices[0], ranks[target.path]
        if matrix.sample is not None and matrix.left.shape[0] == rank:
            survivals[target.path] = matrix.sample.survival
            return matrix.sample.share
        left, right = factored[target.path].factors(0, rank)
        runs, base, tuned = _sampled(target.deltas[0])
        change = at_rows(left, runs) @ right
        along, energy = row_share((tuned - base) - change.astype(base.dtype, copy=False), base + change)
        stored = target.deltas[0].strips[0].base
        if not target.deltas[0].transposed and stored.elements is not None:
            survivals[target.path] = survival(base, change, stored.dtype)
        return float(along / energy) if energy > 0 else 0.0

    shares = in_threads(share_of, targets, workers)
    left = [factored[target.path].residual(ranks[target.path]) for target in targets]
    removed = math.fsum(energy * share for energy, share in zip(left, shares, strict=True))
    return (removed / math.fsum(left) if any(left) else 0.0), survivals


def _sampled(delta: Delta) -> tuple[list[tuple[int, int]], Array, Array]:
    """Some logical rows: ``(runs of row numbers, rows of W, rows of W')``."""
    pair = _pair(delta)
    runs = list(sample_runs(*pair.shape))
    if isinstance(pair, HeldPair):
        return runs, at_rows(pair.base, runs), at_rows(pair.tuned, runs)
    (strip,) = delta.strips
    base, tuned = (read_runs(side, strip.first, runs) for side in (strip.base, strip.tuned))
    exact = numpy.result_type(base, tuned)
    return runs, base.astype(exact, copy=False), tuned.astype(exact, copy=False)


@dataclass(frozen=True)
class _StoredRows:
    """A pair of matrices that is read at every use; a `surgery_formats.linalg.fit_dora.PairSource`."""

    strip: Strip

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.strip.height, self.strip.tuned.shape[1]

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Rows of both matrices, in the narrowest type that holds both."""
        low, high = self.strip.first + start, self.strip.first + stop
        base, tuned = read_values(self.strip.base, low, high), read_values(self.strip.tuned, low, high)
        exact = numpy.result_type(base, tuned)
        return base.astype(exact, copy=False), tuned.astype(exact, copy=False)


def _pair(delta: Delta) -> PairSource:
    """The pair of matrices; held in memory, transposed, where the files store the transpose."""
    (strip,) = delta.strips  # only experts have several
    stored = _StoredRows(strip)
    return _held(stored, turned=True) if delta.transposed else stored


def _held(pair: _StoredRows, *, turned: bool) -> HeldPair:
    base, tuned = pair.rows(0, pair.shape[0])
    return (
        HeldPair(numpy.ascontiguousarray(base.T), numpy.ascontiguousarray(tuned.T)) if turned else HeldPair(base, tuned)
    )


@dataclass(frozen=True, slots=True)
class _DoraCandidate:
    factored: TargetFactors
    magnitude: Magnitude


def _alternated(
    targets: Sequence[LowRankTarget],
    ranks: Mapping[str, int],
    factored: Mapping[str, TargetFactors],
    workspace: Workspace,
) -> dict[str, _DoraCandidate]:
    def alternated(target: LowRankTarget) -> _DoraCandidate:
        delta = target.deltas[0]
        pair = _pair(delta)
        if isinstance(pair, _StoredRows) and math.prod(pair.shape) <= HELD["cpu"]:
            pair = _held(pair, turned=False)
        try:
            fit = alternate(pair, ranks[target.path], device=workspace.device)
        except FitError as error:
            raise FitError(error.message, file=path_of(delta.strips[0].tuned), tensor=target.names[0]) from error
        return _stored(target, fit, factored[target.path], workspace.scratch)

    candidates = in_threads(alternated, targets, workspace.lanes)
    return {target.path: candidate for target, candidate in zip(targets, candidates, strict=True)}


def _stored(target: LowRankTarget, alternated: DoRAFit, lora: TargetFactors, scratch: ScratchFile) -> _DoraCandidate:
    left = scratch.put(alternated.B.T)
    right = scratch.put(alternated.A)
    # the square roots of the singular values are in the factors' lengths; they are known to be all that is kept
    values = row_lengths(alternated.B.T, alternated.A)
    matrix = FactorisedMatrix(left, right, values, lora.energy, alternated.residual**2, 1.0, lora.matrices[0].edge)
    return _DoraCandidate(TargetFactors(target, (matrix,)), _magnitude(target, alternated, alternated.size, scratch))


def _magnitude(target: LowRankTarget, fit: DoRAFit | Magnitudes, size: float, scratch: ScratchFile) -> Magnitude:
    step = _NORM_ROUNDING.get(target.deltas[0].strips[0].base.dtype, 0.0)
    slots = scratch.put(fit.magnitude[None]), scratch.put(fit.gain[None])
    return Magnitude(*slots, size, (step * size) ** 2)


def _equal(lora: TargetFactors, rank: int, candidate: _DoraCandidate) -> float:
    """Lower bound of the energy that a LoRA with as many numbers as the DoRA leaves.

    It could hold a part of the next direction.
    """
    (matrix,) = lora.matrices
    following = matrix.values[rank : rank + 1] or matrix.values[-1:]
    extra_directions = candidate.magnitude.count / lora.target.cost
    return max(matrix.residual(rank) - extra_directions * math.fsum(value * value for value in following), 0.0)


def _beside(target: LowRankTarget, lora: TargetFactors, rank: int, scratch: ScratchFile) -> _DoraCandidate:
    """An embedding's DoRA: the LoRA's factors and the column magnitudes that fit best."""
    left, right = lora.factors(0, rank)
    (matrix,) = lora.matrices
    fitted = best_columns(_StoredRows(target.deltas[0].strips[0]), left, right)
    slots = scratch.put(left.T), scratch.put(right)
    fitted_matrix = FactorisedMatrix(
        *slots, matrix.values[:rank], lora.energy, fitted.residual**2, matrix.bound, matrix.edge
    )
    return _DoraCandidate(TargetFactors(target, (fitted_matrix,)), _magnitude(target, fitted, 0.0, scratch))
