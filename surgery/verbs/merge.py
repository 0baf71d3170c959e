# SPDX-License-Identifier: Apache-2.0
"""Merge: the base with everything the adapters trained folded into its weights, at the cost of copying the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.engine.devices import device_of
from surgery.engine.execute import Run, execute
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_list,
    as_path,
    as_weighted,
    check_counts,
    output_path,
)
from surgery.engine.ledger import Ledger
from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.merge.merge_result import MergeResult
from surgery.engine.merge.model_card import merge_card
from surgery.engine.output_checks import check_output
from surgery.engine.quantised.output import quantised_output
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import NothingChangedError, UsageError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.threads import one_thread

if TYPE_CHECKING:
    from surgery.engine.quantised.residual import ResidualLoRA
    from surgery.engine.shares.work import EngineLike

__all__ = ["MergeResult", "merge"]


@timed
def merge(
    base: CheckpointLike,
    adapters: AdaptersLike,
    *,
    output: StrPath | None = None,
    dtype: str = "keep",
    device: str = "cpu",
    workers: int | None = None,
    memory_limit: int | None = None,
    shard_size: int | None = None,
    layout: str = "keep",
    quantized: str = "dequantize",
    only_touched: bool = False,
    rounding: str | None = None,
    calibration: StrPath | None = None,
    accept_loss: bool = False,
    without: str | Sequence[str] = (),
    replace: AdaptersLike = (),
    rank: int | None = None,
    max_error: float | None = None,
    reversible: bool = False,
    as_trained: CheckpointLike | None = None,
    graph_of: CheckpointLike | None = None,
    verify_copies: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    engine: EngineLike | None = None,
    progress: Callback | None = None,
) -> MergeResult:
    """Merge adapters into a base and write the result as a folder of its own.

    Args:
        base: Weight file, Hugging Face folder, diffusers pipeline folder, or an opened Checkpoint.
        adapters: One or several, applied in this order: a path or an opened Adapter, ``adapter * 0.7``,
            ``(path, 0.7)``, or a mapping ``{path: 0.7}``.
        output: Folder to make. Its parent must exist.
        dtype: ``keep`` (each tensor its own), or a type for every floating-point tensor (``bf16``, ``fp16``, ``fp32``).
        device: Where arithmetic runs: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is the cpu, where a merge is sooner done
            (docs/benchmarks.md).
        workers: Threads that compute, or processes where many have much to do; None is one per core, at most eight
            threads or 16 processes. Never changes the result.
        memory_limit: Bytes the computed tensors may take together.
        shard_size: Most bytes per weight file; None keeps the base's shards.
        layout: ``keep`` the base's order of tensors; ``packed`` puts those that a graph reads together together
            (`surgery.engine.packing`).
        quantized: What a quantised base becomes: ``dequantize`` stores it in 16 bits, ``requantize`` in its own format,
            ``residual`` in its own format with a LoRA beside it, in the folder ``adapter``, of what that cannot hold.
        only_touched: Dequantise what an adapter changes; everything else keeps its format.
        rounding: How ``requantize`` chooses codes: ``feedback`` (the default) makes up for errors along the inputs that
            the adapter listens to, where rounding to ``nearest`` would lose a part of the update.
        calibration: Of ``requantize``: a file of inputs (docs/extraction.md), along which errors are made up for too.
        accept_loss: Write codes that hold less than half of the update, too.
        without: Patterns of modules of the adapters to leave out, such as those that the base lacks: ``text_encoder:*``.
        replace: Adapters that were merged into `base`, all of them, in their order and with their weights: they are taken back
            first, as `surgery.unmerge` does, without a model being written in between.
        rank: Of ``residual``: most directions of the LoRA of a weight; by default as many as hold all of the update, and
            at least 16 where it is no LoRA (a DoRA, (IA)^3 ...), which leaves a part that the result states.
        max_error: Of ``residual``: how far a weight may be off, relative to its update.
        reversible: Keep beside the model what rounding loses, as ``base.rounding``, so that `surgery.unmerge` gives the
            base back bit for bit.
        as_trained: The quantised model that the adapters were trained on, whose values take the place of the release's
            in `base`; or ``nf4``, ``nf4-double``, ``fp4``, ``fp4-double``: what bitsandbytes makes of `base` when it is
            loaded in 4 bits. Names, types and side files remain the base's.
        graph_of: Where `base` is an ``.onnx`` file that any exporter made, or a folder with one: the checkpoint that it was
            made of. Only the bytes of weights located in it change (docs/graphs.md).
        verify_copies: Compare copied ranges byte by byte too, and note the sha256 of every file.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        engine: Where weights are computed: ``local`` (None) is this process, ``ray`` and ``ray:HOST:PORT`` are a cluster
            (docs/scale-out.md), and `surgery.engine.shares.folders.Shares` takes what workers have computed. Inputs are
            named by their paths then.
        progress: Called with every step.

    Returns:
        The ledger of every tensor.

    Raises:
        UsageError: an argument of a wrong type, arguments that contradict each other, or no output.
        InputError: base or adapter cannot be read.
        FitError: they do not fit, a tensor has no use, a value is NaN or Inf.
        NothingChangedError: the output would be the base, or its codes hold too little of the update.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers, shard_size=shard_size, memory_limit=memory_limit)
    cluster = None
    if engine is not None and engine != "local":
        from surgery.engine.shares.choice import cluster_of, device_of_workers

        cluster, device = cluster_of(engine), device_of_workers(device)
    else:
        device = device_of(device)
    folder = output_path(output, dry_run=dry_run)
    run = Run(workers, memory_limit, device, verify_copies, overwrite, progress)
    if graph_of is not None:
        from surgery.verbs.merge_graph import merge_graph

        others = {
            "dtype": dtype != "keep", "shard_size": shard_size, "layout": layout != "keep",
            "quantized": quantized != "dequantize", "only_touched": only_touched, "rounding": rounding,
            "calibration": calibration, "rank": rank, "max_error": max_error, "reversible": reversible,
            "as_trained": as_trained is not None, "memory_limit": memory_limit, "engine": cluster, "replace": replace,
        }  # fmt: skip
        if odd := [name for name, given in others.items() if given]:
            raise UsageError(
                f"{odd[0]} belongs to checkpoints: a graph keeps its types and its layout",
                hint=f"leave out `{odd[0]}=`, or, of a checkpoint, `graph_of=`",
            )
        if isinstance(base, Checkpoint):
            raise UsageError("a graph is named by its path")
        return merge_graph(
            as_path(base, "base"), graph_of, adapters, folder, run, without=as_list(without), accept_loss=accept_loss
        )
    if isinstance(base, str | os.PathLike) and os.fspath(base).endswith(".onnx"):
        raise UsageError("an ONNX graph needs the checkpoint that it was made of", hint="name it: `graph_of=BASE`")
    quantised = quantised_output(
        quantized,
        only_touched=only_touched,
        rounding=rounding,
        rank=rank,
        max_error=max_error,
        calibration=calibration,
        accept_loss=accept_loss,
        reversible=reversible,
        as_trained=as_trained is not None,
        dtype=dtype,
    )
    undone = None
    if replaced := as_weighted(replace, "replace"):
        if as_trained is not None or reversible or quantised.way != "dequantize":
            raise UsageError("adapters are replaced in plain weights", hint="unmerge first, and then merge")
        if cluster is not None:
            raise UsageError(
                "adapters are replaced in this process alone", hint="leave out `engine=`, or unmerge first"
            )
        from surgery.engine.undo.undone import undone_values
        from surgery.verbs.unmerge import kept_beside

        base = as_checkpoint(base)
        undone = undone_values(base, [(entry.adapter, entry.weight) for entry in replaced], kept_beside(base))
    shared = None
    if cluster is not None:
        from surgery.engine.merge.merge_request import request_of
        from surgery.engine.shares.planned import InShares

        request = request_of(
            base, adapters, dtype=dtype, shard_size=shard_size, layout=layout, quantized=quantized,
            only_touched=only_touched, rounding=rounding, rank=rank, max_error=max_error, calibration=calibration,
            reversible=reversible, as_trained=as_trained, without=tuple(as_list(without)),
        )  # fmt: skip
        shared = InShares(cluster, request, run)
        binding, plan = request.planned()
    else:
        binding, plan = planned_merge(
            base, adapters, dtype, shard_size, layout, quantised, reversible, as_trained, as_list(without), undone
        )
    if reversible and any(component.made for component in binding.checkpoint.components.values()):
        raise UsageError("a base that is not written cannot come back", hint="write it first")
    if folder is None:
        from surgery.engine.preview import obstacles, preview

        beside = 0
        if quantised.way == "residual":
            from surgery.engine.quantised.residual import most_nbytes

            beside = most_nbytes(binding, quantised)
        ahead = preview(plan, None if output is None else to_path(output), workers, beside)
        return MergeResult(None, Ledger(plan), (*plan.warnings, *obstacles(plan, ahead, overwrite=overwrite)), ahead)
    warnings: list[str] = list(plan.warnings)
    if undone is not None and not undone.exact:
        warnings.append("the values before are an estimate: rounding lost what a reversible merge would have kept")

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        weights = [weight for _, weight in binding.adapters]
        if quantised.way != "residual":
            warnings.extend(check_output(ledger, binding.checkpoint, weights, accept_loss=accept_loss))
        return {"README.md": merge_card(binding, ledger, residual=quantised.way == "residual")}

    kept: list[int] = []
    residual: list[ResidualLoRA] = []

    def last(staged: OutputFolder) -> None:
        if reversible:
            from surgery.engine.undo.record import record_base  # it reads back all that was computed

            kept.append(record_base(binding, plan, staged, run))
        if quantised.way == "residual":
            from surgery.engine.quantised.residual import write_residual

            with one_thread():
                residual.append(write_residual(binding, plan, quantised, staged))
            if not plan.computed() and not any(weight.update > 0 for weight in residual[0].weights):
                raise NothingChangedError(
                    "no weight of the base would change", hint="the adapters are all zeros, or cancel each other"
                )

    needed = reversible or quantised.way == "residual"
    ledger = execute(plan, folder, run, finish, shared, last if needed else None)
    found = residual[0] if residual else None
    if found is not None and max_error is None:
        warnings.extend(found.warnings)
    return MergeResult(folder, ledger, tuple(warnings), rounding_nbytes=sum(kept), residual=found)
