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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.adapter_output import check_adapter_output
from surgery.engine.calibration_file import Calibration, open_calibration
from surgery.engine.devices import Devices, devices_of, extraction_devices, on_gpus
from surgery.engine.execute import Run, default_workers
from surgery.engine.inputs import (
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_path,
    check_counts,
    local_path,
    output_path,
)
from surgery.engine.shares.choice import cluster_of, device_of_workers
from surgery.engine.shares.work import Cluster, EngineLike, portable
from surgery.extraction.calibration import check_modules
from surgery.extraction.code_noise import with_code_noise
from surgery.extraction.extraction_plan import (
    CheckpointPair,
    ExtractionPlan,
    ExtractionSettings,
    Stopwatch,
    plan_extraction,
)
from surgery.extraction.findings import KINDS, Kind
from surgery.extraction.output import load_writer, write_extraction
from surgery.extraction.pass_options import one_of, pass_options
from surgery.extraction.request import ExtractRequest, ExtractWork
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import predicted_result
from surgery.extraction.storage_plan import StorageOptions
from surgery.extraction.stream.lanes import Lanes, default_lanes
from surgery.extraction.stream.scan import scan, warming
from surgery.extraction.stream.scan_plan import ScanLayout
from surgery.extraction.stream.scratch import ScratchFile, Workspace
from surgery.extraction.targets import tree_name
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.result import timed
from surgery_formats.adapters.format import Format
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.errors import FitError, UsageError
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.remote.path import is_remote
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.extraction.evaluated import EvaluatedPair

__all__ = ["ExtractResult", "extract_lora"]

_HELPFUL = 2  # threads beside a GPU: with more the proof takes longer, for they share one interpreter
_MERGED = "the fine-tune belongs here; surgery merge makes a full model of an adapter and its base"


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
    eval: StrPath | None = None,
    graph_of: CheckpointLike | None = None,
    dry_run: bool = False,
    engine: EngineLike | None = None,
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
        eval: A text in UTF-8, on which BASE, BASE with the adapter attached, and TUNED are measured
            (docs/evaluating.md): how much of what TUNED gained the adapter has. With `table` LoRAs of its ranks are, too.
        graph_of: Where `tuned`, or `base` and `tuned`, are ONNX graphs of any exporter: the checkpoint whose names their
            weights get (docs/graphs.md); by default `base`, if that is none.
        dry_run: Compare and factorise, write nothing.
        engine: Where both checkpoints are compared and factorised: None or ``local`` is this process, ``ray`` and
            ``ray:HOST:PORT`` a cluster (docs/scale-out.md). Never changes the result.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read.
        FitError: another architecture, other shapes, NaN, a change that nothing holds, options that contradict each
            other, models that predict no next token or have different vocabularies, and a text for them.
        NothingChangedError: TUNED is BASE.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    asked: dict[str, Any] = {
        "rank": rank, "alpha": alpha, "rslora": rslora, "embeddings": embeddings, "matrices": matrices, "dtype": dtype,
        "to": to, "factors": factors, "table": table, "evaluated": eval is not None,
    }  # fmt: skip
    chosen = pass_options(**asked)
    options = StorageOptions(_dense(dense), "full" if chosen.full else "lora", matrices)
    form = _form(kind, calibrated=calibration is not None, beyond_rounding=beyond_rounding)
    check_counts(workers=workers)
    cluster = cluster_of(engine)
    named = device if cluster is None else device_of_workers(device)
    if named != "auto" and cluster is None:
        devices_of(named)  # before anything is read
    text = None if eval is None else local_path(eval, "eval")
    folder = output_path(output, dry_run=dry_run)
    run = Run(workers, device=named, overwrite=overwrite, progress=progress)
    shares = None if cluster is None else _in_shares(cluster, base, tuned, asked, graph_of, folder, run)
    with _both(base, tuned, graph_of, folder, workers) as sides, contextlib.ExitStack() as held:
        pair = CheckpointPair(*sides)
        evaluated = None if text is None else _evaluated(pair, text)
        numel = sum(tensor.numel for tensor in pair.new.tensors.values())
        devices, why = Devices(("cpu",)) if shares is not None else extraction_devices(named, numel)
        inputs = None if calibration is None else open_calibration(calibration)
        workspace, stopwatch = _workspace(folder, devices, workers), Stopwatch()
        held.callback(workspace.scratch.close)
        settings = ExtractionSettings(
            chosen.goal, options, chosen.scaling, chosen.stored(pair.new), chosen.coding, table, form, inputs,
            allow_loss, workspace, beyond_rounding,
        )  # fmt: skip
        work = ExtractWork.of(pair, chosen, on_gpus=on_gpus(devices if shares is None else [named]))
        if inputs is not None:
            _check_inputs(inputs, pair, work.plan.layout)
        if folder is not None:
            roots = (pair.base.path, pair.tuned.path, *([] if text is None else [text]))
            check_adapter_output(chosen.adapter_format, folder, roots, overwrite=overwrite)
            load_writer()
        if shares is not None:
            scanned = work.result(held.enter_context(shares(work)))
        else:
            lanes = Lanes(devices, workspace.lanes)
            held.callback(lanes.close)
            lanes.warm(warming(work.plan))
            scanned = scan(work.plan, workspace.scratch, lanes, progress)
        factored, measures, findings = with_code_noise(scanned.factored, scanned.measures, workspace.lanes)
        scanned = replace(scanned, factored=factored, measures=measures, findings=findings)
        stopwatch.lap("starting", scanned.began)
        stopwatch.lap("reading")
        plan = plan_extraction(pair, work.plan.layout, scanned, settings, stopwatch)
        if folder is None:
            result = _foreseen(plan, chosen.adapter_format, evaluated, stopwatch, progress)
        else:
            result = write_extraction(
                plan, chosen.adapter_format, folder, stopwatch,
                overwrite=overwrite, progress=progress, evaluated=evaluated,
            )  # fmt: skip
            timings = {**stopwatch.parts, "first_read_to_synced": time.monotonic() - scanned.began}
            result = replace(_reproduced(result, plan), timings=timings)
        return replace(result, devices=devices, why_devices=why)


def _form(kind: str, *, calibrated: bool, beyond_rounding: bool) -> Kind:
    """What factors are made as; refuses what a DoRA or inputs do not go with."""
    if kind == "dora" and calibrated:
        raise FitError("calibration weights the factors of a LoRA, and a DoRA was asked for", hint="kind lora")
    if beyond_rounding and (calibrated or kind == "dora"):
        raise FitError("`beyond_rounding=True` finds the factors of a merged LoRA, without calibration")
    return KINDS[KINDS.index(one_of(kind, KINDS, "kind"))]


def _in_shares(
    cluster: Cluster,
    base: CheckpointLike,
    tuned: CheckpointLike,
    asked: Mapping[str, Any],
    graph_of: CheckpointLike | None,
    folder: Path | None,
    run: Run,
) -> Callable[[ExtractWork], AbstractContextManager[Sequence[Path]]]:
    """What has a cluster do the pass over both checkpoints; see `Cluster.shares`."""
    if folder is None:
        raise UsageError("shares lie beside the output, and a dry run has none", hint="leave out `engine=`")
    if graph_of is not None:
        raise UsageError("the weights of graphs are compared here", hint="leave out `engine=`")
    request = ExtractRequest(portable(base, "base"), portable(tuned, "tuned"), **asked, on_gpus=on_gpus([run.device]))
    return lambda work: cluster.shares(request, work, folder, run)


def _workspace(output: Path | None, devices: Sequence[str], workers: int | None) -> Workspace:
    lanes = workers or default_lanes(devices)
    threads = lanes if devices[0] == "cpu" else min(default_workers(), _HELPFUL)
    return Workspace(ScratchFile(_scratch_folder(output)), devices[0], lanes, threads)


def _check_inputs(inputs: Calibration, pair: CheckpointPair, layout: ScanLayout) -> None:
    """Check that inputs are those of modules of the model, a tied one under any of its names."""
    shared = {*pair.old.aliases, pair.old.head, *pair.new.aliases}
    names = [*shared, *(tree_name(name, pair.old) for name in shared)]
    check_modules(inputs, layout.parameters, layout.targets, names)


def _foreseen(
    plan: ExtractionPlan,
    target: Format,
    evaluated: EvaluatedPair | None,
    stopwatch: Stopwatch,
    progress: Callback | None,
) -> ExtractResult:
    """What a dry run knows."""
    if evaluated is not None:
        plan = evaluated.measured(plan, progress)
        stopwatch.lap("evaluating")
    predicted = _reproduced(predicted_result(plan), plan)
    if evaluated is not None and target.name != predicted.format:
        before = f"a dry run makes no {target.name}: what comes before it was evaluated"
        predicted = replace(predicted, warnings=(*predicted.warnings, before))
    return replace(predicted, format=target.name, timings=stopwatch.parts)


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
        yield as_checkpoint(base), as_checkpoint(tuned, "tuned", hint=_MERGED)
        return
    if paths[0] is not None and graph_of is None:
        raise UsageError(
            "BASE is a graph, whose names say nothing", hint="name the checkpoint it was made of: `graph_of=`"
        )
    from surgery.onnx.recover.of_graphs import as_checkpoints

    names = as_checkpoint(base if graph_of is None else graph_of, "graph_of")
    beside = folder.absolute().parent if folder is not None and folder.absolute().parent.is_dir() else None
    with as_checkpoints(paths[0], paths[1], names, beside, workers) as (old, new):
        yield old or as_checkpoint(base), new or as_checkpoint(tuned, "tuned", hint=_MERGED)


def _evaluated(pair: CheckpointPair, text: Path) -> EvaluatedPair:
    from surgery.extraction.evaluated import open_evaluated_pair  # who asks for no text needs no tokenizer

    return open_evaluated_pair(pair, text)


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


def _dense(chosen: Sequence[str]) -> tuple[str, ...]:
    parts = [part for part in ([chosen] if isinstance(chosen, str) else chosen) if part != "none"]
    return tuple(one_of(part, ("norm", "bias"), "dense") for part in parts)
