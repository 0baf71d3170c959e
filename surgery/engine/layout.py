# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of an output lies: the base's own shards, order and header wherever nothing changed size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from surgery.engine.packing import PAGE, packing_groups, packing_order
from surgery.engine.plan import Account, Class, Compute, Copy, PlannedFile, PlannedTensor
from surgery_formats.binding.edits import Edit
from surgery_formats.containers.base import Shard, WritableContainer
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.sharded import index_bytes, index_name, output_name, shard_names
from surgery_formats.containers.weight_files import output_container
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Component
from surgery_formats.tensors.tensor import StoredTensor, Tensor

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
) -> WeightLayout:
    """Plan the weight files of one component.

    Args:
        component: The base's.
        edits: By output tensor name.
        dtype: Stored type of every floating-point tensor; None keeps each tensor's own.
        shard_size: Most bytes per file; None keeps the base's shards.
        untied: Components whose head and embedding part.
        packed: Lay out for graphs: see `surgery.engine.packing`.

    Raises:
        FitError: `packed`, and the architecture has no recipe that says what belongs together.
    """
    folder = f"{component.name}/" if component.name else ""
    container = SAFETENSORS if packed else output_container(component.shards[0].container)
    suffix = container.suffixes[0]
    accounts: list[Account] = []
    groups: list[tuple[str, Shard | None, list[PlannedTensor]]] = []
    for shard in component.shards:
        planned = []
        for tensor in shard.tensors:
            alias = component.aliases.get(tensor.name)
            stays_tied = alias and tensor.name not in edits and component.name not in untied
            rewritten = shard.container != container.name
            if alias and stays_tied and rewritten and _is_tie(tensor.name, alias, component):
                accounts.append(Account(tensor, "alias", f"tied to {alias}"))
                continue
            edit = edits.get(tensor.name)
            if edit is not None and edit.replaced:
                accounts.append(Account(tensor, "superseded", "replaced by the adapter's"))
            planned.append(_tensor(component, tensor, edit, dtype))
        groups.append((output_name(shard.path.name, suffix), shard, planned))
    added = [
        _tensor(component, edit.source, edit, dtype) for edit in edits.values() if edit.name not in component.tensors
    ]
    groups[-1][2].extend(added)
    if shard_size is not None:
        parts = _resharded([tensor for _, _, planned in groups for tensor in planned], shard_size)
        names = shard_names(groups[0][0], suffix, len(parts))
        groups = [(name, None, planned) for name, planned in zip(names, parts, strict=True)]
    if packed:
        joint = packing_groups(component)
        groups = [(name, None, packing_order(planned, joint)) for name, _, planned in groups]
    alignment = PAGE if packed else 1
    files = tuple(
        planned_file(f"{folder}{name}", planned, shard, alignment, container)
        for name, shard, planned in groups
        if planned or len(groups) == 1
    )
    return WeightLayout(files, *_index(component, files, folder, suffix), tuple(accounts))


def _is_tie(name: str, source: str, component: Component) -> bool:
    known = {component.head, component.embedding} | {name for tie in component.family.ties for name in tie}
    return component.tied and name in known and source in known


def _tensor(component: Component, stored: Tensor, edit: Edit | None, dtype: DType | None) -> PlannedTensor:
    """An output tensor without its offset."""
    source = stored if edit is None else edit.source
    keep = _kept_dtype(stored, edit, _model_dtype(component))
    wanted = dtype if dtype is not None and keep.is_float else keep
    name = stored.name if edit is None else edit.name
    size = source.numel * wanted.bits // 8
    operations = edit.operations if edit else ()
    trained = edit is not None and edit.replaced is not None  # never copied unseen: its values must be finite
    contiguous = isinstance(source, StoredTensor) and source.strides is None
    step: Copy | Compute
    if isinstance(source, StoredTensor) and contiguous and not (operations or trained) and wanted is source.dtype:
        step = Copy(source)
    else:
        step = Compute(source, operations, edit.stacked if edit else False)
    kind: Class = "copied"
    if edit is not None:
        kind = "updated" if operations else "replaced"
        kind = "added" if edit.added else kind
    elif wanted is not source.dtype:
        kind = "cast"
    return PlannedTensor(name, component.name, wanted, source.shape, step, kind, 0, size, edit.why if edit else "")


def _kept_dtype(stored: Tensor, edit: Edit | None, model: DType) -> DType:
    """The base's own type, also for what replaces it; what the base lacks gets the type of its embedding (or first matrix)."""
    if edit is None or not edit.source.dtype.is_float:
        return (edit.source if edit else stored).dtype
    if edit.added:
        return model
    return stored.dtype if stored.dtype.is_float else edit.source.dtype


def _model_dtype(component: Component) -> DType:
    if component.embedding:
        return component.tensors[component.embedding].dtype
    return next((tensor.dtype for tensor in component.tensors.values() if tensor.dtype.is_float), DType.F32)


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
    placed = tuple(_placed(tensor, *layout.ranges[tensor.name]) for tensor in planned)
    return PlannedFile(name, layout.header, layout.nbytes, placed)


def _placed(tensor: PlannedTensor, offset: int, nbytes: int) -> PlannedTensor:
    return PlannedTensor(
        tensor.name, tensor.component, tensor.dtype, tensor.shape, tensor.step, tensor.kind, offset, nbytes, tensor.why
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
    if len(files) == 1 and (component.index is None or len(component.shards) > 1):
        return "", b""
    tensors = [tensor for file in files for tensor in file.tensors]
    totals = {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(tensor.nbytes * 8 // tensor.dtype.bits for tensor in tensors),
    }
    weight_map = {tensor.name: file.name.removeprefix(folder) for file in files for tensor in file.tensors}
    name = index_name(files[0].name.removeprefix(folder), suffix, component.index_name)
    return f"{folder}{name}", index_bytes(weight_map, totals, component.index)
