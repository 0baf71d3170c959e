# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge into a graph: its files as they are, byte for byte, but for the tensors that change.

A tensor keeps its place, type and layout, so the graph itself stays as it is, offsets included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.ledger import Measurement
from surgery.engine.merge.merge_plan import merge_facts
from surgery.engine.plan import Compute, Copy, Plan, PlannedFile, PlannedTensor, SideFile, TensorOutcome
from surgery.onnx.edit.beside import files_beside
from surgery.onnx.edit.opening import check_places
from surgery.onnx.edit.ranges import warning_of_ranges
from surgery.onnx.graph.contract import contract_of
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.merge.changes import TensorChange
from surgery.onnx.merge.coded_weight import CodedWeight
from surgery_formats.binding.bind import Binding
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import FileRecord, OutputFolder
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import File, open_file, stays_inside
from surgery_formats.models.identity import fingerprint
from surgery_formats.storage.plain import Elements, Plain
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["GraphEngine", "GraphPlan", "plan_graph"]


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """A plan, and what its steps are of.

    Attributes:
        plan: For the engine.
        changes: By identity of the step.
    """

    plan: Plan
    changes: Mapping[int, TensorChange]

    def still_good(self, path: Path, record: FileRecord) -> bool:
        """Whether a file that an interrupted run finished still holds the computed tensors it finished with."""
        measured = record.record.get("tensors")
        planned = next((file for file in self.plan.files if file.name == record.name), None)
        if planned is None or not isinstance(measured, Mapping):
            return False
        import xxhash

        file = open_file(path)
        for tensor in planned.tensors:
            if isinstance(tensor.step, Compute):
                hasher = xxhash.xxh3_128()
                for block in file.blocks(tensor.offset, tensor.nbytes):
                    hasher.update(block)
                if hasher.hexdigest() != measured.get(tensor.label, {}).get("xxh3"):
                    return False
        return True


@dataclass(frozen=True, eq=False)
class GraphEngine:
    """Computes tensors of a graph, in threads of this process.

    Attributes:
        graph: What to compute.
    """

    graph: GraphPlan

    @contextlib.contextmanager
    def computing(self, plan: Plan, output: Path, into: OutputFolder | None = None) -> Iterator[ComputeWeight]:
        """See `surgery.engine.execute.Engine`."""
        changes = self.graph.changes

        def work(
            label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str
        ) -> tuple[Measurement, ...]:
            from surgery.onnx.merge.rewrite import rewrite

            return rewrite(label, changes[id(step)], write, stop, device)

        yield work


def plan_graph(
    graph: OnnxGraph, changes: Sequence[TensorChange], binding: Binding, left_out: Sequence[str] = ()
) -> GraphPlan:
    """The plan; `left_out` names the parameters of the adapters that are not merged.

    Raises:
        FitError: two tensors share bytes, and one of them alone changes; or files lie where no output has a place.
    """
    check_places(graph)
    steps: dict[int, TensorChange] = {}
    computed: dict[str, PlannedTensor] = {}
    for change in changes:
        step = _step(change)
        steps[id(step)] = change
        outcome: TensorOutcome = (
            "replaced" if all(one.edit.replaced and not one.edit.operations for one in change.changes) else "updated"
        )
        weight = change.name
        for part, tensor in enumerate(_tensors(change)):
            if tensor.name in computed:
                raise FitError("is part of two weights that change", tensor=tensor.name)
            computed[tensor.name] = PlannedTensor(
                tensor.name, "", weight, tensor.dtype, tensor.shape, step, outcome, tensor.offset, tensor.nbytes, _why(change), part
            )  # fmt: skip
    folder = graph.path.parent
    files = [_file(file, _name(file, folder), graph, computed) for file in graph.files]
    written = {file.name for file in files}
    side = [file for file in files_beside(folder) if file.name not in written] if files else []
    side += _companion(graph, {file.name for file in files})
    facts = merge_facts(binding)
    if left_out:
        facts["left_out"] = list(left_out)
    facts["graph"] = {file.name: fingerprint(opened) for file, opened in zip(files, graph.files, strict=True)}
    checkpoint = binding.checkpoint
    inputs = [*graph.files]
    inputs += [shard.file for component in checkpoint.components.values() for shard in component.shards]
    inputs += list({file.identity: file for adapter, _ in binding.adapters for file in adapter.files}.values())
    facts["carried_files"] = {one.name: fingerprint(open_file(one.source)) for one in side if one.source is not None}
    plan = Plan(
        verb="merge",
        files=tuple(files),
        side_files=tuple(side),
        accounts=(),
        ignored=binding.ignored,
        inputs=tuple(inputs),
        roots=(graph.path, *(adapter.path for adapter, _ in binding.adapters), checkpoint.path),
        id=hashlib.sha256(json.dumps([__version__, "merge into a graph", facts], sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=(*binding.warnings, *warning_of_ranges(graph.proto)),
    )
    return GraphPlan(plan, steps)


def _step(change: TensorChange) -> Compute:
    operations = tuple(operation for one in change.changes for operation in one.edit.operations)
    if isinstance(change.place, Matrix):
        assert change.place.tensor is not None
        tensor = change.place.tensor
        shape = (tensor.numel // change.place.cols, change.place.cols)
        return Compute(Plain(tensor, shape), operations, Elements(tensor.shape, shape, tensor.dtype))
    weight = CodedWeight(change.place)
    return Compute(weight, operations, weight)


def _tensors(change: TensorChange) -> tuple[StoredTensor, ...]:
    if isinstance(change.place, Matrix):
        assert change.place.tensor is not None
        return (change.place.tensor,)
    return CodedWeight(change.place).sources


def _why(change: TensorChange) -> str:
    return "; ".join(f"{one.piece.weight.label} {one.piece.how}" for one in change.changes)


def _name(file: File, folder: Path) -> str:
    """Where a file lies beside the graph."""
    path = file.path
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _file(file: File, name: str, graph: OnnxGraph, computed: Mapping[str, PlannedTensor]) -> PlannedFile:
    """All bytes of a file: tensors, and what lies between them."""
    stored = [tensor for tensor in graph.tensors.values() if tensor.file is file and tensor.nbytes]
    planned: list[PlannedTensor] = []
    at = 0
    for tensor in sorted(stored, key=lambda one: (one.offset, -one.nbytes, one.name not in computed)):
        if tensor.offset < at:
            covered = next(one for one in planned if one.offset <= tensor.offset < one.offset + one.nbytes)
            changes = tensor.name in computed or isinstance(covered.step, Compute)
            if changes:
                raise FitError(
                    f"shares its bytes with {show(covered.name)}, and a merge changes one of them",
                    file=graph.path,
                    tensor=tensor.name,
                )
            continue
        if tensor.offset > at:
            planned.append(_between(file, name, at, tensor.offset))
        planned.append(computed.get(tensor.name) or _copied(tensor))
        at = tensor.offset + tensor.nbytes
    if at < file.size:
        planned.append(_between(file, name, at, file.size))
    return PlannedFile(name, b"", file.size, tuple(planned))


def _copied(tensor: StoredTensor, outcome: TensorOutcome = "copied") -> PlannedTensor:
    step = Copy(tensor, Plain.of(tensor))
    return PlannedTensor(
        tensor.name, "", tensor.name, tensor.dtype, tensor.shape, step, outcome, tensor.offset, tensor.nbytes
    )


def _between(file: File, name: str, start: int, stop: int) -> PlannedTensor:
    """Bytes of a file that are no tensor's: the graph's fields, padding."""
    filling = StoredTensor(f"{name}[{start}:{stop}]", DType.U8, (stop - start,), file, start, stop - start)
    return _copied(filling, "between")


def _companion(graph: OnnxGraph, files: Collection[str]) -> list[SideFile]:
    """The second graph of an export, for several rows on top of a past, where it has its weights in the same files."""
    from surgery_formats.containers.onnx import open_graph

    contract = contract_of(graph.proto, graph.path)
    if contract is None or not contract.prefill or not is_safe_name(contract.prefill):
        return []
    path = graph.path.parent / contract.prefill
    if not path.is_file() or not stays_inside(path):
        return []
    weights = {file.path.relative_to(path.parent).as_posix() for file in open_graph(path).external}
    return [SideFile(contract.prefill, path)] if weights <= set(files) else []


def prove_structure(path: Path, graph: OnnxGraph) -> None:
    """The written graph has the tensors of the one it was made of, at the same places.

    Raises:
        ProofError: it has others.
    """
    from surgery_formats.containers.onnx import open_graph

    written = open_graph(path)
    places: list[Any] = [
        [(name, tensor.dtype, tensor.shape, tensor.offset) for name, tensor in one.tensors.items()]
        for one in (graph, written)
    ]
    if places[0] != places[1]:
        raise ProofError("the written graph has other tensors", file=path)
