# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a recipe, and from a recipe to the tensors it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.families.recipe_parts import Projection, Shapes, norm_shapes, projection_shapes
from surgery_formats.models.families.registry import families, family_of
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.models.families.tasks import task_of
from surgery_formats.text import show

__all__ = ["model_of", "parameters", "projections"]


def model_of(config: Mapping[str, Any], names: Collection[str], task: str = "") -> Model:
    """Return what the model of a config.json computes, given the checkpoint's tensor names.

    `task` is what it is to be used for, as the Hub names it; by default what it was saved for.

    Raises:
        FitError: there is no recipe for this ``model_type``, or it does not support a setting or the task.
    """
    family = family_of(config)
    if family.recipe is None:
        if config.get("model_type") is None:
            raise FitError(
                "missing, or without a model_type, so the model's computation is unknown",
                file="config.json",
                hint="put the model's config.json beside its weights",
            )
        known = sorted({name for known_family in families() if known_family.recipe for name in known_family.names})
        raise FitError(
            f"no recipe for model_type '{show(config.get('model_type'), 40)}'",
            file="config.json",
            hint=f"supported are {', '.join(known)}",
        )
    model = family.recipe(ModelSettings(config, names, task))
    if task and task_of(model) != task:
        raise FitError(
            f"the task '{show(task, 40)}' is not among those of model_type '{show(config.get('model_type'), 40)}'",
            file="config.json",
            hint=f"it is a model for {task_of(model)}",
        )
    return model


def parameters(model: Model) -> Shapes:
    """Return name and stored shape of every tensor the model needs; -1 rows for tables without a size in config.json.

    A tied head is listed once, as the embedding.
    """
    shapes = {} if model.encoder is None else parameters(model.encoder)
    shapes |= _embedding_shapes(model)
    if model.altup is not None:
        shapes |= model.altup.shapes()
    shapes |= norm_shapes(model.hidden, model.final_norm)
    for layer in model.layers:
        shapes |= layer.shapes(model.hidden)
    if model.convolution is not None:
        shapes |= model.convolution.shapes(model.hidden)
    return shapes | model.head.shapes(model.hidden)


def _embedding_shapes(model: Model) -> Shapes:
    """Tensors of the embedding, whose rows may be narrower than the model."""
    embedding = model.embedding
    token_width, row_width, norm_width = model.embedded
    shapes: Shapes = {embedding.tokens: (model.vocabulary, token_width)} if embedding.tokens else {}
    if embedding.stem is not None:
        shapes |= embedding.stem.shapes()
    if embedding.patches is not None:
        shapes |= embedding.patches.shapes(model.hidden)
    shapes |= {table: (-1, row_width) for table in (embedding.positions, embedding.types) if table}
    shapes |= projection_shapes(embedding.projection) | norm_shapes(norm_width, embedding.norm)
    return shapes | (embedding.per_layer.shapes() if embedding.per_layer else {})


def projections(part: Any) -> Iterator[Projection]:
    """All linear maps in a part of a recipe."""
    if isinstance(part, Projection):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from projections(item)
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            yield from projections(getattr(part, field.name))
