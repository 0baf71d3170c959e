# SPDX-License-Identifier: Apache-2.0
"""Checks of an adapter against its base; every error names the file and the tensor at fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from surgery_formats.binding.containers import fits
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.operation import Operation
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.names import WeightSlice, extent
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.views import intersect
from surgery_formats.text import closest, listing, show, summed_up
from surgery_formats.updates import Update, is_refusing, is_replacing, is_row_setting

__all__ = [
    "check_family",
    "check_fit",
    "check_kernel",
    "check_mergeable",
    "check_missing",
    "check_overlap",
    "disagreements",
    "has_rows_to_resize",
]

_LISTED = 40  # groups of missing parameters that an error names


def check_mergeable(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter with unused tensors, with parts that cannot be merged into weights, or of several models."""
    check_consumed(adapter)
    if adapter.prompt is not None:
        raise FitError(
            f"{adapter.kind} trains virtual tokens: no weight can hold them",
            file=adapter.path,
            hint="keep it beside the model: `surgery export-onnx` puts it in front of the input",
        )
    for chain in adapter.updates.values():
        for update in chain:
            if is_refusing(update):  # whether or not the base has such a module, which for one that is inserted is no
                update.refuse()
    if not adapter.updates:
        raise FitError("the adapter holds no tensors", file=adapter.path)
    components = sorted({site.component for site in adapter.updates})
    if len(components) > 1 and not (checkpoint.is_pipeline or checkpoint.main.parts):
        kept = _most_fitting(components, adapter, checkpoint)
        others = [name for name in components if name != kept]
        raise FitError(
            f"the adapter changes {listing(components)}, the base is one model",
            file=adapter.path,
            hint=f"give the whole pipeline as the base, or {_leaving_out(*map(_all_of, others))}",
        )


def _most_fitting(components: Sequence[str], adapter: Adapter, checkpoint: Checkpoint) -> str:
    """The part of an adapter of several networks that a base of one may be: by names and shapes, else none of its text encoders."""
    names = checkpoint.main.names
    shares: dict[str, float] = {}
    for component in components:
        sites = {site: chain for site, chain in adapter.updates.items() if site.component == component}
        slices = {site: names.resolve(site.path, flat=site.flat) for site in sites}
        there = sum(bool(slices[site]) and fits(chain[0], slices[site]) for site, chain in sites.items())
        shares[component] = there / len(sites)
    return max(components, key=lambda name: (shares[name], not name.startswith("text_encoder")))


def check_fit(update: Update, places: tuple[WeightSlice, ...]) -> None:
    """Refuse an update whose shape differs from its weight's, or a weight that is quantised."""
    parameter = places[0].parameter
    tensor = update.tensors[0]
    if is_replacing(update):
        return
    if not parameter.storage.is_float:
        raise FitError(
            f"'{parameter.name}' is stored as {parameter.storage.kind}: a quantised base cannot be merged into",
            file=parameter.sources[0].path,
            tensor=tensor.name,
            hint="merge into the base it was quantised from",
        )
    height, width = extent(places)
    if is_row_setting(update) and update.shape[1] == width:
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


def check_kernel(update: Update, site: Site, places: tuple[WeightSlice, ...]) -> None:
    """Refuse factors of a convolution for one of other axes.

    A linear layer has none, but may have the factors of a kernel ``(1, 1)``, which is one; PEFT's cores (CP form) have two
    even for a kernel of one axis.
    """
    sizes, axes = places[0].parameter.storage.sizes, len(site.kernel)
    if is_replacing(update) or not axes or len(sizes) < 2 or axes == len(sizes) - 2:
        return
    if axes == 2 and site.kernel[len(sizes) - 2 :] == (1,) * (4 - len(sizes)):
        return
    stored = max(update.tensors, key=lambda tensor: len(tensor.shape))
    linear = len(sizes) == 2
    raise FitError(
        f"a factor of a convolution{'' if linear else f' of {axes} axes'}, {list(stored.shape)}, "
        f"but '{places[0].parameter.name}' is {list(sizes)}",
        file=stored.path,
        tensor=stored.name,
        hint="a linear layer has factors of two dimensions" if linear else "is this the base it was trained on?",
    )


def has_rows_to_resize(parameter: Parameter, component: Component) -> bool:
    """Whether a copy of the parameter may have another number of rows: a row for each token, or for each label.

    Of a base whose configuration does not say what it is, every matrix outside of its layers may be such a table.
    """
    storage, config = parameter.storage, component.config
    if storage.elements is None or len(storage.sizes) != 2:
        return False
    if parameter.name in (component.embedding, component.head):
        return True
    if any(segment.isdigit() for segment in parameter.name.split(".")):
        return False
    if not config.get("model_type"):
        return True
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    counts = [part[key] for part in parts for key in part if key.startswith("vocab_size") or key == "num_labels"]
    labels = config.get("id2label")
    counts.append(len(labels) if isinstance(labels, Mapping) else 2)  # transformers' default
    return storage.sizes[0] in counts


def disagreements(adapter: Adapter, checkpoint: Checkpoint, edits: Sequence[Edit]) -> tuple[str, ...]:
    """What an adapter's configuration says of its base, and the base does not bear out.

    Args:
        adapter: The adapter.
        checkpoint: Its base.
        edits: Those that it has a part in.
    """
    names = {edit.component for edit in edits}
    known = [name for owner in names for name in checkpoint.components[owner].parameters]
    found = adapter.unmet(known, {edit.name for edit in edits})
    turned = {
        operation.view.transposed
        for edit in edits
        for operation in edit.operations
        if operation.site.module_kind in ("", "linear") and not is_row_setting(operation.update)
    }
    if adapter.stored_transposed and turned == {False}:
        found += ("fan_in_fan_out is true, but the base stores linear layers as (out, in): taken as such",)
    return found + _silent_biases(checkpoint, edits) + _unheard_types(adapter, checkpoint, names)


def _unheard_types(adapter: Adapter, checkpoint: Checkpoint, components: Iterable[str]) -> tuple[str, ...]:
    """Token types that the adapter was trained without: PEFT's model for questions hands none on (0.21.2, `findings`)."""
    if adapter.format != "peft" or adapter.task != "question-answering":
        return ()
    several = [
        name
        for owner in sorted(components)
        for name, parameter in checkpoint.components[owner].parameters.items()
        if name.endswith("token_type_embeddings.weight") and parameter.storage.sizes[0] > 1
    ]
    return tuple(
        f"PEFT trains question answering with token type 0 alone, and '{name}' has more: give zeros as token_type_ids"
        for name in several
    )


def _silent_biases(checkpoint: Checkpoint, edits: Sequence[Edit]) -> tuple[str, ...]:
    """Biases of tied heads that PEFT's model did without: its head of trained token rows multiplies and adds nothing."""
    found: list[str] = []
    for edit in edits:
        component = checkpoint.components[edit.component]
        trains_rows = any(is_row_setting(operation.update) for operation in edit.operations)
        if component.tied and edit.name == component.embedding and trains_rows:
            bias = component.head.removesuffix("weight") + "bias"
            bias = component.aliases.get(bias, bias)
            if bias in component.parameters:
                found.append(
                    f"PEFT trains token rows without '{bias}', which the merged model has: logits differ by it"
                )
    return tuple(found)


def check_overlap(name: str, operations: Sequence[Operation], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse two updates of one adapter for the same rows: adding both would apply one trained update twice."""
    for position, second in enumerate(operations):
        for first in operations[:position]:
            if second.adapter == first.adapter and second.site != first.site and intersect(first.view, second.view):
                raise FitError(
                    f"'{second.site}' and '{first.site}' are the same weight of the base",
                    file=adapters[second.adapter][0].path,
                    tensor=name,
                )


def check_family(name: str, storage: Storage, component: Component) -> None:
    """Refuse an embedding of an unknown family: it may be tied to a head whose name is not known."""
    config = component.config
    text = config.get("text_config")
    vocabulary = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    if component.family.known or not config.get("model_type") or config.get("tie_word_embeddings") is False:
        return
    if len(storage.sizes) == 2 and storage.sizes[0] == vocabulary:
        raise FitError(
            f"models of type '{show(config['model_type'])}' are not known: "
            "whether this weight is tied to another cannot be told",
            tensor=name,
            hint="keep the adapter unmerged, or set tie_word_embeddings to false in the base's config.json "
            "if it is not tied",
        )


def check_missing(missing: Sequence[Site], adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter with updates of parameters that the base lacks; the error lists them, equal layers once."""
    if not missing:
        return
    absent = sorted({site.component for site in missing if checkpoint.names_of(site.component) is None})
    site = missing[0]
    tensor = adapter.updates[site][0].tensors[0]
    lacking = listing(summed_up(map(str, missing)), _LISTED)
    if absent:
        raise FitError(
            f"the adapter changes {listing(absent)}, the base has {listing(sorted(_networks(checkpoint)))}: "
            f"{len(missing)} of {len(adapter.updates)} parameters are not there: {lacking}",
            file=adapter.path,
            hint=f"to use the rest, {_leaving_out(*map(_all_of, absent))}"
            if len(missing) < len(adapter.updates)
            else "is this the base it was trained on?",
        )
    owner = component_of(site, checkpoint)
    owner.check_read()  # a name that is near it is one of its codes
    names = checkpoint.names_of(site.component)
    parameters = names.parameters if names is not None else owner.parameters
    module, _, leaf = site.path.rpartition(".")
    if leaf == "bias" and f"{module}.weight" in parameters:
        raise FitError(
            f"the base has no parameter '{site}': attached, PEFT gives the layer a bias",
            file=tensor.path,
            tensor=tensor.name,
            hint="keep the adapter beside the base, in PEFT: a merged model has no place for the bias",
        )
    others = f": {lacking}" if len(missing) > 1 else ""
    misspelt = len(missing) in (1, len(adapter.updates))  # where some fit, the names are right and the base is another
    known = (
        parameters if len(missing) == 1 else [name for name in parameters if _module_of(name) == _module_of(site.path)]
    )
    rest = f" to use the rest, {_leaving_out('PATTERN')}" if len(missing) < len(adapter.updates) else ""
    if adapter.shares_factors(site):
        raise FitError(
            "is of a packed slot: several weights share the factors",
            file=tensor.path,
            tensor=tensor.name,
            hint="use the adapter that it was made from",
        )
    raise FitError(
        f"the base has no parameter '{site}' ({len(missing)} of {len(adapter.updates)} do not fit{others})",
        file=tensor.path,
        tensor=tensor.name,
        hint=(misspelt and closest(site.path, known)) or f"is this the base it was trained on?{rest}",
    )


def _module_of(name: str) -> list[str]:
    """A parameter and the last module on its path: these are the same where only what stands before is misspelt."""
    return name.split(".")[-2:]


def _leaving_out(*patterns: str) -> str:
    """Said of the commands that can: others that meet a base (resize, check, export-onnx) cannot leave modules out."""
    return "merge, convert or combine without them: " + " ".join(f'`without="{pattern}"`' for pattern in patterns)


def _all_of(component: str) -> str:
    return f"{show(component)}:*"


def _networks(checkpoint: Checkpoint) -> Iterator[str]:
    for name, component in checkpoint.components.items():
        yield from (component.parts or (name or "one model",))
