# SPDX-License-Identifier: Apache-2.0
"""The plan of an extraction, complete before a byte is written: forms, ranks, kind, the adapter and its rendering."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from surgery._version import __version__
from surgery.engine.adapter_output import rendered_size
from surgery.engine.calibration_file import Calibration
from surgery.extraction.adapter import FactorSettings, extracted_adapter, fold_of
from surgery.extraction.calibration import CalibrationChanges, calibrate, unused_modules
from surgery.extraction.choose_kind import KindDecision, choose_kind, lora_decision
from surgery.extraction.factorise import StoredFactorSpec, TargetFactors
from surgery.extraction.findings import Kind
from surgery.extraction.losses import check_losses
from surgery.extraction.noise import NoiseReport, noise_report
from surgery.extraction.pairing import differing_settings
from surgery.extraction.ranks import RankGoal, ranks_of
from surgery.extraction.recovery import Recovery
from surgery.extraction.refine import Refinement, refine
from surgery.extraction.storage_plan import StorageOptions, StoragePlan, plan_storage
from surgery.extraction.stream.scan import ScanResult
from surgery.extraction.stream.scan_plan import ScanLayout
from surgery.extraction.stream.scratch import Workspace
from surgery.extraction.targets import LowRankTarget
from surgery_formats.adapters.format import Format, Rendering, Scaled, Scaling
from surgery_formats.adapters.registry import format_named
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.safetensors import reference_order
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.identity import content_id, fingerprint
from surgery_formats.text import listing

__all__ = [
    "CheckpointPair",
    "ExtractionPlan",
    "ExtractionSettings",
    "Stopwatch",
    "plan_extraction",
    "stored_factor_specs",
]


class Stopwatch:
    """Measures the parts of a run, from its creation on; laps of the same name add up."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts: dict[str, float] = {}

    def lap(self, name: str, until: float | None = None) -> None:
        """Assign the time since the last lap to `name`; the lap ends now, or at `until` (`time.monotonic`)."""
        now = time.monotonic() if until is None else until
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds by name, in the order in which the names first occurred."""
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
                hint="name one part on both sides: BASE/unet and TUNED/unet",
            )
        return checkpoint.main


def stored_factor_specs(
    goal: RankGoal, scaling: Scaling, dtype: DType
) -> Callable[[LowRankTarget], StoredFactorSpec | None]:
    """The stored form of each target's factors.

    None if that depends on all targets (a budget) or on the rank (a scale).
    """

    def spec_of(target: LowRankTarget) -> StoredFactorSpec | None:
        if (asked := goal.rank_of(target)) is not None:
            rank = min(asked, target.largest_rank)
            return StoredFactorSpec(rank, fold_of(scaling, rank), dtype)
        always_one = scaling.alpha is None and not scaling.rslora
        return (
            StoredFactorSpec(None, 1.0, dtype)
            if always_one and not set(goal.rank.choices) & {"budget", "auto"}
            else None
        )

    return spec_of


@dataclass(frozen=True, slots=True)
class ExtractionSettings:
    """The options of an extraction.

    Attributes:
        goal: How ranks are found.
        options: Which changes are held, and how.
        scaling: Alpha and rsLoRA.
        dtype: Type of the factors.
        coding: Codes of the factors, if they are stored as codes.
        table: Whether to tabulate other ranks.
        kind: LoRA, DoRA, or the better one.
        calibration: Inputs of modules.
        allow_loss: Whether to leave out what no form can hold.
        workspace: Where factors are computed and kept.
        beyond_rounding: Whether TUNED is a merge, whose factors are fitted to the cells of its values.
    """

    goal: RankGoal
    options: StorageOptions
    scaling: Scaling
    dtype: DType
    coding: Coding | None
    table: bool
    kind: Kind
    calibration: Calibration | None
    allow_loss: bool
    workspace: Workspace
    beyond_rounding: bool = False

    @property
    def stored(self) -> DType | Coding:
        """Type or codes of the factors."""
        return self.coding or self.dtype


@dataclass(frozen=True)
class ExtractionPlan:
    """An extraction that is decided and not yet written.

    Attributes:
        checkpoints: BASE and TUNED.
        request: The user's options.
        layout: The paired tensors.
        scan: Measurements and factors of the differences.
        storage: The form of every change.
        ranks: By target path.
        factored: The factors that will be stored, by target path.
        adapter: The extraction in the canonical form.
        peft: The PEFT format, with the user's scaling.
        rendering: `adapter` in the PEFT format.
        id: Identifies the job.
        noise: The share of rounding in the change.
        decision: LoRA or DoRA.
        calibrated: What changed because of calibration inputs.
        warnings: Facts that the user should know.
        refined: What came of fitting factors to the cells of TUNED's values; None if that was not asked for.
        recovery: What `adapter` is worth on a text; None if that was not asked for, or is measured on what is read back.
    """

    checkpoints: CheckpointPair
    request: ExtractionSettings
    layout: ScanLayout
    scan: ScanResult
    storage: StoragePlan
    ranks: Mapping[str, int]
    factored: Mapping[str, TargetFactors]
    adapter: Adapter
    peft: Format
    rendering: Rendering
    id: str
    noise: NoiseReport
    decision: KindDecision
    calibrated: CalibrationChanges
    warnings: tuple[str, ...]
    refined: Refinement | None = None
    recovery: Recovery | None = None

    @property
    def nbytes(self) -> int:
        """Size of the PEFT tensor file."""
        return rendered_size(self.rendering)

    def check_unchanged(self) -> None:
        """Check that no input has changed since it was opened.

        Raises:
            ProofError: one has changed.
        """
        self.checkpoints.base.check_unchanged()
        self.checkpoints.tuned.check_unchanged()
        if self.request.calibration is not None:
            self.request.calibration.check_unchanged()


def plan_extraction(
    checkpoints: CheckpointPair,
    layout: ScanLayout,
    scan: ScanResult,
    request: ExtractionSettings,
    stopwatch: Stopwatch,
) -> ExtractionPlan:
    """Decide on forms, ranks and kind, and build the adapter.

    Raises:
        NothingChangedError: TUNED is BASE.
        FitError: a change cannot be held.
    """
    goal, targets = request.goal, layout.targets

    def formed(ranks: Mapping[str, int]) -> StoragePlan:
        old, new = checkpoints.old, checkpoints.new
        return plan_storage(layout.parameters, targets, scan.measures, old, new, request.options, ranks)

    lora_ranks = ranks_of(goal, targets, scan.factored, formed, request.stored)
    stopwatch.lap("settling")
    decision, ranks = _decide_kind(checkpoints, layout, scan, request, formed, lora_ranks)
    stopwatch.lap("kind")
    storage = formed(ranks)
    calibrated, refined = CalibrationChanges({}, {}, {}), None
    if request.calibration is not None:
        calibrated = _calibrated(request.calibration, storage, layout, scan, request, ranks)
        stopwatch.lap("calibrating")
    if request.beyond_rounding:
        refined = refine(storage, scan.factored, ranks, request.workspace)
        stopwatch.lap("refining")
    _note_cut_ranks(storage, goal, ranks)
    check_losses(storage, scan.measures, checkpoints.tuned.path, allow_loss=request.allow_loss)
    if not storage.targets and not storage.dense_tensors:
        raise FitError("nothing of what changed can be held", file=checkpoints.tuned.path)
    stopwatch.lap("settling")
    base_id = content_id(checkpoints.base, scan.digests.of)
    stopwatch.lap("identifying")
    factored = {**scan.factored, **decision.factored, **calibrated.factored, **(refined.factored if refined else {})}
    magnitudes = {path: magnitude.values for path, magnitude in decision.magnitudes.items()}
    settings = FactorSettings(ranks, request.scaling, request.dtype, magnitudes)
    adapter = extracted_adapter(storage, factored, settings, checkpoints.base, base_id, checkpoints.tuned.path)
    peft = _peft(request.scaling)
    rendering = peft.render(adapter, checkpoints.base)
    adapter = peft.described(adapter)  # other formats are given what a reader of the PEFT folder would know
    plan_id = _plan_id(rendering, base_id, request.calibration, checkpoints.new)
    changed = [scan.factored[target.path] for target in storage.targets]
    gains = {path: magnitude.load_gains for path, magnitude in decision.magnitudes.items()}
    stopwatch.lap("settling")
    noise = noise_report(changed, factored, ranks, scan.measures, request.workspace.workers, gains, decision.survivals)
    stopwatch.lap("noise")
    return ExtractionPlan(
        checkpoints,
        request,
        layout,
        scan,
        storage,
        ranks,
        factored,
        adapter,
        peft,
        rendering,
        plan_id,
        noise,
        decision,
        calibrated,
        (*differing_settings(checkpoints.old, checkpoints.new), *_without_use(request.calibration, storage)),
        refined,
    )


def _calibrated(
    calibration: Calibration,
    storage: StoragePlan,
    layout: ScanLayout,
    scan: ScanResult,
    request: ExtractionSettings,
    ranks: Mapping[str, int],
) -> CalibrationChanges:
    """What inputs of modules change of the factors, noted in `storage` too."""
    biases = "bias" in request.options.dense
    changes = calibrate(calibration, storage, layout.parameters, scan.factored, ranks, request.workspace, biases=biases)
    changes.into(storage, layout.parameters)
    return changes


def _note_cut_ranks(storage: StoragePlan, goal: RankGoal, ranks: Mapping[str, int]) -> None:
    for target in storage.targets:
        if (asked := goal.rank_of(target)) is not None and (rank := ranks[target.path]) < asked:
            cut = f"rank cut from {asked} to {rank}: the change has no more"
            storage.why |= dict.fromkeys(target.names, cut)


def _peft(scaling: Scaling) -> Scaled:
    peft = format_named("peft")
    assert isinstance(peft, Scaled)
    return peft.with_scaling(scaling)


def _plan_id(rendering: Rendering, base_id: str, calibration: Calibration | None, tuned: Component) -> str:
    """Hex digest of the output's form and of all inputs' content."""
    (config,) = rendering.small_files.values()
    order = reference_order((tensor.name, tensor.dtype, tensor.shape) for tensor in rendering.tensors)
    facts = {
        "version": __version__,
        "verb": "extract-lora",
        "config": hashlib.sha256(config).hexdigest(),
        "tensors": [(name, dtype.label, shape) for name, dtype, shape in order],
        "base": base_id,
        "calibration": None if calibration is None else calibration.id,
        "tuned": sorted(fingerprint(shard.file) for shard in tuned.shards),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _without_use(calibration: Calibration | None, storage: StoragePlan) -> Iterator[str]:
    """A warning of inputs that no factors are made for."""
    if calibration is not None and (unused := unused_modules(calibration, storage.targets)):
        yield f"the inputs of {len(unused)} modules are of no use, for they get no factors: {listing(unused)}"


def _decide_kind(
    checkpoints: CheckpointPair,
    layout: ScanLayout,
    scan: ScanResult,
    request: ExtractionSettings,
    formed: Callable[[Mapping[str, int]], StoragePlan],
    ranks: Mapping[str, int],
) -> tuple[KindDecision, Mapping[str, int]]:
    """Choose LoRA or DoRA, and its ranks; `ranks` are those of a LoRA.

    Raises:
        FitError: a DoRA is required and impossible.
    """
    goal = request.goal
    if request.calibration is not None:
        return lora_decision("calibration weights the factors of a LoRA"), ranks
    if request.beyond_rounding:
        return lora_decision("what was merged is looked for, as the factors of an addition"), ranks
    if request.kind == "auto" and set(goal.rank.choices) & {"energy", "error"}:
        return lora_decision("ranks follow from the share to be held, which a LoRA's directions are counted for"), ranks
    dora_ranks = ranks
    if request.kind != "lora" and goal.rank.most_size is not None:
        try:
            dora_ranks = ranks_of(goal, layout.targets, scan.factored, formed, request.stored, magnitudes=True)
        except FitError as error:
            if request.kind == "dora":
                raise
            return lora_decision(error.message), ranks
    targets = formed(dora_ranks).targets
    decision = choose_kind(
        request.kind, targets, scan.factored, dora_ranks, ranks, request.workspace, checkpoints.tuned.path
    )
    return decision, dora_ranks if decision.facts.kind == "dora" else ranks
