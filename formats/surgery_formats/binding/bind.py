# SPDX-License-Identifier: Apache-2.0
"""Resolve the updates of adapters to the weights of a base.

The plan, the ledger, the proof and the report are all computed from the resulting `Binding`. Updates are grouped by the
weight they change, so that ties and overlaps are handled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery_formats.binding.containers import housed
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.fit_checks import (
    check_family,
    check_fit,
    check_kernel,
    check_mergeable,
    check_missing,
    check_overlap,
    disagreements,
    has_rows_to_resize,
)
from surgery_formats.binding.growth import grown, widest
from surgery_formats.binding.operation import Operation, at_weight
from surgery_formats.binding.parts import in_its_part
from surgery_formats.binding.sizes import sized, slices_of
from surgery_formats.binding.tied_edits import same_values, settle_tie
from surgery_formats.binding.together import side_by_side
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.canonical.ungathered import UNGATHERED, is_ungathered
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.models.eras import experts_transposed
from surgery_formats.models.names import WeightSlice
from surgery_formats.storage.base import is_stacked
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.computed import zeros
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import expert, rows, transpose, whole, window
from surgery_formats.text import listing, local_name
from surgery_formats.updates import (
    Effect,
    Replacing,
    Update,
    is_linear,
    is_refusing,
    is_replacing,
    is_row_setting,
    transposed,
)

__all__ = ["Binding", "bind", "warn_of_other_base"]


_WHAT: Mapping[Effect, str] = {
    "adds": "cannot be scaled",
    "sets": "replaces values",
    "maps": "changes a weight by more than an addition",
}


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
    bound: dict[tuple[str, str], list[_BoundOperation]] = {}
    notes: list[str] = []
    for number, (given, weight) in enumerate(adapters):
        check_mergeable(given, checkpoint)
        for update in (update for chain in given.updates.values() for update in chain):
            if is_refusing(update):  # whether or not the base has such a module, which for one that is inserted is no
                update.refuse()
        adapter, read_as = housed(in_its_part(given, checkpoint), checkpoint)
        notes += read_as
        chains, missing = _locate(sized(adapter, checkpoint), checkpoint, new_biases=new_biases)
        for chain in chains:
            for operation in _operate(chain, adapter, number, weight):
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
        ignored=tuple(entry for adapter, _ in adapters for entry in adapter.ignored),
        settled=tuple(sorted(bound_tensors - applied_tensors, key=lambda tensor: tensor.name)),
        warnings=(*_warnings(adapters, untied, checkpoint, settled), *notes),
    )


@dataclass(frozen=True, slots=True)
class _LocatedChain:
    """The updates of one site, and where the base holds its weight."""

    site: Site
    updates: tuple[Update, ...]
    component: Component
    slices: tuple[WeightSlice, ...]


@dataclass(frozen=True, slots=True)
class _BoundOperation:
    """One operation, and the slice of the base that it acts on."""

    operation: Operation
    place: WeightSlice

    @property
    def key(self) -> tuple[str, str]:
        """``(component, name of the weight)`` in the output."""
        return self.place.parameter.component, self.place.alias or self.place.parameter.name


def _locate(
    adapter: Adapter, checkpoint: Checkpoint, *, new_biases: bool
) -> tuple[tuple[_LocatedChain, ...], tuple[Site, ...]]:
    """Every chain of an adapter with its weight in the base, and the sites that have none and need one."""
    chains: list[_LocatedChain] = []
    missing: list[Site] = []
    for site, updates in adapter.updates.items():
        component = checkpoint.component(site.component)
        if component is None:
            missing.append(site)
            continue
        slices = slices_of(site, checkpoint) or _new_head(site, updates, adapter, component)
        if not slices and new_biases and site not in adapter.optional:
            slices = _new_bias(site, updates, component)
        if slices:
            _check_read(slices, component)
            chains.append(_LocatedChain(site, updates, component, slices))
        elif site not in adapter.optional:
            missing.append(site)
    return tuple(chains), tuple(missing)


def _check_read(slices: tuple[WeightSlice, ...], component: Component) -> None:
    """Refuse a weight that is a part of one in an unread format, by what is known of that."""
    for place in slices:
        storage = place.parameter.storage
        if not storage.is_float and component.unread is not None and storage.name in component.unread.tensors:
            raise component.unread.error()


def _operate(chain: _LocatedChain, adapter: Adapter, number: int, weight: float) -> Iterator[_BoundOperation]:
    """The operations of a chain on the weights of the base, each update oriented and scaled."""
    slices = chain.slices
    for stored_update in chain.updates:
        update = _oriented(stored_update, chain.component, adapter)
        counts = 1.0 if _is_carried(update) else weight
        if is_replacing(update):
            slices = (_replaced(update, slices, counts, chain.component),)
        else:
            slices = grown(update, slices) if chain.site.grows else slices
            slices = tuple(piece for place in slices for piece in _each_expert(place))
        if counts < 0 and not is_linear(update):
            raise FitError(
                f"a weight of {weight:g} for a {update.kind}: only additions can be subtracted, "
                f"this {_WHAT[update.effect]}",
                file=adapter.path,
                tensor=str(chain.site),
                hint="`surgery unmerge` takes a merge back",
            )
        scaled, share = at_weight(update, counts)
        yield from _operations(scaled, slices, chain.site, number, share)


def _each_expert(place: WeightSlice) -> Iterator[WeightSlice]:
    """A stack whose experts are each stored transposed, as one piece for every expert; others as they are.

    The rows of such a stack are the columns of its experts, of which no view of all of them says whose they are.
    """
    parameter = place.parameter
    storage = parameter.storage
    if not (storage.transposed and is_stacked(storage) and parameter.is_whole and not parameter.view.transposed):
        yield place
        return
    count, (rows, columns) = storage.sizes[0], storage.shape
    for number in range(count):
        view = transpose(expert(number, count, (rows // count, columns)))
        yield replace(place, parameter=replace(parameter, view=window(view, row_origin=number * columns)))


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


def _new_head(site: Site, chain: tuple[Update, ...], adapter: Adapter, component: Component) -> tuple[WeightSlice, ...]:
    """A new weight for a head that was added for a task and that the base lacks."""
    module = site.path.rpartition(".")[0]
    if not (is_replacing(chain[0]) and len(chain) == 1 and adapter.new_modules & set(module.split("."))):
        return ()
    if any(segment.isdigit() for segment in module.split(".")):  # a layer the base lacks is no new head
        return ()
    return (WeightSlice(replace(Parameter.of(chain[0].stored, component.name), name=site.path)),)


def _new_bias(site: Site, chain: tuple[Update, ...], component: Component) -> tuple[WeightSlice, ...]:
    """A bias of zeros for a layer that has none; the base must hold its weight whole and apart."""
    module, _, leaf = site.path.rpartition(".")
    if leaf != "bias" or not all(update.effect == "adds" for update in chain):
        return ()
    weights = component.names.resolve(f"{module}.weight", flat=site.flat)
    if len(weights) != 1 or not (name := weights[0].parameter.name).endswith(".weight"):
        return ()
    parameter = weights[0].parameter
    if not parameter.is_whole:
        return ()
    bias = zeros(name.removesuffix("weight") + "bias", DType.F32, parameter.shape[:1])
    return (WeightSlice(Parameter.of(bias, component.name)),)


def _oriented(update: Update, component: Component, adapter: Adapter) -> Update:
    """Factors of stacked experts as this family's axis order has them.

    Raises:
        FitError: the shapes fit both ways and the family is not known.
    """
    out, inputs = update.parts()[0][1].shape
    turned = transposed(update)
    doubtful = turned is not None or (update.effect != "sets" and adapter.stored_transposed)
    known = component.family.known or (turned is not None and experts_transposed(component.config) is not None)
    if doubtful and out == inputs and not known:
        raise FitError(
            "square, and only the base's family could tell rows from columns",
            file=update.tensors[0].path,
            tensor=update.tensors[0].name,
            hint="give the base as a folder with its config.json",
        )
    return turned if turned is not None and component.family.experts_transposed else update


def _replaced(update: Replacing, places: tuple[WeightSlice, ...], weight: float, component: Component) -> WeightSlice:
    """The weight slice after its values were replaced: a longer vocabulary gives a longer weight."""
    place = places[0]
    old, new = place.parameter.storage, update.stored
    resized = (
        has_rows_to_resize(place.parameter, component)
        and len(new.shape) == 2
        and new.shape[1:] == old.sizes[1:]
        and new.shape[0] > 0
    )
    if len(places) > 1 or (new.shape != old.sizes and not resized):
        what = f"shape {list(new.shape)}, but {list(old.sizes)} in the base"
        raise FitError(what, file=new.path, tensor=new.name, hint=UNGATHERED if is_ungathered(new) else None)
    if new.dtype is not old.dtype and not (new.dtype.is_float and old.is_float):
        raise FitError(f"{new.dtype.label} in place of {old.kind}", file=new.path, tensor=new.name)
    if weight != 1.0 and (new.shape != old.sizes or old.sources == new.sources):
        raise FitError(
            f"the base has nothing to blend {weight:g} of this with",
            file=new.path,
            tensor=new.name,
            hint="use weight 1",
        )
    if new.shape == old.sizes:
        return place
    return WeightSlice(replace(Parameter.of(new, place.parameter.component), name=place.parameter.name), place.alias)


def _operations(
    update: Update, places: tuple[WeightSlice, ...], site: Site, number: int, share: float
) -> Iterator[_BoundOperation]:
    """`update` cut to the pieces of the base that hold its weight."""
    check_fit(update, places)
    check_kernel(update, site, places)
    if is_replacing(update):  # as the parameter is stored, whatever its orientation
        everything = whole(places[0].parameter.storage.shape)
        yield _BoundOperation(Operation(update, everything, site, number, share), places[0])
        return
    by_number = is_row_setting(update)
    for first, part in update.parts():
        for place in places:
            view = place.parameter.view
            low, high = max(first, view.row_origin), min(first + part.shape[0], view.row_origin + view.shape[0])
            if by_number:
                low, high = view.row_origin, view.row_origin + view.shape[0]
            if low < high:
                piece = rows(view, low - view.row_origin, high - view.row_origin)
                piece = replace(piece, row_origin=low - first)
                yield _BoundOperation(Operation(part, piece, site, number, share), place)


def _is_carried(update: Update) -> bool:
    """Whether it is no update at all, but the base's own value: PEFT stores a whole embedding beside its LoRA."""
    return is_replacing(update) and update.held == "carried"


def _carried_once(
    name: str, operations: Sequence[Operation], adapters: Sequence[tuple[Adapter, float]]
) -> tuple[Operation, ...]:
    """The operations, with the base's own values first and once where several adapters, or a later one, brought them.

    Raises:
        FitError: they brought different ones.
    """
    carried = [operation for operation in operations if _is_carried(operation.update)]
    if not carried:
        return tuple(operations)
    first, *others = (Plain.of(operation.update.tensors[0]) for operation in carried)
    for operation, other in zip(carried[1:], others, strict=True):
        if not same_values(first, other):
            names = listing([adapters[one.adapter][0].path.name for one in (carried[0], operation)])
            raise FitError(
                f"is stored whole by {names}, with other values: they were trained on different bases", tensor=name
            )
    return (carried[0], *(operation for operation in operations if not _is_carried(operation.update)))


def _edit(
    key: tuple[str, str],
    bound: Sequence[_BoundOperation],
    component: Component,
    adapters: Sequence[tuple[Adapter, float]],
) -> Edit:
    """The operations on one weight, its source being the base or the one adapter that replaces it."""
    operations = _carried_once(key[1], [bound_operation.operation for bound_operation in bound], adapters)
    replacements = [i for i, operation in enumerate(operations) if is_replacing(operation.update)]
    several = len({operation.adapter for operation in operations}) > 1 and not _is_carried(operations[0].update)
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
    config = next(iter(checkpoint.components.values())).config
    names = {checkpoint.path.resolve().name, str(config.get("_name_or_path", "")).rpartition("/")[2]}
    return [
        f"{adapter.path.name}: was trained on '{local_name(adapter.base_name)}', "
        f"the base given is '{checkpoint.path.resolve().name}'"
        for adapter in adapters
        if adapter.base_name and adapter.base_name.rstrip("/").rpartition("/")[2] not in names
    ]
