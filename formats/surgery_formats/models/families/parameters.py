# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a recipe, and from a recipe to the tensors it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import (
    Attention,
    Branch,
    ClassifierHead,
    HiddenHead,
    Layer,
    Model,
    Norm,
    Projection,
)
from surgery_formats.models.families.registry import FAMILIES, family_of
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.text import show

__all__ = ["model_of", "parameters"]


def model_of(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """Return what the model of a config.json computes.

    Args:
        config: config.json.
        names: Tensor names of the checkpoint.

    Raises:
        FitError: there is no recipe for this ``model_type``, or it does not support a setting.
    """
    family = family_of(config)
    if family.recipe is None:
        if config.get("model_type") is None:
            raise FitError(
                "missing, or without a model_type, so the model's computation is unknown",
                file="config.json",
                hint="put the model's config.json beside its weights",
            )
        known = sorted({name for known_family in FAMILIES if known_family.recipe for name in known_family.names})
        raise FitError(
            f"no recipe for model_type '{show(config.get('model_type'), 40)}'",
            file="config.json",
            hint=f"supported are {', '.join(known)}",
        )
    return family.recipe(ModelSettings(config, names))


def parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Return name and stored shape of every tensor the model needs; -1 rows for tables without a size in config.json.

    A tied head is listed once, as the embedding.
    """
    embedding = model.embedding
    width = embedding.projection.inputs if embedding.projection else model.hidden
    shapes: dict[str, tuple[int, ...]] = {embedding.tokens: (model.vocabulary, width)}
    for table in (embedding.positions, embedding.types):
        if table:
            shapes[table] = (-1, model.hidden)
    parts: list[Iterator[tuple[str, tuple[int, ...]]]] = [
        _projection(embedding.projection),
        _norm(embedding.norm, model.hidden),
        _norm(model.final_norm, model.hidden),
        *(_layer(layer, model.hidden) for layer in model.layers),
    ]
    head = model.head
    if isinstance(head, ClassifierHead):
        parts += [_projection(step) for step, _ in head.steps]
    elif isinstance(head, HiddenHead):
        parts.append(_projection(head.pooler))
    else:
        parts += [_projection(head.before), _projection(head.projection)]
    for part in parts:
        shapes |= dict(part)
    return shapes


def _projection(projection: Projection | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    if projection is not None:
        shape = projection.outputs, projection.inputs
        yield projection.weight, shape[::-1] if projection.transposed else shape
        if projection.bias:
            yield projection.bias, (projection.outputs,)


def _norm(norm: Norm | None, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if norm is not None:
        yield from ((name, (width,)) for name in (norm.weight, norm.bias) if name)


def _branch(branch: Branch, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm in (branch.before, branch.after, branch.on_sum):
        yield from _norm(norm, width)


def _layer(layer: Layer, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _branch(layer.attention_branch, width)
    yield from _attention(layer.attention)
    yield from _branch(layer.mlp_branch, width)
    for projection in (*layer.mlp.inputs, layer.mlp.output):
        yield from _projection(projection)


def _attention(attention: Attention) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection in (*attention.inputs, attention.output):
        yield from _projection(projection)
    for norm, heads in ((attention.q_norm, attention.heads), (attention.k_norm, attention.kv_heads)):
        if attention.norm_over == "heads" and norm is not None:
            for head in range(heads):
                yield from ((name.format(h=head), (attention.head_dim,)) for name in (norm.weight, norm.bias) if name)
        else:
            yield from _norm(norm, attention.head_dim * (heads if attention.norm_over == "width" else 1))
