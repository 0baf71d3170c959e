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
from pathlib import Path
from typing import Literal

from surgery import __version__
from surgery.execute import default_workers
from surgery.extract_factor import Plan, Scratch
from surgery.extract_ledger import ExtractResult
from surgery.extract_plan import Forms, Options, kept_size, settle
from surgery.extract_ranks import Wanted, ranks_of, wanted
from surgery.extract_rows import check_losses, rows_of
from surgery.extract_scan import Found, Layout, layout_of, scan, warm
from surgery.extract_sites import Unit
from surgery.extract_table import Choice, choices
from surgery.extract_write import TENSOR_FILE, Scaling, configuration, fill, size_of, tensors_of
from surgery.lanes import Lanes, devices_of
from surgery.pairs import differing_settings
from surgery.progress import Callback, Progress
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.registry import format_named
from surgery_formats.checkpoint import Checkpoint, Component, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.folder import output_folder
from surgery_formats.identity import content_id, fingerprint

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
    dense: Sequence[str] = ("norm", "bias"),
    embeddings: str = "lora",
    dtype: str = "auto",
    to: str = "peft",
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
        dense: Which one-dimensional changes to keep: ``norm``, ``bias``, or none of them.
        embeddings: ``lora`` or ``full``.
        dtype: Of the factors: ``fp32``, ``fp16``, ``bf16``, or ``auto``: as TUNED. What is copied keeps its own.
        to: Format of the adapter.
        allow_loss: Leave out what no form can hold.
        device: Where differences are made and factorised: ``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1``, ``cuda:all``, ``auto``. Matrices are
            shared out over all of them.
        workers: Threads (per GPU); None is one per core, at most eight. Never changes the result.
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
    target = format_named(to)
    devices = devices_of(device)
    if output is None and not dry_run:
        raise FitError("no output was named")
    pair = _Both(open_checkpoint(base), open_checkpoint(tuned))
    parent = None if output is None or dry_run else Path(os.path.realpath(Path(output).parent))
    scratch = Scratch(parent if parent is not None and parent.is_dir() else None)
    lanes: Lanes | None = None
    started = time.monotonic()
    try:
        layout = layout_of(pair.old, pair.new, full=options.embeddings == "full")
        stored = _dtype(dtype, pair.new)
        lanes = Lanes(devices, workers or default_workers())
        lanes.warm(warm)
        found = scan(layout, goal.criterion, _planned(goal, scaling, stored), scratch, lanes, progress)
        job = _settled(pair, layout, found, goal, options, scaling, stored, allow_loss=allow_loss)
        job = replace(job, table=job.choices() if table else (), workers=workers or default_workers())
        timings = {"starting": found.began - started, "reading": time.monotonic() - found.began}
        if dry_run:
            return replace(job.result(), format=to, timings=timings)
        assert output is not None
        if target.name == "peft":
            result = _write(job, Path(output), overwrite=overwrite, progress=progress)
        else:
            result = _converted(job, Path(output), to, allow_loss=allow_loss, overwrite=overwrite, progress=progress)
        return replace(result, timings={**timings, "first_read_to_synced": time.monotonic() - found.began})
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
        if goal.rank is not None:
            rank = min(goal.rank, unit.largest_rank)
            return Plan(rank, scaling.fold(rank), dtype)
        alone = goal.budget is None and not goal.auto and scaling.constant
        return Plan(None, 1.0, dtype) if alone else None

    return plan


@dataclass(frozen=True)
class _Job:
    """All that is decided; nothing is written yet."""

    both: _Both
    layout: Layout
    found: Found
    forms: Forms
    ranks: Mapping[str, int]
    dtype: DType
    tensors: tuple[NewTensor, ...]
    config: bytes
    metadata: Mapping[str, str]
    id: str
    warnings: tuple[str, ...] = ()
    table: tuple[Choice, ...] = ()
    workers: int = 1

    @property
    def nbytes(self) -> int:
        return size_of(self.tensors, self.metadata)

    def choices(self) -> tuple[Choice, ...]:
        """Other ranks, fewer layers."""
        kept = [kept_size(one) for one in self.forms.kept]
        stored = sum(numbers for numbers, _ in kept), sum(nbytes for _, nbytes in kept)
        return choices(self.forms, self.found.factored, self.found.measures, stored, self.dtype)

    def result(self) -> ExtractResult:
        """By the spectra."""
        rows = rows_of(self.layout.pairs, self.found.measures, self.found.factored, self.forms, self.ranks, self.dtype)
        return ExtractResult(
            None,
            "peft",
            self.metadata["surgery.base"],
            rows,
            self.dtype.label,
            self.nbytes,
            self.both.tuned.nbytes,
            self.warnings,
            self.table,
        )

    def proved(self, folder: Path) -> ExtractResult:
        """By what lies in `folder`.

        Raises:
            ProofError: it does something else.
        """
        from surgery.extract_proof import prove
        from surgery.extract_rows import with_measured

        changed = [
            pair for pair in self.layout.pairs if pair.match == "pair" and self.found.measures[pair.name].changed
        ]
        known = {unit.path: self.found.factored[unit.path] for unit in self.forms.units}
        errors = prove(folder, self.both.base, changed, known, self.found.measures, self.forms.dropped, self.workers)
        result = self.result()
        return replace(
            result, rows=with_measured(result.rows, errors, self.forms, self.found.factored, self.ranks, self.dtype)
        )


def _settled(
    both: _Both,
    layout: Layout,
    found: Found,
    goal: Wanted,
    options: Options,
    scaling: Scaling,
    dtype: DType,
    *,
    allow_loss: bool,
) -> _Job:
    old, new = both.old, both.new

    def formed(ranks: Mapping[str, int]) -> Forms:
        return settle(layout.spots, layout.units, found.measures, old, new, options, ranks)

    ranks = ranks_of(goal, layout.units, found.factored, formed, dtype)
    forms = formed(ranks)
    for unit in forms.units:
        if goal.rank is not None and ranks[unit.path] < goal.rank:
            forms.why |= dict.fromkeys(
                unit.names, f"rank cut from {goal.rank} to {ranks[unit.path]}: the change has no more"
            )
    check_losses(forms, found.measures, both.tuned.path, allow_loss=allow_loss)
    if not forms.units and not forms.kept:
        raise FitError("nothing of what changed can be held", file=both.tuned.path)
    metadata = {"format": "pt", "surgery.base": content_id(both.base, found.digests.of)}
    tensors = tensors_of(forms, found.factored, ranks, scaling, dtype)
    config = configuration(forms, ranks, scaling, goal.rank, old, both.base.path.resolve().name)
    facts = {
        "version": __version__,
        "verb": "extract-lora",
        "config": hashlib.sha256(config).hexdigest(),
        "tensors": [(tensor.name, tensor.dtype.label, tensor.shape) for tensor in tensors],
        "base": metadata["surgery.base"],
        "tuned": sorted(fingerprint(shard.file) for shard in new.shards),
    }
    plan_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _Job(
        both, layout, found, forms, ranks, dtype, tensors, config, metadata, plan_id, differing_settings(old, new)
    )


def _write(job: _Job, out: Path, *, overwrite: bool, progress: Callback | None) -> ExtractResult:
    inputs = (job.both.base.path, job.both.tuned.path)
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
        done = convert(
            Path(name) / "peft",
            to,
            out,
            base=job.both.base.path,
            allow_loss=allow_loss,
            overwrite=overwrite,
            progress=progress,
        )
    lost = tuple(
        f"{to} cannot hold '{entry.site}' ({entry.detail})" for entry in done.entries if entry.outcome == "dropped"
    )
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return replace(result, output=out, format=to, adapter_nbytes=size, warnings=result.warnings + lost)
