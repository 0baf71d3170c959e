# SPDX-License-Identifier: Apache-2.0
"""Resolve the updates of adapters to the weights of a base.

The plan, the ledger, the proof and the report are all computed from the resulting `Binding`. Updates are grouped by the
weight they change, so that ties and overlaps are handled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery_formats.binding.bound_operations import BoundOperation, is_carried, operations_of
from surgery_formats.binding.containers import housed
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.fit_checks import (
    check_family,
    check_mergeable,
    check_missing,
    check_overlap,
    disagreements,
)
from surgery_formats.binding.growth import widest
from surgery_formats.binding.locating import located
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.parts import in_its_part
from surgery_formats.binding.sizes import sized
from surgery_formats.binding.tied_edits import same_values, settle_tie
from surgery_formats.binding.together import side_by_side
from surgery_formats.canonical.adapter import Adapter, Ignored
from surgery_formats.errors import FitError
from surgery_formats.models.base_name import base_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.base import is_stacked
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.text import listing, local_name
from surgery_formats.updates import is_replacing

__all__ = ["Binding", "bind", "other_base", "warn_of_other_base"]


@dataclass(frozen=True)
class Binding:
    """The updates of adapters resolved to the parameters of a base.

    Attributes:
        checkpoint: The base.
        adapters: The adapters with their weights.
        edits: Edits by ``(component, name of the weight)``.
        untied: Components whose tied head and embedding become two tensors.
        ignored: Adapter tensors that have no effect and are meant to have none.
        settled: Adapter tensors for one side of a tie that repeat the update applied for the other side.
        warnings: Warnings for the user.
    """

    checkpoint: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    edits: Mapping[tuple[str, str], Edit]
    untied: frozenset[str] = frozenset()
    ignored: tuple[Ignored, ...] = ()
    settled: tuple[Tensor, ...] = ()
    warnings: tuple[str, ...] = ()


def bind(adapters: Sequence[tuple[Adapter, float]], checkpoint: Checkpoint, *, new_biases: bool = False) -> Binding:
    """Resolve every update of every adapter against the base.

    Args:
        adapters: Each with its weight, applied in this order.
        checkpoint: The base.
        new_biases: Whether a layer without a bias gets one where an adapter adds to it. A graph can hold such a bias,
            a checkpoint of the family cannot.

    Raises:
        FitError: a parameter is missing from the base, a shape does not fit, a tensor of the adapter is not used, an
            adapter changes no weights, or two adapters replace one parameter.
    """
    bound: dict[tuple[str, str], list[BoundOperation]] = {}
    notes: list[str] = []
    for number, (given, weight) in enumerate(adapters):
        check_mergeable(given, checkpoint)
        adapter, read_as = housed(in_its_part(given, checkpoint), checkpoint)
        notes += read_as
        chains, missing = located(sized(adapter, checkpoint), checkpoint, new_biases=new_biases)
        for chain in chains:
            for operation in operations_of(chain, adapter, number, weight):
                bound.setdefault(operation.key, []).append(operation)
        check_missing(missing, adapter, checkpoint)
    edits = {key: _edit(key, operations, checkpoint.components[key[0]], adapters) for key, operations in bound.items()}
    settled, untied = _settle_ties(edits, adapters, checkpoint)
    bound_tensors = {tensor for some in bound.values() for one in some for tensor in one.operation.update.tensors}
    applied_tensors = {tensor for edit in settled.values() for tensor in _trained(edit)}
    return Binding(
        checkpoint,
        tuple(adapters),
        settled,
        untied,
        ignored=_ignored(adapters),
        settled=tuple(sorted(bound_tensors - applied_tensors, key=lambda tensor: tensor.name)),
        warnings=(*_warnings(adapters, untied, checkpoint, settled), *notes),
    )


def _ignored(adapters: Sequence[tuple[Adapter, float]]) -> tuple[Ignored, ...]:
    if len(adapters) == 1:
        return adapters[0][0].ignored
    return tuple(
        replace(entry, adapter=number) for number, (adapter, _) in enumerate(adapters) for entry in adapter.ignored
    )


def _settle_ties(
    edits: Mapping[tuple[str, str], Edit], adapters: Sequence[tuple[Adapter, float]], checkpoint: Checkpoint
) -> tuple[dict[tuple[str, str], Edit], frozenset[str]]:
    """The edits after ties are settled, and the components whose head and embedding become two tensors."""
    keeping = frozenset(number for number, (adapter, _) in enumerate(adapters) if adapter.keeps_ties)
    settled, untied = dict(edits), set()
    for component in checkpoint.components.values():
        settled, parted = settle_tie(settled, component, keeping)
        if parted:
            untied.add(component.name)
    return settled, frozenset(untied)


def _trained(edit: Edit) -> Iterator[Tensor]:
    """The adapters' tensors that make an edit."""
    for operation in _trained_by(edit):
        yield from operation.update.tensors


def _trained_by(edit: Edit) -> tuple[Operation, ...]:
    return (*edit.operations, *((edit.replaced,) if edit.replaced else ()))


def _carried_once(
    name: str, operations: Sequence[Operation], adapters: Sequence[tuple[Adapter, float]]
) -> tuple[Operation, ...]:
    """The operations, with the base's own values first and once where several adapters, or a later one, brought them.

    Raises:
        FitError: they brought different ones.
    """
    carried = [operation for operation in operations if is_carried(operation.update)]
    if not carried:
        return tuple(operations)
    first, *others = (Plain.of(operation.update.tensors[0]) for operation in carried)
    for operation, other in zip(carried[1:], others, strict=True):
        if not same_values(first, other):
            names = listing([adapters[one.adapter][0].path.name for one in (carried[0], operation)])
            raise FitError(
                f"is stored whole by {names}, with other values: they were trained on different bases", tensor=name
            )
    return (carried[0], *(operation for operation in operations if not is_carried(operation.update)))


def _edit(
    key: tuple[str, str],
    bound: Sequence[BoundOperation],
    component: Component,
    adapters: Sequence[tuple[Adapter, float]],
) -> Edit:
    """The operations on one weight, its source being the base or the one adapter that replaces it."""
    operations = _carried_once(key[1], [bound_operation.operation for bound_operation in bound], adapters)
    replacements = [i for i, operation in enumerate(operations) if is_replacing(operation.update)]
    several = len({operation.adapter for operation in operations}) > 1 and not is_carried(operations[0].update)
    if len(replacements) > 1 or (replacements and (several or replacements[0] != 0)):
        names = sorted({str(adapters[operation.adapter][0].path.name) for operation in operations})
        raise FitError(f"is trained in full by one adapter and changed by another ({listing(names)})", tensor=key[1])
    storage = widest([one.place.parameter.storage for one in bound])
    check_overlap(key[1], operations, adapters)
    side_by_side(operations)  # for its errors, before anything is written
    check_family(key[1], storage, component)
    is_new = component.aliases.get(key[1], key[1]) not in component.names.parameters
    first = operations[0]
    if is_replacing(first.update) and first.share == 1.0:
        source = Plain.of(first.update.stored, stacked=is_stacked(storage))
        return Edit(*key, source, operations[1:], replaced=first, added=is_new)
    why = "the base adds no bias here" if is_new else ""
    return Edit(*key, storage, operations, added=is_new, why=why)


def _warnings(
    adapters: Sequence[tuple[Adapter, float]],
    untied: frozenset[str],
    checkpoint: Checkpoint,
    edits: Mapping[tuple[str, str], Edit],
) -> tuple[str, ...]:
    issues = [f"{adapter.path.name}: {issue}" for adapter, _ in adapters for issue in adapter.known_issues()]
    for number, (adapter, _) in enumerate(adapters):
        changed = [edit for edit in edits.values() if any(op.adapter == number for op in _trained_by(edit))]
        issues += [f"{adapter.path.name}: {issue}" for issue in disagreements(adapter, checkpoint, changed)]
    other_base = warn_of_other_base([adapter for adapter, _ in adapters], checkpoint)
    return (*issues, *_warn_of_parting(untied, checkpoint), *other_base)


def _warn_of_parting(untied: frozenset[str], checkpoint: Checkpoint) -> list[str]:
    return [
        f"head and embedding were one tensor and part here: the output stores both ({checkpoint.components[name].head})"
        for name in sorted(untied)
    ]


def warn_of_other_base(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> list[str]:
    """A different recorded base name is only a warning: folders get renamed."""
    return [f"{adapter.path.name}: {text}" for adapter in adapters if (text := other_base(adapter, checkpoint))]


def other_base(adapter: Adapter, checkpoint: Checkpoint) -> str | None:
    """That the base recorded in `adapter` has another name than the one given; None if it is the same, or a quantised copy.

    A quantised copy has the name of what it was made of and an ending: ``llama-bnb-4bit``. A base in the hub's cache lies in a
    folder named by a commit, and has the name of its repository.
    """
    name = base_name(checkpoint)
    given, recorded = (text.rstrip("/").rpartition("/")[2] for text in (name, adapter.base_name))
    config = next(iter(checkpoint.components.values())).config
    if not recorded or recorded in (given, str(config.get("_name_or_path", "")).rpartition("/")[2]):
        return None
    if checkpoint.is_quantised and given.startswith(tuple(recorded + mark for mark in "-_.")):
        return None
    return f"was trained on '{local_name(adapter.base_name)}', the base given is '{name}'"
