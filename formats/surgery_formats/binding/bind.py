# SPDX-License-Identifier: Apache-2.0
"""Which update meets which bytes of a base: everything later (plan, ledger, proof, report) is computed from a `Binding`.

Updates are grouped by the stored tensor they change, so that ties and overlaps are seen once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery_formats.binding.edits import Edit, Operation
from surgery_formats.binding.tied_edits import settle_tie
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.models.names import WeightSlice, extent
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.tensor import Tensor, ZeroTensor
from surgery_formats.tensors.views import View, rows, whole
from surgery_formats.text import closest, listing, show
from surgery_formats.updates import Fit, Linear, Offset, Replacement, Stacked, TokenRows, Unsized, Update

__all__ = ["Binding", "bind", "component_of", "fit_of", "warn_of_other_base", "widest_of"]


@dataclass(frozen=True)
class Binding:
    """The meeting of adapters and a base.

    Attributes:
        checkpoint: The base.
        adapters: With their weights.
        edits: By ``(component, output tensor name)``.
        untied: Components whose head and embedding part.
        ignored: Adapter tensors that rightly do nothing.
        settled: Adapter tensors that say of one side of a tie what was applied for the other.
        warnings: What the user should know.
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
        new_biases: Layers without a bias get one where an adapter adds to it: a graph can hold it, a checkpoint of the family cannot.

    Raises:
        FitError: a parameter the base lacks, a shape that does not fit, a tensor nobody consumes, an adapter that changes no
            weights, two adapters that replace one parameter.
    """
    collected: dict[tuple[str, str], list[tuple[Operation, WeightSlice]]] = {}
    for number, (adapter, weight) in enumerate(adapters):
        _check_mergeable(adapter)
        missing: list[Site] = []
        widest: dict[str, tuple[int, int]] = {}
        for site, chain in adapter.updates.items():
            component = component_of(site, adapter, checkpoint)
            places = component.names.resolve(site.path, flat=site.flat) or _new_head(site, chain, adapter, component)
            if not places and new_biases and site not in adapter.optional:
                places = _new_bias(site, chain, component)
            if not places and site not in adapter.optional:
                missing.append(site)
            for given in chain if places else ():
                if isinstance(given, Unsized):
                    if given.kind not in widest:
                        widest[given.kind] = widest_of(given.kind, adapter, checkpoint)
                    given = given.fitted(fit_of(places, widest[given.kind]))
                update = _oriented(given, component, adapter)
                if isinstance(update, Replacement):
                    places = (_replaced(update, places, weight),)
                linear = isinstance(update, Linear)
                scaled = update.scaled(weight) if isinstance(update, Linear) and weight != 1.0 else update
                for operation, place in _operations(scaled, places, site, number, 1.0 if linear else weight):
                    key = (component.name, place.alias or place.parameter.name)
                    collected.setdefault(key, []).append((operation, place))
        _check_missing(missing, adapter, checkpoint)
    edits = {key: _edit(key, found, checkpoint.components[key[0]], adapters) for key, found in collected.items()}
    before = {tensor for edit in edits.values() for tensor in _trained(edit)}
    untied: set[str] = set()
    keeping = frozenset(number for number, (adapter, _) in enumerate(adapters) if adapter.keeps_ties)
    for component in checkpoint.components.values():
        edits, parted = settle_tie(edits, component, keeping)
        if parted:
            untied.add(component.name)
    warnings = [f"{adapter.path.name}: {trap}" for adapter, _ in adapters for trap in adapter.known_issues()]
    warnings += _warn_of_parting(untied, checkpoint) + warn_of_other_base(
        [adapter for adapter, _ in adapters], checkpoint
    )
    ignored = tuple(entry for adapter, _ in adapters for entry in adapter.ignored)
    settled = tuple(sorted(before - {t for e in edits.values() for t in _trained(e)}, key=lambda tensor: tensor.name))
    return Binding(checkpoint, tuple(adapters), edits, frozenset(untied), ignored, settled, tuple(warnings))


def _trained(edit: Edit) -> Iterator[Tensor]:
    """The adapters' tensors that make an edit."""
    for operation in (*edit.operations, *((edit.replaced,) if edit.replaced else ())):
        yield from operation.update.tensors


def _check_mergeable(adapter: Adapter) -> None:
    check_consumed(adapter)
    if adapter.prompt is not None:
        raise FitError(
            f"{adapter.kind} trains virtual tokens: no weight can hold them",
            file=adapter.path,
            hint="keep it beside the model: `surgery export-onnx` puts it in front of the input",
        )
    if not adapter.updates:
        raise FitError("the adapter holds no tensors", file=adapter.path)


def component_of(site: Site, adapter: Adapter, checkpoint: Checkpoint) -> Component:
    """The part of a base that a site of an adapter means; an adapter without parts fits a base without parts.

    Raises:
        FitError: the base has no such part.
    """
    if site.component in checkpoint.components:
        return checkpoint.components[site.component]
    if not checkpoint.is_pipeline and len({other.component for other in adapter.updates}) == 1:
        return checkpoint.main
    raise FitError(
        f"the adapter changes '{site.component or 'one model'}', the base has {listing(sorted(checkpoint.components)) or 'one model'}",
        file=adapter.path,
    )


def _new_head(site: Site, chain: tuple[Update, ...], adapter: Adapter, component: Component) -> tuple[WeightSlice, ...]:
    """A head that was added for a task has no place in the base; it gets one."""
    module = site.path.rpartition(".")[0]
    if not (isinstance(chain[0], Replacement) and len(chain) == 1 and adapter.new_modules & set(module.split("."))):
        return ()
    if any(segment.isdigit() for segment in module.split(".")):  # a layer the base lacks is no new head
        return ()
    return (WeightSlice(replace(Parameter.of(chain[0].stored, component.name), name=site.path)),)


def _new_bias(site: Site, chain: tuple[Update, ...], component: Component) -> tuple[WeightSlice, ...]:
    """A bias of zeros for a layer that has none; its weight must be one stored tensor."""
    module, _, leaf = site.path.rpartition(".")
    if leaf != "bias" or not all(isinstance(update, Offset) for update in chain):
        return ()
    weights = component.names.resolve(f"{module}.weight", flat=site.flat)
    if len(weights) != 1 or not (name := weights[0].parameter.name).endswith(".weight"):
        return ()
    parameter = weights[0].parameter
    if parameter.storage.tensor.numel != parameter.shape[0] * parameter.shape[1]:
        return ()
    zeros = ZeroTensor(name.removesuffix("weight") + "bias", DType.F32, parameter.shape[:1])
    return (WeightSlice(Parameter.of(zeros, component.name)),)


def fit_of(places: tuple[WeightSlice, ...], widest: tuple[int, int]) -> Fit:
    """What an update may need to know of the weight at `places`."""
    storage = places[0].parameter.storage
    sizes = storage.tensor.shape
    kernel = math.prod(sizes[2:]) if storage.shape[0] == sizes[0] else 1  # else a stack of experts
    return Fit(extent(places), kernel, widest)


def widest_of(kind: str, adapter: Adapter, checkpoint: Checkpoint) -> tuple[int, int]:
    """``(out, in)``, each the greatest of all weights for which `adapter` has updates of `kind`."""
    shapes = [(0, 0)]
    for site, chain in adapter.updates.items():
        if any(update.kind == kind for update in chain):
            names = component_of(site, adapter, checkpoint).names
            shapes += [extent(found)] if (found := names.resolve(site.path, flat=site.flat)) else []
    return max(rows for rows, _ in shapes), max(cols for _, cols in shapes)


def _oriented(update: Update, component: Component, adapter: Adapter) -> Update:
    """Factors of stacked experts as this family's axis order has them.

    Raises:
        FitError: the shapes fit both ways and the family is not known.
    """
    square = update.shape[0] == update.shape[1]
    if isinstance(update, Stacked):
        square = update.experts[0].shape[0] == update.experts[0].shape[1]
    doubtful = (isinstance(update, Stacked) and update.if_transposed) or (
        not isinstance(update, Replacement | TokenRows) and adapter.config.get("fan_in_fan_out") is True
    )
    if doubtful and square and not component.family.known:
        raise FitError(
            "square, and only the base's family could tell rows from columns",
            file=update.tensors[0].path,
            tensor=update.tensors[0].name,
            hint="give the base as a folder with its config.json",
        )
    if isinstance(update, Stacked) and update.if_transposed and component.family.experts_transposed:
        return Stacked(update.if_transposed)
    return update


def _replaced(update: Replacement, places: tuple[WeightSlice, ...], weight: float) -> WeightSlice:
    """The place after its values were replaced: a longer vocabulary gives a longer weight."""
    place = places[0]
    old, new = place.parameter.storage.tensor, update.stored
    grows = len(new.shape) == 2 and new.shape[1:] == old.shape[1:]
    if len(places) > 1 or (new.shape != old.shape and not grows):
        raise FitError(f"shape {list(new.shape)}, but {list(old.shape)} in the base", file=new.path, tensor=new.name)
    if new.dtype is not old.dtype and not (new.dtype.is_float and old.dtype.is_float):
        raise FitError(f"{new.dtype.label} in place of {old.dtype.label}", file=new.path, tensor=new.name)
    if weight != 1.0 and (new.shape != old.shape or old is new):
        raise FitError(
            f"the base has nothing to blend {weight:g} of this with",
            file=new.path,
            tensor=new.name,
            hint="use weight 1",
        )
    if new.shape == old.shape:
        return place
    return WeightSlice(replace(Parameter.of(new, place.parameter.component), name=place.parameter.name), place.alias)


def _operations(
    update: Update, places: tuple[WeightSlice, ...], site: Site, number: int, share: float
) -> Iterator[tuple[Operation, WeightSlice]]:
    """`update` cut to the pieces of the base that hold its weight."""
    _check_fit(update, places)
    if isinstance(update, Replacement):  # as the parameter is stored, whatever its orientation
        yield Operation(update, whole(places[0].parameter.storage.shape), site, number, share), places[0]
        return
    for first, part in update.parts():
        for place in places:
            view = place.parameter.view
            low, high = max(first, view.row_origin), min(first + part.shape[0], view.row_origin + view.shape[0])
            if isinstance(part, TokenRows):
                low, high = view.row_origin, view.row_origin + view.shape[0]
            if low < high:
                piece = rows(view, low - view.row_origin, high - view.row_origin)
                yield Operation(part, replace(piece, row_origin=low - first), site, number, share), place


def _check_fit(update: Update, places: tuple[WeightSlice, ...]) -> None:
    """Shapes agree, and the base's values are numbers that can be added to."""
    parameter = places[0].parameter
    tensor = update.tensors[0]
    if isinstance(update, Replacement):
        return
    if not parameter.storage.tensor.dtype.is_float:
        raise FitError(
            f"'{parameter.name}' is stored as {parameter.storage.tensor.dtype.label}: a quantised base cannot be merged into",
            file=parameter.storage.tensor.path,
            tensor=tensor.name,
            hint="merge into the base it was quantised from",
        )
    height, width = extent(places)
    if isinstance(update, TokenRows) and update.shape[1] == width:
        if (last := max(update.indices, default=-1)) < height:
            return
        raise FitError(
            f"token id {last}, but '{parameter.name}' has {height} rows", file=tensor.path, tensor=tensor.name
        )
    if update.shape != (height, width):
        raise FitError(
            f"made for a weight of {list(update.shape)}, but '{parameter.name}' is {[height, width]}",
            file=tensor.path,
            tensor=tensor.name,
            hint="is this the base it was trained on?",
        )


def _edit(
    key: tuple[str, str],
    found: list[tuple[Operation, WeightSlice]],
    component: Component,
    adapters: Sequence[tuple[Adapter, float]],
) -> Edit:
    """The operations on one tensor, its source being the base or the one adapter that replaces it."""
    replacements = [i for i, (operation, _) in enumerate(found) if isinstance(operation.update, Replacement)]
    several = len({operation.adapter for operation, _ in found}) > 1
    if len(replacements) > 1 or (replacements and (several or replacements[0] != 0)):
        names = sorted({str(adapters[operation.adapter][0].path.name) for operation, _ in found})
        raise FitError(f"is trained in full by one adapter and changed by another ({listing(names)})", tensor=key[1])
    _check_overlap(key[1], [operation for operation, _ in found], adapters)
    _check_family(key[1], found, component)
    stored = component.names.tensors.get(component.aliases.get(key[1], key[1]))
    place = found[0][1]
    stacked = place.parameter.storage.shape != place.parameter.storage.tensor.matrix
    operations = tuple(operation for operation, _ in found)
    if replacements and found[0][0].share == 1.0:
        update = found[0][0].update
        assert isinstance(update, Replacement)
        return Edit(*key, update.stored, operations[1:], stacked, replaced=operations[0], added=stored is None)
    if stored is None:
        return Edit(
            *key, place.parameter.storage.tensor, operations, stacked, added=True, why="the base adds no bias here"
        )
    return Edit(*key, stored, operations, stacked)


def _check_overlap(name: str, operations: Sequence[Operation], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Two names of one adapter for the same rows: adding both would double what was trained once."""
    for position, one in enumerate(operations):
        for other in operations[:position]:
            if one.adapter == other.adapter and one.site != other.site and _meet(one.view, other.view):
                raise FitError(
                    f"'{one.site}' and '{other.site}' are the same weight of the base",
                    file=adapters[one.adapter][0].path,
                    tensor=name,
                )


def _meet(one: View, other: View) -> bool:
    return bool(set(one.rows) & set(other.rows)) and bool(set(one.cols) & set(other.cols))


def _check_family(name: str, found: Sequence[tuple[Operation, WeightSlice]], component: Component) -> None:
    """In a model of unknown family an embedding may be tied to a head by a name nobody here knows."""
    config = component.config
    text = config.get("text_config")
    vocabulary = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    tensor = found[0][1].parameter.storage.tensor
    if component.family.known or not config.get("model_type") or config.get("tie_word_embeddings") is False:
        return
    if len(tensor.shape) == 2 and tensor.shape[0] == vocabulary:
        raise FitError(
            f"models of type '{show(config['model_type'])}' are not known: whether this weight is tied to another cannot be told",
            tensor=name,
            hint="keep the adapter unmerged, or set tie_word_embeddings to false in the base's config.json if it is not tied",
        )


def _check_missing(missing: list[Site], adapter: Adapter, checkpoint: Checkpoint) -> None:
    if not missing:
        return
    site = missing[0]
    known = checkpoint.components[
        site.component if site.component in checkpoint.components else next(iter(checkpoint.components))
    ]
    tensor = adapter.updates[site][0].tensors[0]
    raise FitError(
        f"the base has no parameter '{site}' ({len(missing)} of {len(adapter.updates)} do not fit)",
        file=tensor.path,
        tensor=tensor.name,
        hint=closest(site.path, known.tensors) or "is this the base it was trained on?",
    )


def _warn_of_parting(untied: set[str], checkpoint: Checkpoint) -> list[str]:
    return [
        f"head and embedding were one tensor and part here: the output stores both ({checkpoint.components[name].head})"
        for name in sorted(untied)
    ]


def warn_of_other_base(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> list[str]:
    """Another recorded name is worth a word, no more: folders are renamed all the time."""
    config = next(iter(checkpoint.components.values())).config
    names = {checkpoint.path.resolve().name, str(config.get("_name_or_path", "")).rpartition("/")[2]}
    return [
        f"{adapter.path.name}: was trained on '{adapter.base_name}', the base given is '{checkpoint.path.resolve().name}'"
        for adapter in adapters
        if adapter.base_name and adapter.base_name.rstrip("/").rpartition("/")[2] not in names
    ]
