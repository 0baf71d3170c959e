# SPDX-License-Identifier: Apache-2.0
"""What the updates of one site do to the weights that hold it: oriented, scaled, and cut to the pieces of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from surgery_formats.binding.fit_checks import check_fit, check_kernel, has_rows_to_resize
from surgery_formats.binding.growth import grown
from surgery_formats.binding.locating import LocatedChain
from surgery_formats.binding.operation import Operation, at_weight
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.ungathered import UNGATHERED, is_ungathered
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.eras import experts_transposed
from surgery_formats.models.names import WeightSlice
from surgery_formats.storage.base import is_stacked
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.views import expert, rows, transpose, whole, window
from surgery_formats.updates import (
    Effect,
    Replacing,
    Update,
    is_linear,
    is_replacing,
    is_row_setting,
    transposed,
)

__all__ = ["BoundOperation", "is_carried", "operations_of"]

_WHAT: Mapping[Effect, str] = {
    "adds": "cannot be scaled",
    "sets": "replaces values",
    "maps": "changes a weight by more than an addition",
}


@dataclass(frozen=True, slots=True)
class BoundOperation:
    """One operation, and the slice of the base that it acts on."""

    operation: Operation
    place: WeightSlice

    @property
    def key(self) -> tuple[str, str]:
        """``(component, name of the weight)`` in the output."""
        return self.place.parameter.component, self.place.alias or self.place.parameter.name


def operations_of(chain: LocatedChain, adapter: Adapter, number: int, weight: float) -> Iterator[BoundOperation]:
    """The operations of a chain on the weights of the base, each update oriented and scaled.

    Args:
        chain: Of one site, with its weight.
        adapter: Whose it is.
        number: Of the adapter, among those that are bound.
        weight: Of the adapter.

    Raises:
        FitError: a shape does not fit, or the weight is one that an update of this kind cannot have.
    """
    slices = chain.slices
    for stored_update in chain.updates:
        update = _oriented(stored_update, chain.component, adapter)
        counts = 1.0 if is_carried(update) else weight
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
) -> Iterator[BoundOperation]:
    """`update` cut to the pieces of the base that hold its weight."""
    check_fit(update, places)
    check_kernel(update, site, places)
    if is_replacing(update):  # as the parameter is stored, whatever its orientation
        everything = whole(places[0].parameter.storage.shape)
        yield BoundOperation(Operation(update, everything, site, number, share), places[0])
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
                yield BoundOperation(Operation(part, piece, site, number, share), place)


def is_carried(update: Update) -> bool:
    """Whether it is no update at all, but the base's own value: PEFT stores a whole embedding beside its LoRA."""
    return is_replacing(update) and update.held == "carried"
