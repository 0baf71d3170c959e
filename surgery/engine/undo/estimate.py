# SPDX-License-Identifier: Apache-2.0
"""The plan of an unmerge without what the merge kept: the merged weights with the updates taken back, rounded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from surgery._version import __version__
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.layout import lay_out
from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, Plan, PlannedFile, SideFile, is_coded
from surgery.engine.quantised.output import QuantisedOutput
from surgery.engine.undo.belongs import Evidence, check_belongs, dequantised_weights, grown_weights
from surgery.engine.undo.inverse import estimates, inverted, why_not
from surgery.engine.undo.record import label_of, undone_height, unmerge_facts
from surgery.engine.undo.residue import LINE, nearest_bits
from surgery_formats.arrays import Array, empty
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["Estimation", "estimation"]


@dataclass(frozen=True)
class Estimation:
    """A planned estimate; as an engine it computes the weights of its plan.

    Attributes:
        plan: What to write.
        evidence: How it is known that the adapters are in there.
        dequantised: By label: the format of weights that the base had as codes.
        exact: By weight of elements, once it is computed: the share of values that are the base's bit for bit (of a
            dequantised one: what its codes stand for, rounded), as expected from how many bits each lost. Of codes
            nothing tells: a step of their grid may be many times the update, and feedback moves them further than half
            of one.
    """

    plan: Plan
    evidence: Evidence
    dequantised: Mapping[str, str] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)

    def complete(self) -> None:
        """Find out about the weights that an interrupted run had finished, too."""
        for tensor in self.plan.computed():
            if tensor.weight_label in self.exact or is_coded(tensor.step):
                continue
            if isinstance(tensor.step, Compute):
                self.compute(tensor.weight_label, tensor.step, lambda *rest: None, lambda: False, "cpu")

    def computing(
        self, plan: Plan, output: Path, into: OutputFolder | None = None
    ) -> AbstractContextManager[ComputeWeight]:
        """See `surgery.engine.execute.Engine`."""
        return contextlib.nullcontext(self.compute)

    def compute(
        self, label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str
    ) -> tuple[Measurement, ...]:
        """Hand the bytes of one weight to `write`, as `surgery.engine.arithmetic.compute` does."""
        after, height = step.source, undone_height(step.source, step.operations)
        chain = inverted(step.operations, after, height, [None] * len(step.operations))
        digests = [xxhash.xxh3_128() for _ in step.target.parts(label)]
        rounded = empty((min(height, after.shape[0]), after.shape[1]), step.target.dtype)
        expected, between = 0.0, label in self.dequantised and after.dtype.bits < 32
        for start, end, values, estimate, _ in estimates(after, chain, height):
            if stop():
                break
            block = rounded[: end - start]
            if after.elements is not None:
                bits = nearest_bits(estimate.reshape(-1), after.dtype)
                expected += _expected(bits, values, after.dtype, between=between)
                chunks = [(0, start * after.shape[1] * after.dtype.bits // 8, as_bytes(bits))]
            else:
                chunks = [(chunk.part, chunk.offset, chunk.data) for chunk in step.target.put(start, estimate, block)]
            for part, at, data in chunks:
                digests[part].update(data)
                write(part, at, data)
        if after.elements is not None:
            self.exact[label] = expected / max(after.shape[0] * after.shape[1], 1)
        return tuple(Measurement(digest.hexdigest(), True) for digest in digests)


def _expected(bits: Array, merged: Array, dtype: DType, *, between: bool) -> float:
    """How many of the values are likely to be exact: one of ``2^k`` where k bits were lost.

    Values of codes lie `between` those of the type, uniformly. The merge's error, of up to m/2 units for an m of ``2^k``,
    then carries a quarter of them over the middle to a neighbour for an m of 1, and m/4 of them for one below.
    """
    import numpy

    line = LINE(dtype)
    lost = (line.unit(merged.reshape(-1).view(line.unsigned)) - line.unit(bits)).astype(numpy.float32)
    likely = numpy.exp2(-numpy.maximum(lost, 0))
    if between:
        likely = numpy.where(lost > 0, likely, 1 - numpy.exp2(numpy.minimum(lost, 0)) / 4)
    return float(likely.sum(dtype=numpy.float64))


def estimation(
    binding: Binding, adapters: Sequence[tuple[Adapter, float]], recorded: Mapping[str, Any] | None
) -> Estimation:
    """Plan to write the best estimate of the base.

    Args:
        binding: Of the adapters to the merged model.
        adapters: As they were merged.
        recorded: What the merge's manifest says of its inputs, with these adapters; None without one.

    Raises:
        FitError: the adapters are not in there, or an update has no inverse.
    """
    merged, grown = binding.checkpoint, grown_weights(recorded)
    for edit in binding.edits.values():
        operations = (*((edit.replaced,) if edit.replaced else ()), *edit.operations)
        reason = why_not(operations)
        if label_of(edit.component, edit.name) in grown:
            reason = "it grew: the base had fewer columns"
        if reason:
            raise FitError(
                f"cannot be computed back: {reason}",
                file=merged.path,
                tensor=edit.name,
                hint="a merge keeps what is needed if it is asked to: `reversible=True`",
            )
    evidence = Evidence("manifest") if recorded is not None else check_belongs(binding)
    files: list[PlannedFile] = []
    side_files: list[SideFile] = [SideFile(name, source=path) for name, path in merged.side_files]
    for name, component in merged.components.items():
        edits = {edit.name: edit for (owner, _), edit in binding.edits.items() if owner == name}
        layout = lay_out(component, edits, quantised=QuantisedOutput("requantize", rounding="nearest"))
        files += layout.files
        side_files += [SideFile(layout.index_name, data=layout.index)] if layout.index_name else []
        if component.config and (config := component.folder / "config.json").is_file():
            side_files.append(SideFile(f"{name}/config.json" if name else "config.json", source=config))
    inputs = [shard.file for component in merged.components.values() for shard in component.shards]
    inputs += list({file.identity: file for adapter, _ in adapters for file in adapter.files}.values())
    about = unmerge_facts(adapters, merged)
    plan = Plan(
        verb="unmerge",
        files=tuple(files),
        side_files=tuple({side.name: side for side in side_files}.values()),
        accounts=(),
        ignored=binding.ignored,
        inputs=tuple(inputs),
        roots=(merged.path, *(adapter.path for adapter, _ in adapters)),
        id=hashlib.sha256(json.dumps([__version__, "unmerge", about], sort_keys=True).encode()).hexdigest(),
        facts=about,
    )
    return Estimation(plan, evidence, dequantised_weights(recorded))
