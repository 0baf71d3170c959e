# SPDX-License-Identifier: Apache-2.0
"""Extract: the least adapter that makes of a base what a full fine-tune made of it, with an account of every tensor.

Both checkpoints are streamed. Every difference is factorised optimally, what is no matrix is stored as the fine-tune has it, and
the written folder is read back, put on the base and measured against the fine-tune before it gets its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery import __version__
from surgery.convert import coded_as
from surgery.deltas import Measure, measure
from surgery.execute import default_workers
from surgery.extract_calibration import Calibrated, Calibration, calibrate, check_modules, open_calibration
from surgery.extract_dora import Decision, decide, kept_lora
from surgery.extract_factor import Factored, Scratch, factor, in_threads
from surgery.extract_kind import KINDS, CalibrationTotals, Kind
from surgery.extract_ledger import ExtractResult
from surgery.extract_noise import NoiseReport, noise_report
from surgery.extract_plan import MOST_ROWS, Forms, Options, kept_size, settle
from surgery.extract_ranks import Wanted, ranks_of, wanted
from surgery.extract_rows import check_losses, rows_of
from surgery.extract_sites import Spot, Unit, spots_of, tree_name, units_of
from surgery.extract_table import Choice, choices
from surgery.extract_write import TENSOR_FILE, Scaling, configuration, fill, size_of, tensors_of
from surgery.pairs import Pair, differing_settings, pair_up
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import Coded, Format, NewTensor
from surgery_formats.adapters.registry import format_named
from surgery_formats.checkpoint import Checkpoint, Component, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.folder import output_folder
from surgery_formats.identity import content_id, fingerprint
from surgery_formats.linalg.coding import Coding
from surgery_formats.text import listing

if TYPE_CHECKING:
    from surgery.extract_proof import Error

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
        alpha: ``lora_alpha``; by default the rank. Never changes what the adapter does.
        rslora: Scale by ``alpha / sqrt(rank)``.
        kind: ``lora``, ``dora``, or ``auto``: a DoRA where it leaves clearly less of the model's change than a LoRA with as many numbers.
        calibration: Inputs of modules (`surgery.extract_calibration`), for factors that are best on them; a LoRA's only.
        dense: Which one-dimensional changes to keep: ``norm``, ``bias``, or none of them.
        embeddings: ``lora`` or ``full``.
        dtype: Of the factors: ``fp32``, ``fp16``, ``bf16``, or ``auto``: as TUNED. What is copied keeps its own.
        to: Format of the adapter.
        factors: ``int8`` or ``int4``: the format is ``compact``, unless `to` names another that stores codes.
        allow_loss: Leave out what no form can hold.
        device: Where factorisation runs.
        workers: Threads; None is one per core, at most eight. Never changes the result.
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
    goal = wanted(rank, energy, max_error, budget, table=table)
    options = Options(_dense(dense), _one_of(embeddings, ("lora", "full"), "embeddings"))
    scaling = _scaling(alpha, rslora)
    if kind == "dora" and calibration is not None:
        raise FitError("calibration weights the factors of a LoRA, and a DoRA was asked for", hint="kind lora")
    chosen = KINDS[KINDS.index(_one_of(kind, KINDS, "kind"))]
    target = coded_as(format_named("compact" if factors is not None and to == "peft" else to), factors)
    coding = _coding(target, dtype)
    if output is None and not dry_run:
        raise FitError("no output was named")
    pair = _Both(open_checkpoint(base), open_checkpoint(tuned))
    given = None if calibration is None else open_calibration(calibration)
    parent = None if output is None or dry_run else Path(os.path.realpath(Path(output).parent))
    scratch = Scratch(parent if parent is not None and parent.is_dir() else None)
    try:
        threads = workers or default_workers()
        stored = DType.F32 if coding else _dtype(dtype, pair.new)
        made = _Making(goal, options, scaling, stored, coding, chosen, given, scratch, device, threads)
        if given is not None:
            spots = spots_of(pair_up(pair.old, pair.new), pair.old)
            shared = {*pair.old.aliases, pair.old.head, *pair.new.aliases}
            check_modules(given, spots, units_of(spots, pair.old), [*shared, *(tree_name(n, pair.old) for n in shared)])
        scan = _scan(pair, goal, options, scratch, device, threads, progress)
        job = _settled(pair, scan, made, allow_loss=allow_loss)
        job = replace(job, table=job.choices() if table else ())
        if dry_run:
            return replace(job.result(), format=target.name)
        assert output is not None
        if target.name == "peft":
            return _write(job, Path(output), overwrite=overwrite, progress=progress)
        return _converted(job, Path(output), target.name, allow_loss=allow_loss, overwrite=overwrite, progress=progress)
    finally:
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


@dataclass(frozen=True, slots=True)
class _Scan:
    pairs: tuple[Pair, ...]
    spots: tuple[Spot, ...]
    units: tuple[Unit, ...]
    measures: Mapping[str, Measure]
    factored: Mapping[str, Factored]


def _scan(
    both: _Both, goal: Wanted, options: Options, scratch: Scratch, device: str, workers: int, progress: Callback | None
) -> _Scan:
    """Read every pair once to compare it, and once more to factorise it if it changed."""
    pairs = pair_up(both.old, both.new)
    spots = spots_of(pairs, both.old)
    units = units_of(spots, both.old)
    by_name = {spot.pair.name: spot for spot in spots}
    measures: dict[str, Measure] = {}
    factored: dict[str, Factored] = {}
    vocabulary = {both.new.embedding, both.new.head}
    stored_whole = options.embeddings == "full" or (both.old.tied and bool(both.old.head))
    meter = _Meter(sum(spot.pair.tuned.nbytes for spot in spots), progress)

    def look(name: str) -> Measure:
        found = by_name[name].pair
        measures[name] = measure(found, MOST_ROWS if by_name[name].form == "embedding" else 0)
        meter.add(found.tuned.nbytes)
        return measures[name]

    def alone(name: str) -> Callable[[Callable[[], bool]], None]:
        return lambda stop: None if stop() else (look(name), None)[1]

    def together(unit: Unit) -> Callable[[Callable[[], bool]], None]:
        def work(stop: Callable[[], bool]) -> None:
            changed = [look(name).changed for name in unit.names if not stop()]
            whole = stored_whole and bool(vocabulary.intersection(unit.names))
            grown = any(by_name[name].pair.grown > 0 for name in unit.names)
            if (
                any(changed)
                and not whole
                and not grown
                and (done := factor(unit, goal.criterion, scratch, device, stop))
            ):
                factored[unit.path] = done

        return work

    inside = {name for unit in units for name in unit.names}
    in_threads([*map(together, units), *(alone(name) for name in by_name if name not in inside)], workers)
    return _Scan(pairs, spots, units, measures, factored)


class _Meter:
    """Adds up bytes from all threads."""

    def __init__(self, total: int, callback: Callback | None) -> None:
        self._total, self._done, self._callback = total, 0, callback
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._callback is not None:
                self._callback(Progress(self._done, self._total, "factorising"))


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
    scan: _Scan
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
        return {**self.scan.factored, **self.decision.factored, **self.calibrated.factored}

    @property
    def nbytes(self) -> int:
        return size_of(self.tensors, self.metadata)

    def choices(self) -> tuple[Choice, ...]:
        """Other ranks, fewer layers."""
        kept = [kept_size(one) for one in self.forms.kept]
        stored = sum(numbers for numbers, _ in kept), sum(nbytes for _, nbytes in kept)
        return choices(self.forms, self.scan.factored, self.scan.measures, stored, self.coding or self.dtype)

    def result(self) -> ExtractResult:
        """By the spectra."""
        rows = rows_of(
            self.scan.pairs,
            self.scan.measures,
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
        from surgery.extract_rows import with_measured

        errors, result = self._errors(folder), self.result()
        sizes = {path: one.size for path, one in self.decision.magnitudes.items()}
        rows = with_measured(result.rows, errors, self.forms, self.factored, self.ranks, self.dtype, sizes)
        return replace(result, rows=rows)

    def coded(self, folder: Path) -> ExtractResult:
        """By the codes that lie in `folder`, whose error the converter has proved to be what its writer says."""
        errors, result = self._errors(folder), self.result()
        rows = (replace(r, residual=errors[r.name].residual) if r.name in errors else r for r in result.rows)
        return replace(result, rows=tuple(rows))

    def _errors(self, folder: Path) -> dict[str, Error]:
        from surgery.extract_proof import compare

        shifted = {kept.name for kept in self.forms.kept if kept.shift is not None}
        changed = [
            pair
            for pair in self.scan.pairs
            if pair.match == "pair" and (self.scan.measures[pair.name].changed or pair.name in shifted)
        ]
        return compare(folder, self.both.base, changed, self.forms.dropped, self.workers)


def _settled(both: _Both, scan: _Scan, making: _Making, *, allow_loss: bool) -> _Job:
    old, new = both.old, both.new
    goal, dtype, scaling = making.goal, making.dtype, making.scaling

    def formed(ranks: Mapping[str, int]) -> Forms:
        return settle(scan.spots, scan.units, scan.measures, old, new, making.options, ranks)

    ranks: Mapping[str, int] = ranks_of(goal, scan.units, scan.factored, formed, making.coding or dtype)
    decision, dora_ranks = _kind(both, scan, making, formed, ranks)
    if decision.facts.kind == "dora":
        ranks = dora_ranks
    forms = formed(ranks)
    calibrated = Calibrated({}, {}, {})
    if making.calibration is not None:
        calibrated = calibrate(
            making.calibration, forms, scan.spots, scan.factored, ranks, making.scratch, making.device, making.workers,
            biases="bias" in making.options.dense,
        )  # fmt: skip
        calibrated.into(forms, scan.spots)
    for unit in forms.units:
        if goal.rank is not None and ranks[unit.path] < goal.rank:
            forms.why |= dict.fromkeys(
                unit.names, f"rank cut from {goal.rank} to {ranks[unit.path]}: the change has no more"
            )
    check_losses(forms, scan.measures, both.tuned.path, allow_loss=allow_loss)
    if not forms.units and not forms.kept:
        raise FitError("nothing of what changed can be held", file=both.tuned.path)
    metadata = {"format": "pt", "surgery.base": content_id(both.base)}
    factored = {**scan.factored, **decision.factored, **calibrated.factored}
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
    units = [scan.factored[unit.path] for unit in forms.units]
    gains = {path: one.load_gains for path, one in decision.magnitudes.items()}
    noise = noise_report(units, factored, ranks, scan.measures, making.workers, gains)
    warnings = differing_settings(old, new)
    given = making.calibration
    if given is not None and (unused := given.unused(forms.units)):
        warnings += (f"the inputs of {len(unused)} modules are of no use, for they get no factors: {listing(unused)}",)
    asked = goal.rank is not None
    return _Job(
        both, scan, forms, ranks, dtype, making.coding, tensors, config, metadata, plan_id, noise, decision, calibrated, given, asked,
        making.workers, warnings,
    )  # fmt: skip


def _kind(
    both: _Both, scan: _Scan, making: _Making, formed: Callable[[Mapping[str, int]], Forms], ranks: Mapping[str, int]
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
                goal, scan.units, scan.factored, formed, making.coding or making.dtype, magnitudes=True
            )
        except FitError as error:
            if making.kind == "dora":
                raise
            return kept_lora(error.message), ranks
    units = formed(dora_ranks).units
    decision = decide(
        making.kind, units, scan.factored, dora_ranks, ranks, making.scratch, making.device, making.workers,
        both.tuned.path,
    )  # fmt: skip
    return decision, dora_ranks


def _write(job: _Job, out: Path, *, overwrite: bool, progress: Callback | None) -> ExtractResult:
    given = () if job.calibration is None else (job.calibration.path,)
    inputs = (job.both.base.path, job.both.tuned.path, *given)
    with output_folder(out, job.id, overwrite=overwrite, inputs=inputs) as folder:
        folder.write_small("adapter_config.json", job.config)
        if any(kept.via == "resized" for kept in job.forms.kept):
            for name, path in job.both.tuned.side_files:
                if "token" in name or name in ("vocab.json", "merges.txt"):
                    folder.write_small(name, path.read_bytes())
        file = folder.create(TENSOR_FILE, job.nbytes)
        stage = file.path.parent
        file.finish({"xxh3": fill(file, job.tensors, job.metadata)})
        if progress is not None:
            progress(Progress(job.nbytes, job.nbytes, "proving"))
        result = job.proved(stage)
        job.both.check_unchanged()
        if job.calibration is not None:
            job.calibration.check_unchanged()
        folder.commit({**result.as_json(), "version": __version__})
    return replace(result, output=out)


def _converted(
    job: _Job, out: Path, to: str, *, allow_loss: bool, overwrite: bool, progress: Callback | None
) -> ExtractResult:
    """Through a PEFT folder beside the output, by the converter with its own proof."""
    from surgery.convert import convert

    if not out.parent.is_dir():
        raise FitError("no such folder to write into", file=out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem[:100]}.surgery-") as name:
        result = _write(job, Path(name) / "peft", overwrite=False, progress=None)

        def check(path: Path) -> Mapping[str, Any]:
            nonlocal result
            if job.coding is not None:
                result = replace(job.coded(path), format=to)
                return {"extract": result.as_json()}
            return {}

        done = convert(
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
    lost = tuple(
        f"{to} cannot hold '{entry.site}' ({entry.detail})" for entry in done.entries if entry.outcome == "dropped"
    )
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return replace(result, output=out, format=to, adapter_nbytes=size, warnings=result.warnings + lost)
