# SPDX-License-Identifier: Apache-2.0
"""Merge: the base with everything the adapters trained folded into its weights, at the cost of copying the file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.merge.merge_result import MergeResult
from surgery.engine.merge.model_card import merge_card
from surgery.engine.output_checks import check_output
from surgery.engine.plan import Plan
from surgery.engine.quantised.output import QuantisedOutput
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.binding.bind import Binding
from surgery_formats.errors import NothingChangedError, UsageError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.threads import one_thread

if TYPE_CHECKING:
    from surgery.engine.quantised.residual import ResidualLoRA
    from surgery.engine.shares.work import Cluster, EngineLike
    from surgery.engine.undo.undone import UndoneValues
    from surgery_formats.canonical.adapter import WeightedAdapter

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
    cluster, device = _computing_on(engine, device)
    folder = output_path(output, dry_run=dry_run)
    run = Run(workers, memory_limit, device, verify_copies, overwrite, progress)
    request = MergeRequest(
        base, adapters, dtype, shard_size, layout, quantized, only_touched, rounding, rank, max_error,
        calibration, reversible, as_trained, tuple(as_list(without)),
    )  # fmt: skip
    if graph_of is not None:
        from surgery.verbs.merge_graph import merge_graph

        graph = _graph_of(request, run, replace, cluster)
        return merge_graph(graph, graph_of, adapters, folder, run, without=request.without, accept_loss=accept_loss)
    if isinstance(base, str | os.PathLike) and os.fspath(base).endswith(".onnx"):
        raise UsageError("an ONNX graph needs the checkpoint that it was made of", hint="name it: `graph_of=BASE`")
    quantised = request.quantised(accept_loss=accept_loss)
    undone = None
    if replaced := as_weighted(replace, "replace"):
        request, undone = _taken_back(request, quantised, replaced, cluster)
    shared = None
    if cluster is not None:
        from surgery.engine.shares.planned import InShares

        request = request.portable()
        shared = InShares(cluster, request, run)
    binding, plan = request.planned(quantised, undone)
    if reversible and any(component.made for component in binding.checkpoint.components.values()):
        raise UsageError("a base that is not written cannot come back", hint="write it first")
    if folder is None:
        return _foreseen(binding, plan, quantised, None if output is None else to_path(output), run)
    warnings = [*plan.warnings]
    if undone is not None and not undone.exact:
        warnings.append("the values before are an estimate: rounding lost what a reversible merge would have kept")
    written = _MergeOutput(request, binding, plan, quantised, run, accept_loss, warnings)
    ledger = execute(plan, folder, run, written.card, shared, written.what_is_lost if written.is_read_back else None)
    return written.result(folder, ledger)


def _computing_on(engine: EngineLike | None, device: str) -> tuple[Cluster | None, str]:
    """The cluster, None where this process computes, and the device."""
    if engine is None or engine == "local":
        return None, device_of(device)
    from surgery.engine.shares.choice import cluster_of, device_of_workers

    return cluster_of(engine), device_of_workers(device)


def _graph_of(request: MergeRequest, run: Run, replace: AdaptersLike, cluster: Cluster | None) -> Path:
    """The path of the graph to merge into; refuses all that only checkpoints have."""
    others = {
        "dtype": request.dtype != "keep", "shard_size": request.shard_size, "layout": request.layout != "keep",
        "quantized": request.quantized != "dequantize", "only_touched": request.only_touched,
        "rounding": request.rounding, "calibration": request.calibration, "rank": request.rank,
        "max_error": request.max_error, "reversible": request.reversible, "as_trained": request.as_trained is not None,
        "memory_limit": run.memory_limit, "engine": cluster, "replace": replace,
    }  # fmt: skip
    if odd := [name for name, given in others.items() if given]:
        raise UsageError(
            f"{odd[0]} belongs to checkpoints: a graph keeps its types and its layout",
            hint=f"leave out `{odd[0]}=`, or, of a checkpoint, `graph_of=`",
        )
    if isinstance(request.base, Checkpoint):
        raise UsageError("a graph is named by its path")
    return as_path(request.base, "base")


def _taken_back(
    request: MergeRequest, quantised: QuantisedOutput, replaced: Sequence[WeightedAdapter], cluster: Cluster | None
) -> tuple[MergeRequest, UndoneValues]:
    """The request with its base opened, and the values that this had before the `replaced` adapters were merged."""
    if request.as_trained is not None or request.reversible or quantised.way != "dequantize":
        raise UsageError("adapters are replaced in plain weights", hint="unmerge first, and then merge")
    if cluster is not None:
        raise UsageError("adapters are replaced in this process alone", hint="leave out `engine=`, or unmerge first")
    from surgery.engine.undo.undone import undone_values
    from surgery.verbs.unmerge import kept_beside

    base = as_checkpoint(request.base)
    undone = undone_values(base, [(entry.adapter, entry.weight) for entry in replaced], kept_beside(base))
    return dataclasses.replace(request, base=base), undone


def _foreseen(binding: Binding, plan: Plan, quantised: QuantisedOutput, output: Path | None, run: Run) -> MergeResult:
    """What a dry run knows."""
    from surgery.engine.preview import obstacles, preview

    beside = 0
    if quantised.way == "residual":
        from surgery.engine.quantised.residual import most_nbytes

        beside = most_nbytes(binding, quantised)
    ahead = preview(plan, output, run.workers, beside)
    return MergeResult(None, Ledger(plan), (*plan.warnings, *obstacles(plan, ahead, overwrite=run.overwrite)), ahead)


@dataclass(slots=True)
class _MergeOutput:
    """An output while it is written: what `execute` asks for beside the weights, and what that tells.

    Attributes:
        request: What was asked for.
        binding: Of base and adapters.
        plan: Of the weights.
        quantised: What becomes of a quantised base.
        run: How.
        accept_loss: Whether codes may lose most of the update.
        warnings: What the user should know so far.
        rounding_nbytes: Of what a reversible merge keeps, once it is written.
        residual: The LoRA beside the codes, once it is written.
    """

    request: MergeRequest
    binding: Binding
    plan: Plan
    quantised: QuantisedOutput
    run: Run
    accept_loss: bool
    warnings: list[str]
    rounding_nbytes: int = 0
    residual: ResidualLoRA | None = None

    @property
    def is_read_back(self) -> bool:
        """Whether the weights are read again, for what they lost comes beside them."""
        return self.request.reversible or self._is_residual

    @property
    def _is_residual(self) -> bool:
        return self.quantised.way == "residual"

    def card(self, ledger: Ledger) -> Mapping[str, bytes]:
        """The model card, if the output is one to keep; see `execute`.

        Raises:
            NothingChangedError: it is not.
        """
        if not self._is_residual:
            weights = [weight for _, weight in self.binding.adapters]
            self.warnings += check_output(ledger, self.binding.checkpoint, weights, accept_loss=self.accept_loss)
        return {"README.md": merge_card(self.binding, ledger, residual=self._is_residual)}

    def what_is_lost(self, staged: OutputFolder) -> None:
        """Write what the weights in the staged folder lack of the base, or of the update; see `execute`.

        Raises:
            NothingChangedError: neither the codes nor the LoRA beside them hold anything of the update.
        """
        if self.request.reversible:
            from surgery.engine.undo.record import record_base  # it reads back all that was computed

            self.rounding_nbytes = record_base(self.binding, self.plan, staged, self.run)
        if self._is_residual:
            from surgery.engine.quantised.residual import write_residual

            with one_thread():
                self.residual = write_residual(self.binding, self.plan, self.quantised, staged)
            if not self.plan.computed() and not any(weight.update > 0 for weight in self.residual.weights):
                raise NothingChangedError(
                    "no weight of the base would change", hint="the adapters are all zeros, or cancel each other"
                )

    def result(self, folder: Path, ledger: Ledger) -> MergeResult:
        """What became of it all."""
        if self.residual is not None and self.request.max_error is None:
            self.warnings += self.residual.warnings
        return MergeResult(
            folder, ledger, tuple(self.warnings), rounding_nbytes=self.rounding_nbytes, residual=self.residual
        )
