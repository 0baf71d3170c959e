# SPDX-License-Identifier: Apache-2.0
"""The values that an adapter was trained on: a quantised base's, in the names, types and files of its release.

An adapter trained on a base in 4 bits learnt beside the error of that rounding. Added to the release it meets other
weights than it was trained on; added to what the codes stand for it does what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.engine.inputs import CheckpointLike, as_checkpoint
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.families.family import role_of
from surgery_formats.models.identity import fingerprint
from surgery_formats.storage.aligned import oriented
from surgery_formats.storage.base import Storage, is_stacked
from surgery_formats.storage.bitsandbytes.rounded import RULES, Rounded
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.storage.quantised import is_coded

__all__ = [
    "RULES",
    "TrainedValues",
    "quantised_model",
    "rounded_weights",
    "rule_values",
    "trained_values",
    "values_of",
    "with_trained_values",
]

_NOT_ROUNDED = ("embedding", "head", "norm")
_HEADS = ("score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class TrainedValues:
    """Another base's values for weights of a release.

    Attributes:
        name: The rule, or the folder, as the user gave it.
        weights: By ``(component, name in the release)``, each with the rows and columns of the release's weight.
        quantised: How many of them were quantised.
        kinds: In which formats.
        files: Opened, and only read.
        root: The folder, if it is one.
        checkpoint: What was opened there.
    """

    name: str
    weights: Mapping[tuple[str, str], Storage]
    quantised: int
    kinds: tuple[str, ...]
    files: tuple[File, ...] = ()
    root: Path | None = None
    checkpoint: Checkpoint | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest; what identifies them, not by path."""
        files = sorted(fingerprint(file) for file in self.files)
        source = {"rule": self.name} if self.root is None else {"files": files}
        return {**source, "quantised": self.quantised, "kinds": list(self.kinds), "said": self.said}

    @property
    def said(self) -> str:
        """In one line, for people."""
        if self.root is None:
            return (
                f"{self.quantised} weights have the values that {self.name} gives them: every matrix of a linear layer but "
                "those of heads, as bitsandbytes loads a model"
            )
        return f"{self.quantised} weights have the values that {', '.join(self.kinds)} gives them"


def trained_values(value: CheckpointLike, base: Checkpoint) -> TrainedValues:
    """What `value` names: a rule of bitsandbytes, or a quantised model that was made of `base`.

    A local file or folder wins over a rule of its name.

    Raises:
        FitError: the base is quantised itself; nothing of the model is, or it has other weights than the base.
        InputError, UsageError: see `as_checkpoint`.
    """
    for component in base.components.values():
        if quantised := [parameter for parameter in component.parameters.values() if is_coded(parameter.storage)]:
            raise FitError(
                f"is stored as {quantised[0].storage.kind}: its values are those that an adapter of it was trained on",
                file=quantised[0].sources[0].path,
                tensor=quantised[0].name,
                hint="merge into it as it is; `as_trained=` is for the release that it was made of",
            )
    if isinstance(value, str) and value in RULES and not Path(value).exists():
        return rule_values(value, base)
    other = quantised_model(value, "as_trained")
    values = values_of(other, base)
    if not values.quantised:
        raise FitError(
            "is not quantised: an adapter that was trained on it is merged into it",
            file=other.path,
            hint="give it as the base",
        )
    return values


def quantised_model(value: CheckpointLike, argument: str) -> Checkpoint:
    """The model that `value` is or names, where it could have been the name of a rule."""
    try:
        return as_checkpoint(value, argument)
    except NotFoundError as error:
        rules = f"a model's folder, or one of {', '.join(RULES)}"
        raise NotFoundError(error.message, file=error.file, hint=error.hint or rules) from None


def rule_values(rule: str, base: Checkpoint) -> TrainedValues:
    """What a rule of bitsandbytes makes of the weights of `base`."""
    weights: dict[tuple[str, str], Storage] = {
        (component.name, weight.name): Rounded(weight.storage, rule)
        for component in base.components.values()
        for weight in rounded_weights(component)
    }
    return TrainedValues(rule, weights, len(weights), (rule.partition("-")[0].upper(),))


def rounded_weights(component: Component) -> tuple[Parameter, ...]:
    """The weights that bitsandbytes makes codes of when it loads a model: of linear layers, but not of heads."""
    apart = {component.embedding, component.head, *component.aliases}
    return tuple(
        weight
        for name, weight in component.parameters.items()
        if name.endswith(".weight")
        and len(weight.sizes) == 2
        and weight.storage.is_float
        and name not in apart
        and role_of(name) not in _NOT_ROUNDED
        and name.split(".")[-2] not in _HEADS
    )


def values_of(other: Checkpoint, base: Checkpoint) -> TrainedValues:
    """The values of another model, quantised or not, for the weights of `base`.

    Raises:
        FitError: it lacks one of them, or has it in another shape.
    """
    weights: dict[tuple[str, str], Storage] = {}
    kinds: dict[str, int] = {}
    for component in base.components.values():
        theirs = other.component(component.name)
        if theirs is None:
            raise FitError(f"has no component '{component.name}'", file=other.path)
        theirs.check_read()
        for name, weight in component.parameters.items():
            if not weight.storage.is_float or name in component.aliases:
                continue
            storage = _counterpart(name, weight, theirs)
            if is_coded(storage):
                kinds[storage.kind] = kinds.get(storage.kind, 0) + 1
            weights[component.name, name] = oriented(storage, weight.storage)
    files = tuple(shard.file for component in other.components.values() for shard in component.shards)
    return TrainedValues(str(other.path), weights, sum(kinds.values()), tuple(sorted(kinds)), files, other.path, other)


def _counterpart(name: str, weight: Parameter, theirs: Component) -> Storage:
    found = theirs.parameters.get(name) or theirs.parameters.get(theirs.aliases.get(name, ""))
    if found is None and len(places := theirs.names.resolve(name)) == 1:
        found = theirs.parameters.get(places[0].parameter.name)
    if found is None:
        raise FitError("the model it was trained on has no such weight", file=theirs.folder, tensor=name)
    if found.sizes != weight.sizes:
        raise FitError(
            f"is {list(found.sizes)} in the model it was trained on, {list(weight.sizes)} in the base",
            file=theirs.folder,
            tensor=name,
        )
    elements = found.storage.elements
    if elements is None:
        return found.storage
    return Plain.of(elements, stacked=is_stacked(weight.storage))  # under the release's name, wherever it was


def with_trained_values(binding: Binding, values: TrainedValues) -> Binding:
    """The binding with `values` in place of the base's, under every update and where there is none."""
    edits = dict(binding.edits)
    for (component, name), storage in values.weights.items():
        edit = edits.get((component, name))
        why = f"as trained: {storage.kind}" if is_coded(storage) else ""
        if edit is None:
            edits[component, name] = Edit(component, name, storage, (), why=why)
        elif edit.replaced is None and not edit.added:
            edits[component, name] = replace(edit, source=storage, why=edit.why or why)
    return replace(binding, edits=edits)
