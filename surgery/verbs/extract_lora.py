# SPDX-License-Identifier: Apache-2.0
"""Extract the smallest adapter that turns a base model into its fine-tune, with an account of every tensor.

Both checkpoints are streamed once. Each difference is factorised optimally while it is in memory, and what the factors
leave of it, as they will be stored, is measured. What is not a matrix is stored as the fine-tune has it. The written
adapter is read back before it appears and must hold what was measured, where it was measured.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from surgery.engine.calibration_file import open_calibration
from surgery.engine.conversion import coded_as
from surgery.engine.devices import devices_of, extraction_devices
from surgery.engine.execute import default_workers
from surgery.engine.inputs import (
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_path,
    check_alpha,
    check_counts,
    output_path,
)
from surgery.extraction.calibration import check_modules
from surgery.extraction.code_noise import with_code_noise
from surgery.extraction.extraction_plan import (
    CheckpointPair,
    ExtractionPlan,
    ExtractionRequest,
    Stopwatch,
    plan_extraction,
    stored_factor_specs,
)
from surgery.extraction.findings import KINDS, Kind
from surgery.extraction.output import load_writer, write_extraction
from surgery.extraction.ranks import rank_goal
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import predicted_result
from surgery.extraction.storage_plan import StorageOptions
from surgery.extraction.stream.lanes import Lanes, default_lanes
from surgery.extraction.stream.scan import layout_of, scan, warming
from surgery.extraction.stream.scratch import ScratchFile, Workspace
from surgery.extraction.targets import tree_name
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.result import timed
from surgery_formats.adapters.format import Coded, Format, Scaling
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.remote.path import is_remote
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component

__all__ = ["ExtractResult", "extract_lora"]

_HELPFUL = 2  # threads beside a GPU: with more the proof takes longer, for they share one interpreter


@timed
def extract_lora(
    base: CheckpointLike,
    tuned: CheckpointLike,
    *,
    output: StrPath | None = None,
    rank: int | Rank = 16,
    alpha: float | None = None,
    rslora: bool = False,
    kind: Kind = "auto",
    calibration: StrPath | None = None,
    dense: Sequence[str] = ("norm", "bias"),
    embeddings: str = "lora",
    matrices: str = "lora",
    dtype: str = "auto",
    to: str = "peft",
    factors: str | None = None,
    allow_loss: bool = False,
    beyond_rounding: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    table: bool = False,
    graph_of: CheckpointLike | None = None,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> ExtractResult:
    """Turn the difference of two checkpoints into an adapter and prove it.

    Args:
        base: What was tuned: weight file or folder, or an opened Checkpoint.
        tuned: The full fine-tune.
        output: Folder to make (file, for a format of single files). Its parent must exist.
        rank: Directions per matrix; or a `surgery.Rank`: by energy, error, a budget for the whole adapter, or above the
            rounding noise of storage. Of a budget, ``Rank.auto & Rank.budget("20MB")`` spends no more than what is
            above the noise.
        alpha: ``lora_alpha``; by default the rank. Never changes what the adapter does.
        rslora: Scale by ``alpha / sqrt(rank)``.
        kind: ``lora``, ``dora``, or ``auto``: a DoRA where it leaves clearly less of the model's change than a LoRA
            with as many numbers.
        calibration: Inputs of modules (`surgery.extraction.calibration`), for factors that are best on them; a LoRA's
            only.
        dense: Which one-dimensional changes to keep: ``norm``, ``bias``, or none of them.
        embeddings: ``lora`` or ``full``.
        matrices: ``full`` keeps every matrix that changed as TUNED has it, embeddings included: what `surgery.insert` takes.
        dtype: Of the factors: ``fp32``, ``fp16``, ``bf16``, or ``auto``: as TUNED. What is copied keeps its own.
        to: Format of the adapter.
        factors: ``int8`` or ``int4``: the format is ``compact``, unless `to` names another that stores codes.
        allow_loss: Leave out what no form can hold.
        beyond_rounding: TUNED is a LoRA merged into BASE, in 16 bits: find its factors more exactly than the rounding of
            the merge, by what each stored value says of the exact one. `surgery.unmerge` of two models asks for it.
        device: Where differences are made and factorised: ``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1``, ``cuda:all``,
            ``auto``. Matrices are shared out over all of them.
        workers: Threads that compute, on GPUs for each of them; None is one per core, at most eight, and three for each
            GPU. Never changes the result.
        overwrite: Replace an existing output, atomically.
        table: Say what ranks 4 to 64 would cost and leave out, for attention, MLP and all layers.
        graph_of: Where `tuned`, or `base` and `tuned`, are ONNX graphs of any exporter: the checkpoint whose names their
            weights get (docs/graphs.md); by default `base`, if that is none.
        dry_run: Compare and factorise, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read.
        FitError: another architecture, other shapes, NaN, a change that nothing holds, options that contradict each
            other.
        NothingChangedError: TUNED is BASE.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    goal = rank_goal(Rank.of(rank), table=table)
    whole = _one_of(matrices, ("lora", "full"), "matrices") == "full"
    embeddings = _one_of(embeddings, ("lora", "full"), "embeddings")
    options = StorageOptions(_dense(dense), "full" if whole else embeddings, matrices)
    scaling = _scaling(alpha, rslora, goal.rank.number)
    if kind == "dora" and calibration is not None:
        raise FitError("calibration weights the factors of a LoRA, and a DoRA was asked for", hint="kind lora")
    if beyond_rounding and (calibration is not None or kind == "dora"):
        raise FitError("`beyond_rounding=True` finds the factors of a merged LoRA, without calibration")
    chosen = KINDS[KINDS.index(_one_of(kind, KINDS, "kind"))]
    adapter_format = coded_as(format_to_write("compact" if factors is not None and to == "peft" else to), factors)
    coding = _coding(adapter_format, dtype)
    check_counts(workers=workers)
    if device != "auto":
        devices_of(device)  # before anything is read
    folder = output_path(output, dry_run=dry_run)
    with _both(base, tuned, graph_of, folder, workers) as sides:
        pair = CheckpointPair(*sides)
        devices, why = extraction_devices(device, sum(tensor.numel for tensor in pair.new.tensors.values()))
        inputs = None if calibration is None else open_calibration(calibration)
        scratch = ScratchFile(_scratch_folder(folder))
        lanes: Lanes | None = None
        stopwatch = Stopwatch()
        try:
            threads = workers or default_lanes(devices)
            stored = DType.F32 if coding else _dtype(dtype, pair.new)
            workspace = Workspace(
                scratch, devices[0], threads, threads if devices[0] == "cpu" else min(default_workers(), _HELPFUL)
            )
            request = ExtractionRequest(
                goal, options, scaling, stored, coding, table, chosen, inputs, allow_loss, workspace, beyond_rounding
            )
            layout = layout_of(pair.old, pair.new, full=options.embeddings == "full", matrices=whole)
            goal.check_patterns(layout.targets)
            if inputs is not None:
                shared = {*pair.old.aliases, pair.old.head, *pair.new.aliases}
                names = [*shared, *(tree_name(name, pair.old) for name in shared)]
                check_modules(inputs, layout.parameters, layout.targets, names)
            if folder is not None:
                load_writer()
            lanes = Lanes(devices, threads)
            specs = stored_factor_specs(goal, scaling, stored)
            lanes.warm(warming(layout, goal, specs))
            scanned = scan(layout, goal, specs, scratch, lanes, progress)
            factored, measures, findings = with_code_noise(scanned.factored, scanned.measures, threads)
            scanned = replace(scanned, factored=factored, measures=measures, findings=findings)
            stopwatch.lap("starting", scanned.began)
            stopwatch.lap("reading")
            plan = plan_extraction(pair, layout, scanned, request, stopwatch)
            if folder is None:
                predicted = replace(
                    _reproduced(predicted_result(plan), plan), format=adapter_format.name, timings=stopwatch.parts
                )
                return replace(predicted, devices=devices, why_devices=why)
            result = write_extraction(plan, adapter_format, folder, stopwatch, overwrite=overwrite, progress=progress)
            timings = {**stopwatch.parts, "first_read_to_synced": time.monotonic() - scanned.began}
            return replace(_reproduced(result, plan), timings=timings, devices=devices, why_devices=why)
        finally:
            if lanes is not None:
                lanes.close()
            scratch.close()


@contextlib.contextmanager
def _both(
    base: CheckpointLike,
    tuned: CheckpointLike,
    graph_of: CheckpointLike | None,
    folder: Path | None,
    workers: int | None,
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both checkpoints; those of graphs are made for the time being."""
    paths = [_graph(base), _graph(tuned)]
    if paths == [None, None]:
        if graph_of is not None:
            raise UsageError("`graph_of` names the checkpoint of graphs, and none was given")
        yield as_checkpoint(base), as_checkpoint(tuned, "tuned")
        return
    if paths[0] is not None and graph_of is None:
        raise UsageError(
            "BASE is a graph, whose names say nothing", hint="name the checkpoint it was made of: `graph_of=`"
        )
    from surgery.onnx.recover.of_graphs import as_checkpoints

    names = as_checkpoint(base if graph_of is None else graph_of, "graph_of")
    beside = folder.absolute().parent if folder is not None and folder.absolute().parent.is_dir() else None
    with as_checkpoints(paths[0], paths[1], names, beside, workers) as (old, new):
        yield old or as_checkpoint(base), new or as_checkpoint(tuned, "tuned")


def _scratch_folder(output: Path | None) -> Path | None:
    """Beside the output; for one in a bucket in memory, and nowhere in particular without one."""
    if output is None:
        return None
    if is_remote(output):
        return memory_folder()
    parent = Path(os.path.realpath(output.parent))  # unlike resolve, no loop of links is a fault
    return parent if parent.is_dir() else None


def _graph(model: CheckpointLike) -> Path | None:
    """The path of a graph, or of a folder of graphs alone; None for any other model."""
    if isinstance(model, Checkpoint):
        return None
    path = as_path(model, "tuned")
    if path.is_dir():
        names = [one.name for one in path.iterdir() if one.is_file()]
        alone = any(name.endswith(".onnx") for name in names) and not any(
            is_weight_file(name) and not name.endswith(".onnx") for name in names
        )
        return path if alone else None
    return path if path.suffix == ".onnx" else None


def _reproduced(result: ExtractResult, plan: ExtractionPlan) -> ExtractResult:
    refined = plan.refined
    if refined is None or not refined.factored:  # of codes and wide elements there are no cells to reach
        return result
    return replace(result, reproduced=(refined.plain, refined.refined))


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise FitError(f"'{value}' is no choice of {what}", hint=f"there are {', '.join(known)}")
    return value


def _dense(chosen: Sequence[str]) -> tuple[str, ...]:
    parts = [part for part in ([chosen] if isinstance(chosen, str) else chosen) if part != "none"]
    return tuple(_one_of(part, ("norm", "bias"), "dense") for part in parts)


def _scaling(alpha: float | None, rslora: bool, rank: int | None) -> Scaling:
    check_alpha(alpha)
    return Scaling(None if alpha is None else float(alpha), rslora, rank)


def _coding(adapter_format: Format, dtype: str) -> Coding | None:
    """The codes that factors are stored as, if they are."""
    if not isinstance(adapter_format, Coded):
        return None
    if dtype != "auto":
        raise FitError(
            f"{adapter_format.name} stores factors as codes, not as {dtype}", hint="`factors=` chooses the codes"
        )
    return adapter_format.coding


def _dtype(text: str, tuned: Component) -> DType:
    if text != "auto":
        return DType.parse(_one_of(text, ("fp32", "fp16", "bf16"), "dtype"))
    largest = max((t for t in tuned.tensors.values() if t.dtype.is_float), key=lambda t: t.numel, default=None)
    return DType.F32 if largest is None or largest.dtype.bits > 16 else largest.dtype
