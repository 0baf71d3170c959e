# SPDX-License-Identifier: Apache-2.0
"""The weights of an export as work that is done in shares: codes, merged weights, numbers of a quantised base.

A worker plans the weights alone. Graphs, files beside them and the proof are the driver's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from surgery.engine.inputs import as_checkpoint
from surgery.onnx.export.adapters import AdapterRoles, sort_adapters
from surgery.onnx.export.weight_options import WeightOptions
from surgery.onnx.export.weights_to_write import weights_to_write
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.tasks import FEATURES, SENTENCE, check_task

if TYPE_CHECKING:
    from surgery.engine.execute import Run
    from surgery.engine.shares.planned import InShares, PlannedWork
    from surgery.engine.shares.work import EngineLike
    from surgery.onnx.export.merged import MergedWeights
    from surgery.onnx.export.weight_coding import WeightCoding
    from surgery_formats.binding.bind import Binding

__all__ = ["ExportRequest", "ExportedWeights", "WeightsAsked", "in_shares"]


class ExportedWeights(NamedTuple):
    """The weights of an export.

    Attributes:
        task: What the graph is for; empty for what the model was saved for.
        coding: How they are written; None for as they are stored.
        full: Whether all are written, not only those that change.
        binding: The adapters to merge, bound; None where graphs refer to nothing but the base's files.
        merged: What is computed; None likewise.
    """

    task: str
    coding: WeightCoding | None
    full: bool
    binding: Binding | None
    merged: MergedWeights | None


@dataclass(frozen=True, slots=True)
class WeightsAsked:
    """All options that decide the bytes of an export's weights, as `surgery.export_onnx` takes them."""

    task: str | None = None
    merge_to: str = "delta"
    target: str = "cpu"
    dtype: str = "auto"
    layout: str = "plain"
    opset: int | None = None
    options: WeightOptions = field(default_factory=WeightOptions)

    @property
    def older(self) -> bool:
        """Whether an older runtime is to run the graph: QMoE needs onnxruntime 1.31."""
        return self.opset is not None or self.layout == "transformers.js"

    def planned(self, checkpoint: Checkpoint, roles: AdapterRoles) -> ExportedWeights:
        """Plan them.

        Raises:
            FitError, UsageError: see `surgery.export_onnx`.
        """
        if self.merge_to not in ("delta", "full"):
            raise FitError(f"merge_to is 'delta' or 'full', not '{self.merge_to}'")
        coding = self.options.coding(self.target)
        # all codes are written, and no graph refers to a GGUF
        gguf = any(shard.container == "gguf" for shard in checkpoint.main.shards)
        full = self.merge_to == "full" or gguf or coding is not None
        if coding is not None:
            coding = replace(coding, stacked=coding.stacked and not self.older)
        check_task(self.task)
        task = FEATURES if self.task == SENTENCE else self.task or ""
        io = self.target, self.dtype
        return ExportedWeights(
            task, coding, full, *weights_to_write(checkpoint, roles, task, full=full, coding=coding, io=io)
        )


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """All that decides the weights of an export, as plain values that can be sent.

    Attributes:
        base: Reference of the base.
        adapters: References with weights, of adapters whose kind decides about their role.
        merge: The same of adapters to merge.
        swap: The same of adapters for slots.
        prefix: The same of soft prompts.
        asked: The options.
    """

    base: str
    adapters: tuple[tuple[str, float], ...] = ()
    merge: tuple[tuple[str, float], ...] = ()
    swap: tuple[tuple[str, float], ...] = ()
    prefix: tuple[tuple[str, float], ...] = ()
    asked: WeightsAsked = field(default_factory=WeightsAsked)

    def work(self) -> PlannedWork:
        """The plan of the weights; opens the inputs.

        Raises:
            FitError: graphs refer to the base's weights as they are.
            SurgeryError: see `surgery.export_onnx`.
        """
        from surgery.engine.shares.planned import PlannedWork

        checkpoint = as_checkpoint(self.base)
        merged = self.asked.planned(checkpoint, sort_adapters(self.adapters, self.merge, self.swap, self.prefix)).merged
        if merged is None:
            raise FitError("graphs refer to its weights as they are, and nothing is computed", file=checkpoint.path)
        return PlannedWork(merged.plan)


def in_shares(
    engine: EngineLike, base: object, adapters: tuple[object, object, object, object], asked: WeightsAsked, run: Run
) -> InShares | None:
    """The engine of an export whose weights a cluster computes; None for this process.

    Args:
        engine: What was asked for.
        base: As `surgery.export_onnx` takes it.
        adapters: The same, of `adapters`, `merge`, `swap` and `prefix`.
        asked: The options.
        run: How.

    Raises:
        UsageError: an input that was opened, and so cannot be sent.
    """
    from surgery.engine.shares.choice import cluster_of
    from surgery.engine.shares.planned import InShares
    from surgery.engine.shares.work import portable, portable_adapters

    cluster = cluster_of(engine)
    if cluster is None:
        return None
    options = asked.options
    if options.calibration is not None:
        options = replace(options, calibration=portable(options.calibration, "calibration"))
    groups = zip(("adapters", "merge", "swap", "prefix"), adapters, strict=True)
    references = {name: portable_adapters(group, name) for name, group in groups}
    request = ExportRequest(portable(base, "base"), **references, asked=replace(asked, options=options))
    return InShares(cluster, request, run)
