# SPDX-License-Identifier: Apache-2.0
"""The layout of an output: the base's own shards, order and header wherever nothing changed size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from surgery.engine.packing import PAGE, packing_groups, packing_order
from surgery.engine.plan import Account, Compute, Copy, PlannedFile, PlannedTensor, TensorOutcome, is_coded
from surgery.engine.quantised.output import DEQUANTISED, QuantisedOutput
from surgery.engine.quantised.shard_metadata import true_of
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.straight import straightened
from surgery_formats.containers.base import Shard, WritableContainer
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.sharded import index_bytes, index_name, output_name, shard_names
from surgery_formats.containers.weight_files import output_container
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.storage.base import Encoding, Housed, Storage, is_contiguous, is_housed
from surgery_formats.storage.plain import Elements, Plain
from surgery_formats.storage.quantised import MARKER, is_quantised
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["WeightLayout", "lay_out", "planned_file"]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """A component's weight files, its index, and its inputs that have no output."""

    files: tuple[PlannedFile, ...]
    index_name: str
    index: bytes
    accounts: tuple[Account, ...]


def lay_out(
    component: Component,
    edits: Mapping[str, Edit],
    dtype: DType | None = None,
    shard_size: int | None = None,
    untied: Collection[str] = (),
    packed: bool = False,
    quantised: QuantisedOutput = DEQUANTISED,
) -> WeightLayout:
    """Plan the weight files of one component.

    Args:
        component: The base's.
        edits: By name of the weight.
        dtype: Store every weight of numbers in elements of this type; None keeps each as it is stored.
        shard_size: Most bytes per file; None keeps the base's shards.
        untied: Components whose head and embedding part.
        packed: Lay out for graphs: see `surgery.engine.packing`.
        quantised: What becomes of weights stored as codes.

    Raises:
        FitError: `packed`, and the architecture has no recipe that says what belongs together; the container has no place
            for a weight, or nothing writes its type; `shard_size` for files that cannot be cut.
    """
    if dtype is not None:
        component.check_read()  # scales of another type would not fit their codes
    folder = f"{component.name}/" if component.name else ""
    container = SAFETENSORS if packed else output_container(component.shards[0].container)
    suffix = container.suffixes[0]
    accounts: list[Account] = []
    groups: list[tuple[str, Shard | None, list[PlannedTensor]]] = []
    planner = _WeightPlanner(component, edits, dtype, quantised, container.name)
    if shard_size is not None and component.self_contained:
        raise FitError(
            "the files of its base are kept",
            file=component.shards[0].path,
            hint=f"leave out `shard_size=`: other tools split {container.title}",
        )
    for shard in component.shards:
        planned: list[PlannedTensor] = []
        for tensor in shard.tensors:
            weight = component.owners[tensor.name]
            alias = component.aliases.get(weight.name)
            stays_tied = alias and weight.name not in edits and component.name not in untied
            rewritten = shard.container != container.name
            if alias and stays_tied and rewritten and _is_tie(weight.name, alias, component):
                accounts.append(Account(tensor, "alias", f"tied to {alias}", component.name))
                continue
            if (edit := edits.get(weight.name)) is not None and edit.replaced:
                accounts.append(Account(tensor, "superseded", "replaced by the adapter's", component.name))
            outputs = planner.outputs(tensor, weight)
            if not any(output.name == tensor.name for output in outputs):
                if tensor.name.endswith(MARKER):
                    planned.append(planner.marker(tensor))
                    continue
                accounts.append(Account(tensor, "source", f"its values are in {weight.name}", component.name))
            planned += outputs
        groups.append((output_name(shard.path.name, suffix, {output.dtype for output in planned}), shard, planned))
    for edit in edits.values():
        if edit.name not in component.parameters:
            groups[-1][2].extend(planner.weight(edit.name, edit.source))
    if shard_size is not None:
        parts = _resharded([tensor for _, _, planned in groups for tensor in planned], shard_size)
        names = shard_names(groups[0][0], suffix, len(parts))
        groups = [(name, None, planned) for name, planned in zip(names, parts, strict=True)]
    if packed:
        joint = packing_groups(component)
        groups = [(name, None, packing_order(planned, joint)) for name, _, planned in groups]
    if any(weight.elements is None for weight in component.owners.values()):
        coded = {tensor.weight for _, _, planned in groups for tensor in planned if is_coded(tensor.step)}
        accounts += (account for _, _, planned in groups for account in _taken_out(planned, coded))
        groups = [(name, shard and true_of(shard, coded), planned) for name, shard, planned in groups]
    alignment = PAGE if packed else 1
    files = tuple(
        planned_file(f"{folder}{name}", planned, shard, alignment, container)
        for name, shard, planned in groups
        if planned or len(groups) == 1
    )
    return WeightLayout(files, *_index(component, files, folder, suffix), tuple(accounts))


def _taken_out(planned: list[PlannedTensor], coded: Collection[str]) -> list[Account]:
    """Take out the markers behind which no weight is stored as codes any more."""
    gone = [
        tensor
        for tensor in planned
        if tensor.name.endswith(MARKER) and not any(name.startswith(tensor.name.removesuffix(MARKER)) for name in coded)
    ]
    planned[:] = [tensor for tensor in planned if tensor not in gone] if gone else planned
    copies = ((tensor.step, tensor.component) for tensor in gone)
    why = "no weight has a scale"
    return [Account(step.source, "source", why, component) for step, component in copies if isinstance(step, Copy)]


def _is_tie(name: str, source: str, component: Component) -> bool:
    known = {component.head, component.embedding} | {name for tie in component.family.ties for name in tie}
    return component.tied and name in known and source in known


class _WeightPlanner:
    """Plans the weights of one component, each once, however many stored tensors it has."""

    def __init__(
        self,
        component: Component,
        edits: Mapping[str, Edit],
        dtype: DType | None,
        quantised: QuantisedOutput,
        container: str,
    ) -> None:
        self._component = component
        self._container = container
        self._edits = edits
        self._dtype = dtype
        self._quantised = quantised
        self._planned: dict[str, dict[str, PlannedTensor]] = {}

    def outputs(self, tensor: StoredTensor, weight: Storage) -> list[PlannedTensor]:
        """The tensors that take the place of `tensor` in its file.

        That is the tensor of its name; the first stored tensor of a weight also brings all new names.
        """
        if len(weight.sources) == 1:
            return list(self.weight(weight.name, weight))
        planned = self._planned.get(weight.name)
        here: list[PlannedTensor] = []
        if planned is None:
            planned = self._planned[weight.name] = {output.name: output for output in self.weight(weight.name, weight)}
            stored = {source.name for source in weight.sources}
            here = [output for name, output in planned.items() if name not in stored]
        return [*here, planned[tensor.name]] if tensor.name in planned else here

    def marker(self, tensor: StoredTensor) -> PlannedTensor:
        """The tensor as it is, though the weight that it was counted to needs it no more: others may."""
        name, step = tensor.name, Copy(tensor, Plain.of(tensor))
        return PlannedTensor(
            name, self._component.name, name, tensor.dtype, tensor.shape, step, "copied", 0, tensor.nbytes
        )

    def weight(self, name: str, base: Storage) -> tuple[PlannedTensor, ...]:
        """The output tensors of one weight, without their offsets."""
        edit = self._edits.get(name)
        at_home = is_housed(base) and base.container == self._container
        kept = self._type(base) is None or not base.is_float
        if edit is None and is_contiguous(base) and kept and (at_home or not is_housed(base)):
            return self._copies(base)
        source = base if edit is None else edit.source
        target = self._encoding(base, source, edit)
        operations = edit.operations if edit else ()
        if at_home and source.transposed != base.transposed:
            source, operations = straightened(source, operations)
        elif (
            not at_home and source.transposed and target is not source and target is not base
        ):  # elements lie as the model has them
            source, operations = straightened(source, operations)
            target = Elements(source.sizes, source.shape, target.dtype)
        elif source is not base and target is base and source.transposed != base.transposed:
            source, operations = straightened(source, operations)
        trained = edit is not None and edit.replaced is not None  # never copied unseen: its values must be finite
        parts = target.parts(name)
        steps: Sequence[Copy | Compute]
        if target is source and source.sources and is_contiguous(source) and not (operations or trained):
            steps = [Copy(stored, source) for stored in source.sources]
        else:
            requantise = self._quantised.requantise(name) if target is base and is_quantised(base) else None
            steps = [Compute(source, operations, target, requantise)] * len(parts)
        outcome: TensorOutcome = "copied"
        if edit is not None:
            outcome = "updated" if operations else "replaced"
            outcome = "added" if edit.added else outcome
        elif target is not source:
            outcome = "cast"
        component, why = self._component.name, edit.why if edit else ""
        return tuple(
            PlannedTensor(part.name, component, name, part.dtype, part.shape, step, outcome, 0, part.nbytes, why, i)
            for i, (part, step) in enumerate(zip(parts, steps, strict=True))
        )

    def _copies(self, weight: Storage) -> tuple[PlannedTensor, ...]:
        """The stored tensors of a weight as they are, and at the offsets that they have."""
        component, name = self._component.name, weight.name
        planned = []
        for i, stored in enumerate(weight.sources):
            step, offset, nbytes = Copy(stored, weight), stored.offset, stored.nbytes
            planned.append(
                PlannedTensor(
                    stored.name, component, name, stored.dtype, stored.shape, step, "copied", offset, nbytes, "", i
                )
            )
        return tuple(planned)

    def _type(self, base: Storage) -> DType | None:
        """The element type that the output shall have, or None for the base's storage."""
        if base.elements is not None:
            return self._dtype
        touched = base.name in self._edits
        if self._quantised.keeps(touched=touched, dtype=self._dtype):
            return None
        return self._dtype or self._component.plain_dtype

    def _encoding(self, base: Storage, source: Storage, edit: Edit | None) -> Encoding:
        """The storage of the base's weight, also for what replaces it.

        A weight that the base lacks is stored like its embedding (or first matrix).
        """
        like = [base]  # another container's values are no reason to be stored as there
        if edit is not None and edit.added and self._component.self_contained and self._component.embedding:
            like.append(self._component.parameters[self._component.embedding].storage)
        housed = next((weight for weight in like if is_housed(weight)), None)
        if housed is not None:
            return self._in_house(housed, source, edit)
        if not source.is_float:
            return source
        if (dtype := self._type(base)) is not None:
            return _elements(source, dtype)
        if edit is not None and edit.added:
            return _elements(source, self._component.dtype) if source.elements is not None else source
        if base is source or not base.is_float:
            return source
        return _elements(source, base.dtype) if base.elements is not None else base

    def _in_house(self, housed: Housed, source: Storage, edit: Edit | None) -> Encoding:
        """The encoding of a weight of a container with types of its own, for that container or for another."""
        if housed.container != self._container:
            plain = self._component.plain_dtype if housed.coded else housed.dtype
            return Elements(source.sizes, source.shape, self._dtype or plain)
        target: Encoding = housed
        if housed.coded and not self._quantised.keeps(touched=edit is not None, dtype=self._dtype):
            target = housed.in_elements(self._dtype or self._component.plain_dtype)
        elif not housed.coded and self._dtype is not None:
            target = housed.in_elements(self._dtype)
        if edit is not None:
            housed.check_place(edit.name, source.sizes)
            if target is housed and (edit.operations or edit.replaced):
                housed.check_written()
        return target


def _elements(source: Storage, dtype: DType) -> Encoding:
    """`source` as one tensor of elements of `dtype`: itself, if it is that."""
    if source.elements is not None and source.dtype is dtype:
        return source
    return Elements(source.sizes, source.shape, dtype)


def planned_file(
    name: str,
    planned: Sequence[PlannedTensor],
    shard: Shard | None = None,
    alignment: int = 1,
    container: WritableContainer = SAFETENSORS,
) -> PlannedFile:
    """A weight file of these tensors, each at its offset.

    Args:
        name: Relative to the output folder.
        planned: In order.
        shard: The base's file, of which the container keeps what still holds.
        alignment: The data begins at a multiple of it.
        container: Of the file.

    Raises:
        FitError: the container cannot hold a tensor.
    """
    layout = container.lay_out([(tensor.name, tensor.dtype, tensor.shape) for tensor in planned], shard, alignment)
    placed = tuple([_placed(tensor, *layout.ranges[tensor.name]) for tensor in planned])
    return PlannedFile(name, layout.header, layout.nbytes, placed, layout.padding)


def _placed(tensor: PlannedTensor, offset: int, nbytes: int) -> PlannedTensor:
    if tensor.offset == offset and tensor.nbytes == nbytes:
        return tensor  # where the base has it, as most tensors of a merge
    # Not `dataclasses.replace`: on a model of 50,000 tensors it takes as long as the rest of the plan.
    return PlannedTensor(
        tensor.name,
        tensor.component,
        tensor.weight,
        tensor.dtype,
        tensor.shape,
        tensor.step,
        tensor.outcome,
        offset,
        nbytes,
        tensor.why,
        tensor.part,
    )


def _resharded(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Tensors in order, a new file whenever the next one would pass `limit` bytes."""
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _index(component: Component, files: Sequence[PlannedFile], folder: str, suffix: str) -> tuple[str, bytes]:
    """Name and content of the index of several shards; of one, only where the base has one too."""
    if component.self_contained or (len(files) == 1 and (component.index is None or len(component.shards) > 1)):
        return "", b""
    tensors = [tensor for file in files for tensor in file.tensors]
    totals = {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(tensor.nbytes * 8 // tensor.dtype.bits for tensor in tensors),
    }
    weight_map = {tensor.name: file.name.removeprefix(folder) for file in files for tensor in file.tensors}
    name = index_name(files[0].name.removeprefix(folder), suffix, component.index_name)
    return f"{folder}{name}", index_bytes(weight_map, totals, component.index)
