# SPDX-License-Identifier: Apache-2.0
"""Extract: the least adapter that makes of a base what a full fine-tune made of it, with an account of every tensor.

Both checkpoints are streamed once. Every difference is factorised optimally while it is there, and what is left of it beside the factors
as they will be written is measured. What is no matrix is stored as the fine-tune has it. The written folder is read back and must hold
what was measured, where it was measured, before it gets its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery import __version__
from surgery.convert import ConvertResult, coded_as, convert
from surgery.extraction.calibration import Calibrated, Calibration, calibrate, check_modules, open_calibration
from surgery.extraction.dora import Decision, decide, kept_lora
from surgery.extraction.factor import Factored, Plan, Scratch
from surgery.extraction.kind import KINDS, CalibrationTotals, Kind
from surgery.extraction.lanes import Lanes, default_lanes, devices_of
from surgery.extraction.ledger import ExtractResult
from surgery.extraction.noise import NoiseReport, noise_report
from surgery.extraction.pairs import differing_settings
from surgery.extraction.plan import Forms, Options, kept_size, settle
from surgery.extraction.ranks import Wanted, ranks_of, wanted
from surgery.extraction.rows import check_losses, rows_of, without
from surgery.extraction.scan import Found, Layout, layout_of, scan, warm
from surgery.extraction.sites import Unit, tree_name
from surgery.extraction.table import Choice, choices
from surgery.extraction.watch import Watch
from surgery.extraction.write import TENSOR_FILE, Scaling, configuration, fill, size_of, tensors_of
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import Coded, Format, NewTensor
from surgery_formats.adapters.registry import format_named
from surgery_formats.checkpoint import Checkpoint, Component, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.folder import output_folder
from surgery_formats.identity import content_id, fingerprint
from surgery_formats.linalg.coding import Coding
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    from surgery.extraction.proof import Error

__all__ = ["ExtractResult", "extract_lora"]

Pathlike = str | os.PathLike[str]


def extract_lora(
    base: Pathlike,
    tuned: Pathlike,
    *,
    output: Pathlike | None = None,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    kind: Kind = "auto",
    calibration: Pathlike | None = None,
    dense: Sequence[str] = ("norm", "bias"),
    embeddings: str = "lora",
    dtype: str = "auto",
    to: str = "peft",
    factors: str | None = None,
    allow_loss: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    table: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> ExtractResult:
    """Turn the difference of two checkpoints into an adapter and prove it.

    Args:
        base: What was tuned: weight file or folder.
        tuned: The full fine-tune.
        output: Folder to make (file, for a format of single files). Its parent must exist.
        rank: Directions per matrix, 16 if nothing else is said; ``auto`` takes those above the rounding noise of storage.
        energy: Instead: share of every matrix' squared change to hold.
        max_error: Instead: most that may be missing of a matrix' change, relative to its norm.
        budget: Instead: ``20MB`` or ``2M`` (numbers) for the whole adapter, shared out where it helps most.
        rank_pattern: Other ranks than `rank` for some modules, by patterns of a shell; the first that matches holds.
        alpha: ``lora_alpha``; by default the rank. Never changes what the adapter does.
        rslora: Scale by ``alpha / sqrt(rank)``.
        kind: ``lora``, ``dora``, or ``auto``: a DoRA where it leaves clearly less of the model's change than a LoRA with as many numbers.
        calibration: Inputs of modules (`surgery.extraction.calibration`), for factors that are best on them; a LoRA's only.
        dense: Which one-dimensional changes to keep: ``norm``, ``bias``, or none of them.
        embeddings: ``lora`` or ``full``.
        dtype: Of the factors: ``fp32``, ``fp16``, ``bf16``, or ``auto``: as TUNED. What is copied keeps its own.
        to: Format of the adapter.
        factors: ``int8`` or ``int4``: the format is ``compact``, unless `to` names another that stores codes.
        allow_loss: Leave out what no form can hold.
        device: Where differences are made and factorised: ``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1``, ``cuda:all``, ``auto``. Matrices are
            shared out over all of them.
        workers: Threads; None is one per core, at most eight, and three for each GPU. Never changes the result.
        overwrite: Replace an existing output, atomically.
        table: Say what ranks 4 to 64 would cost and leave out, for attention, MLP and all layers.
        dry_run: Compare and factorise, write nothing.
        progress: Called with every step.

    Raises:
        InputError: an input cannot be read.
        FitError: another architecture, other shapes, NaN, a change that nothing holds, options that contradict each other.
        NothingChangedError: TUNED is BASE.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    goal = wanted(rank, energy, max_error, budget, table=table, patterns=rank_pattern)
    options = Options(_dense(dense), _one_of(embeddings, ("lora", "full"), "embeddings"))
    scaling = _scaling(alpha, rslora)
    if kind == "dora" and calibration is not None:
        raise FitError("calibration weights the factors of a LoRA, and a DoRA was asked for", hint="kind lora")
    chosen = KINDS[KINDS.index(_one_of(kind, KINDS, "kind"))]
    target = coded_as(format_named("compact" if factors is not None and to == "peft" else to), factors)
    coding = _coding(target, dtype)
    devices = devices_of(device)
    if output is None and not dry_run:
        raise FitError("no output was named")
    pair = _Both(open_checkpoint(base), open_checkpoint(tuned))
    given = None if calibration is None else open_calibration(calibration)
    parent = None if output is None or dry_run else Path(os.path.realpath(Path(output).parent))
    scratch = Scratch(parent if parent is not None and parent.is_dir() else None)
    lanes: Lanes | None = None
    watch = Watch()
    try:
        threads = workers or default_lanes(devices)
        stored = DType.F32 if coding else _dtype(dtype, pair.new)
        making = _Making(goal, options, scaling, stored, coding, chosen, given, scratch, devices[0], threads)
        layout = layout_of(pair.old, pair.new, full=options.embeddings == "full")
        goal.check_patterns(layout.units)
        if given is not None:
            shared = {*pair.old.aliases, pair.old.head, *pair.new.aliases}
            names = [*shared, *(tree_name(name, pair.old) for name in shared)]
            check_modules(given, layout.spots, layout.units, names)
        lanes = Lanes(devices, threads)
        lanes.warm(partial(warm, layout))
        found = scan(layout, goal.criterion_of, _planned(goal, scaling, stored), scratch, lanes, progress)
        watch.lap("starting", found.began)
        watch.lap("reading")
        job = _settled(pair, layout, found, making, watch, allow_loss=allow_loss)
        job = replace(job, table=job.choices() if table else ())
        if dry_run:
            return replace(job.result(), format=target.name, timings=watch.parts)
        assert output is not None
        where = Path(output)
        if target.name == "peft":
            result = _write(job, where, watch, overwrite=overwrite, progress=progress)
        else:
            most = goal.budget.limit if goal.budget is not None and goal.budget.unit == "bytes" else None
            result = _converted(
                job, where, target.name, watch, most, allow_loss=allow_loss, overwrite=overwrite, progress=progress
            )
        return replace(result, timings={**watch.parts, "first_read_to_synced": time.monotonic() - found.began})
    finally:
        if lanes is not None:
            lanes.close()
        scratch.close()


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise FitError(f"'{value}' is no choice of {what}", hint=f"there are {', '.join(known)}")
    return value


def _dense(chosen: Sequence[str]) -> tuple[str, ...]:
    parts = [part for part in ([chosen] if isinstance(chosen, str) else chosen) if part != "none"]
    return tuple(_one_of(part, ("norm", "bias"), "dense") for part in parts)


def _scaling(alpha: float | None, rslora: bool) -> Scaling:
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise FitError(f"alpha is {alpha}, not a positive number")
    return Scaling(None if alpha is None else float(alpha), rslora)


def _coding(target: Format, dtype: str) -> Coding | None:
    """The codes that factors are stored as, if they are."""
    if not isinstance(target, Coded):
        return None
    if dtype != "auto":
        raise FitError(f"{target.name} stores factors as codes, not as {dtype}", hint="--factors chooses the codes")
    return target.coding


def _dtype(text: str, tuned: Component) -> DType:
    if text != "auto":
        return DType.parse(_one_of(text, ("fp32", "fp16", "bf16"), "dtype"))
    largest = max((t for t in tuned.tensors.values() if t.dtype.is_float), key=lambda t: t.numel, default=None)
    return DType.F32 if largest is None or largest.dtype.bits > 16 else largest.dtype


@dataclass(frozen=True, slots=True)
class _Both:
    base: Checkpoint
    tuned: Checkpoint

    @property
    def old(self) -> Component:
        return self._main(self.base)

    @property
    def new(self) -> Component:
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
        self.base.check_unchanged()
        self.tuned.check_unchanged()


def _planned(goal: Wanted, scaling: Scaling, dtype: DType) -> Callable[[Unit], Plan | None]:
    """How factors will be written, as far as it is known before all of them are: not with a budget, nor where the scale needs the rank."""

    def plan(unit: Unit) -> Plan | None:
        if (asked := goal.rank_of(unit)) is not None:
            rank = min(asked, unit.largest_rank)
            return Plan(rank, scaling.fold(rank), dtype)
        alone = goal.budget is None and not goal.auto and scaling.constant
        return Plan(None, 1.0, dtype) if alone else None

    return plan


@dataclass(frozen=True, slots=True)
class _Making:
    """What the user wants, and where it is worked out.

    Attributes:
        dtype: Of the factors of the PEFT folder.
        coding: Of the factors in the end, if they are codes.
    """

    goal: Wanted
    options: Options
    scaling: Scaling
    dtype: DType
    coding: Coding | None
    kind: Kind
    calibration: Calibration | None
    scratch: Scratch
    device: str
    workers: int


@dataclass(frozen=True)
class _Job:
    """All that is decided; nothing is written yet."""

    both: _Both
    layout: Layout
    found: Found
    forms: Forms
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


def _settled(both: _Both, layout: Layout, found: Found, making: _Making, watch: Watch, *, allow_loss: bool) -> _Job:
    old, new = both.old, both.new
    goal, dtype, scaling = making.goal, making.dtype, making.scaling

    def formed(ranks: Mapping[str, int]) -> Forms:
        return settle(layout.spots, layout.units, found.measures, old, new, making.options, ranks)

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
    return _Job(
        both, layout, found, forms, ranks, dtype, making.coding, tensors, config, metadata, plan_id, noise, decision, calibrated, given,
        asked, making.workers, warnings,
    )  # fmt: skip


def _kind(
    both: _Both,
    layout: Layout,
    found: Found,
    making: _Making,
    formed: Callable[[Mapping[str, int]], Forms],
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


def _write(job: _Job, out: Path, watch: Watch, *, overwrite: bool, progress: Callback | None) -> ExtractResult:
    given = () if job.calibration is None else (job.calibration.path,)
    inputs = (job.both.base.path, job.both.tuned.path, *given)
    with output_folder(out, job.id, overwrite=overwrite, inputs=inputs) as folder:
        folder.write_small("adapter_config.json", job.config)
        if any(kept.via == "resized" for kept in job.forms.kept):
            for name, path in job.both.tuned.side_files:
                if "token" in name or name in ("vocab.json", "merges.txt"):
                    folder.write_small(name, path.read_bytes())
        watch.lap("syncing")
        file = folder.create(TENSOR_FILE, job.nbytes)
        stage = file.path.parent
        filled = fill(file, job.tensors, job.metadata)
        watch.lap("writing")
        file.finish({"xxh3": filled})
        watch.lap("syncing")
        if progress is not None:
            progress(Progress(job.nbytes, job.nbytes, "proving"))
        result = job.proved(stage)
        watch.lap("proving")
        job.both.check_unchanged()
        if job.calibration is not None:
            job.calibration.check_unchanged()
        folder.commit({**result.as_json(), "version": __version__})
    watch.lap("committing")
    return replace(result, output=out)


def _converted(
    job: _Job,
    out: Path,
    to: str,
    watch: Watch,
    most: int | None,
    *,
    allow_loss: bool,
    overwrite: bool,
    progress: Callback | None,
) -> ExtractResult:
    """Through a PEFT folder beside the output, by the converter with its own proof; says so where it takes more than `most` bytes."""
    if not out.parent.is_dir():
        raise FitError("no such folder to write into", file=out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem[:100]}.surgery-") as name:
        result = _write(job, Path(name) / "peft", watch, overwrite=False, progress=None)

        def check(path: Path, done: ConvertResult) -> Mapping[str, Any]:
            nonlocal result
            found = result if job.coding is None else job.coded(path)
            files = [path] if path.is_file() else list(path.glob("*.safetensors"))
            lost = {
                entry.site: f"{to} cannot hold it ({entry.detail})"
                for entry in done.entries
                if entry.outcome == "dropped"
            }
            size = sum(file.stat().st_size for file in files)
            notes = [f"'{show(site)}': {why}" for site, why in lost.items()]
            if most is not None and size > most:
                notes.append(f"the budget is {most:,} bytes, which PEFT keeps to; {to} takes {size:,} for the same")
            result = replace(
                found,
                format=to,
                rows=without(found.rows, job.forms, lost),
                adapter_nbytes=size,
                warnings=(*found.warnings, *notes),
            )
            return {"extract": result.as_json()}

        try:
            convert(
                Path(name) / "peft",
                to,
                out,
                base=job.both.base.path,
                factors=None if job.coding is None else job.coding.name,
                allow_loss=allow_loss,
                overwrite=overwrite,
                check=check,
                progress=progress,
            )
        except FitError as error:
            if error.file is None or name not in str(error.file):
                raise
            # the folder it speaks of is gone by the time anyone reads this
            raise FitError(error.message, file=job.both.tuned.path, tensor=error.tensor, hint=error.hint) from error
    watch.lap("converting")
    return replace(result, output=out)
