# SPDX-License-Identifier: Apache-2.0
"""All that is decided of one extraction before a byte is written: forms, ranks, kind, tensors, configuration."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery._version import __version__
from surgery.extraction.calibration import Calibrated, Calibration, calibrate
from surgery.extraction.choose_kind import Decision, decide, kept_lora
from surgery.extraction.factorise import Factored, StoredFactorSpec
from surgery.extraction.findings import CalibrationTotals, Kind
from surgery.extraction.noise import NoiseReport, noise_report
from surgery.extraction.pairing import differing_settings
from surgery.extraction.ranks import RankGoal, choices, ranks_of
from surgery.extraction.result import Choice, ExtractResult
from surgery.extraction.rows import check_losses, rows_of
from surgery.extraction.storage_plan import StorageOptions, StoragePlan, kept_size, plan_storage
from surgery.extraction.stream.scan import Layout, ScanResult
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.targets import LowRankTarget
from surgery.extraction.write import Scaling, configuration, size_of, tensors_of
from surgery_formats.adapters.format import NewTensor
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.models.identity import content_id, fingerprint
from surgery_formats.text import listing

if TYPE_CHECKING:
    from surgery.extraction.proof import Error

__all__ = ["CheckpointPair", "ExtractionPlan", "ExtractionRequest", "Watch", "planned", "settle_job"]


class Watch:
    """Counts from when it is made; parts of the same name add up."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts: dict[str, float] = {}

    def lap(self, name: str, until: float | None = None) -> None:
        """What has passed since the last lap was `name`; it ended now, or at `until` (`time.monotonic`)."""
        now = time.monotonic() if until is None else until
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds, in the order in which the parts began."""
        return dict(self._parts)


@dataclass(frozen=True, slots=True)
class CheckpointPair:
    """BASE and TUNED, opened."""

    base: Checkpoint
    tuned: Checkpoint

    @property
    def old(self) -> Component:
        """BASE's model."""
        return self._main(self.base)

    @property
    def new(self) -> Component:
        """TUNED's model."""
        return self._main(self.tuned)

    @staticmethod
    def _main(checkpoint: Checkpoint) -> Component:
        if checkpoint.is_pipeline:
            raise FitError(
                "a pipeline of several models",
                file=checkpoint.path,
                hint="extract each part from its own folder: BASE/unet TUNED/unet",
            )
        return checkpoint.main

    def check_unchanged(self) -> None:
        """Neither has changed since it was opened.

        Raises:
            ProofError: one has.
        """
        self.base.check_unchanged()
        self.tuned.check_unchanged()


def planned(goal: RankGoal, scaling: Scaling, dtype: DType) -> Callable[[LowRankTarget], StoredFactorSpec | None]:
    """How factors will be written, as far as it is known before all of them are: not with a budget, nor where the scale needs the rank."""

    def plan(unit: LowRankTarget) -> StoredFactorSpec | None:
        if (asked := goal.rank_of(unit)) is not None:
            rank = min(asked, unit.largest_rank)
            return StoredFactorSpec(rank, scaling.fold(rank), dtype)
        alone = goal.budget is None and not goal.auto and scaling.constant
        return StoredFactorSpec(None, 1.0, dtype) if alone else None

    return plan


@dataclass(frozen=True, slots=True)
class ExtractionRequest:
    """What the user wants, and where it is worked out.

    Attributes:
        dtype: Of the factors of the PEFT folder.
        coding: Of the factors in the end, if they are codes.
    """

    goal: RankGoal
    options: StorageOptions
    scaling: Scaling
    dtype: DType
    coding: Coding | None
    kind: Kind
    calibration: Calibration | None
    scratch: ScratchFile
    device: str
    workers: int


@dataclass(frozen=True)
class ExtractionPlan:
    """All that is decided; nothing is written yet."""

    both: CheckpointPair
    layout: Layout
    found: ScanResult
    forms: StoragePlan
    ranks: Mapping[str, int]
    dtype: DType
    coding: Coding | None
    tensors: tuple[NewTensor, ...]
    config: bytes
    metadata: Mapping[str, str]
    id: str
    noise: NoiseReport
    decision: Decision
    calibrated: Calibrated
    calibration: Calibration | None
    asked: bool
    workers: int
    warnings: tuple[str, ...] = ()
    table: tuple[Choice, ...] = ()

    @property
    def factored(self) -> Mapping[str, Factored]:
        """What is written."""
        return {**self.found.factored, **self.decision.factored, **self.calibrated.factored}

    @property
    def nbytes(self) -> int:
        """Of the PEFT file."""
        return size_of(self.tensors, self.metadata)

    def choices(self) -> tuple[Choice, ...]:
        """Other ranks, fewer layers."""
        kept = [kept_size(one) for one in self.forms.kept]
        stored = sum(numbers for numbers, _ in kept), sum(nbytes for _, nbytes in kept)
        return choices(self.forms, self.found.factored, self.found.measures, stored, self.coding or self.dtype)

    def result(self) -> ExtractResult:
        """By the spectra."""
        rows = rows_of(
            self.layout.pairs,
            self.found.measures,
            self.factored,
            self.forms,
            self.ranks,
            self.coding or self.dtype,
            self.noise.signals,
            {path: one.count for path, one in self.decision.magnitudes.items()},
            self.calibrated.facts,
            asked=self.asked,
        )
        return ExtractResult(
            None,
            "peft",
            self.metadata["surgery.base"],
            rows,
            self.coding.name if self.coding else self.dtype.label,
            sum(row.nbytes for row in rows) if self.coding else self.nbytes,
            self.both.tuned.nbytes,
            self.warnings,
            self.table,
            self.noise.survival,
            self.noise.merged,
            self.decision.facts,
            CalibrationTotals.of(self.calibrated.facts.values()) if self.calibration is not None else None,
        )

    def proved(self, folder: Path) -> ExtractResult:
        """By what lies in `folder`.

        Raises:
            ProofError: it does something else.
        """
        from surgery.extraction.rows import with_measured

        known = {unit.path: self.factored[unit.path] for unit in self.forms.units}
        errors, result = self._errors(folder, known), self.result()
        sizes = {path: one.size for path, one in self.decision.magnitudes.items()}
        rows = with_measured(result.rows, errors, self.forms, self.factored, self.ranks, self.dtype, sizes)
        return replace(result, rows=rows)

    def coded(self, folder: Path) -> ExtractResult:
        """By the codes that lie in `folder`, whose error the converter has proved to be what its writer says."""
        errors, result = self._errors(folder, {}), self.result()
        rows = (replace(r, residual=errors[r.name].residual) if r.name in errors else r for r in result.rows)
        return replace(result, rows=tuple(rows))

    def _errors(self, folder: Path, known: Mapping[str, Factored]) -> dict[str, Error]:
        from surgery.extraction.proof import prove

        measures = self.found.measures
        shifted = {kept.name for kept in self.forms.kept if kept.shift is not None}
        changed = [
            pair
            for pair in self.layout.pairs
            if pair.match == "pair" and (measures[pair.name].changed or pair.name in shifted)
        ]
        return prove(folder, self.both.base, changed, known, measures, self.forms.dropped, self.workers)


def settle_job(
    both: CheckpointPair,
    layout: Layout,
    found: ScanResult,
    making: ExtractionRequest,
    watch: Watch,
    *,
    allow_loss: bool,
) -> ExtractionPlan:
    """Decide everything.

    Args:
        both: The checkpoints.
        layout: What belongs together.
        found: What was measured and factorised.
        making: What the user wants.
        watch: Laps for the timings.
        allow_loss: Leave out what no form can hold.

    Raises:
        NothingChangedError: TUNED is BASE.
        FitError: nothing, or not everything, can be held.
    """
    old, new = both.old, both.new
    goal, dtype, scaling = making.goal, making.dtype, making.scaling

    def formed(ranks: Mapping[str, int]) -> StoragePlan:
        return plan_storage(layout.spots, layout.units, found.measures, old, new, making.options, ranks)

    ranks: Mapping[str, int] = ranks_of(goal, layout.units, found.factored, formed, making.coding or dtype)
    watch.lap("settling")
    decision, dora_ranks = _kind(both, layout, found, making, formed, ranks)
    watch.lap("kind")
    if decision.facts.kind == "dora":
        ranks = dora_ranks
    forms = formed(ranks)
    calibrated = Calibrated({}, {}, {})
    if making.calibration is not None:
        calibrated = calibrate(
            making.calibration, forms, layout.spots, found.factored, ranks, making.scratch, making.device, making.workers,
            biases="bias" in making.options.dense,
        )  # fmt: skip
        calibrated.into(forms, layout.spots)
        watch.lap("calibrating")
    for unit in forms.units:
        if (rank := goal.rank_of(unit)) is not None and ranks[unit.path] < rank:
            forms.why |= dict.fromkeys(
                unit.names, f"rank cut from {rank} to {ranks[unit.path]}: the change has no more"
            )
    check_losses(forms, found.measures, both.tuned.path, allow_loss=allow_loss)
    if not forms.units and not forms.kept:
        raise FitError("nothing of what changed can be held", file=both.tuned.path)
    watch.lap("settling")
    metadata = {"format": "pt", "surgery.base": content_id(both.base, found.digests.of)}
    watch.lap("identifying")
    factored = {**found.factored, **decision.factored, **calibrated.factored}
    places = {path: one.values for path, one in decision.magnitudes.items()}
    tensors = tensors_of(forms, factored, ranks, scaling, dtype, places)
    name = both.base.path.resolve().name
    config = configuration(forms, ranks, scaling, goal.rank, old, name, dora=decision.facts.kind == "dora")
    facts = {
        "version": __version__,
        "verb": "extract-lora",
        "config": hashlib.sha256(config).hexdigest(),
        "tensors": [(tensor.name, tensor.dtype.label, tensor.shape) for tensor in tensors],
        "base": metadata["surgery.base"],
        "calibration": None if making.calibration is None else making.calibration.id,
        "tuned": sorted(fingerprint(shard.file) for shard in new.shards),
    }
    plan_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    units = [found.factored[unit.path] for unit in forms.units]
    gains = {path: one.load_gains for path, one in decision.magnitudes.items()}
    watch.lap("settling")
    noise = noise_report(units, factored, ranks, found.measures, making.workers, gains, decision.kept)
    watch.lap("noise")
    warnings = differing_settings(old, new)
    given = making.calibration
    if given is not None and (unused := given.unused(forms.units)):
        warnings += (f"the inputs of {len(unused)} modules are of no use, for they get no factors: {listing(unused)}",)
    asked = goal.rank is not None
    return ExtractionPlan(
        both, layout, found, forms, ranks, dtype, making.coding, tensors, config, metadata, plan_id, noise, decision, calibrated, given,
        asked, making.workers, warnings,
    )  # fmt: skip


def _kind(
    both: CheckpointPair,
    layout: Layout,
    found: ScanResult,
    making: ExtractionRequest,
    formed: Callable[[Mapping[str, int]], StoragePlan],
    ranks: Mapping[str, int],
) -> tuple[Decision, Mapping[str, int]]:
    """LoRA or DoRA, and the ranks of a DoRA.

    Raises:
        FitError: a DoRA was asked for, and none can be made.
    """
    goal = making.goal
    if making.calibration is not None:
        return kept_lora("calibration weights the factors of a LoRA"), ranks
    if making.kind == "auto" and (goal.criterion.energy is not None or goal.criterion.max_error is not None):
        return kept_lora("ranks follow from the share to be held, which a LoRA's directions are counted for"), ranks
    dora_ranks = ranks
    if making.kind != "lora" and goal.budget is not None:
        try:
            dora_ranks = ranks_of(
                goal, layout.units, found.factored, formed, making.coding or making.dtype, magnitudes=True
            )
        except FitError as error:
            if making.kind == "dora":
                raise
            return kept_lora(error.message), ranks
    units = formed(dora_ranks).units
    decision = decide(
        making.kind, units, found.factored, dora_ranks, ranks, making.scratch, making.device, making.workers,
        both.tuned.path,
    )  # fmt: skip
    return decision, dora_ranks
