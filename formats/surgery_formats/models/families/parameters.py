# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a recipe, and from a recipe to the tensors it takes."""

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
from surgery_formats.text import show

__all__ = ["model_of", "parameters"]


def model_of(config: Mapping[str, Any], names: Collection[str]) -> Model:
    """What the model of this config.json computes.

    Args:
        config: config.json.
        names: Tensors of the checkpoint.

    Raises:
        FitError: no recipe for this ``model_type``, or a setting that it does not know.
    """
    family = family_of(config)
    if family.recipe is None:
        if config.get("model_type") is None:
            raise FitError(
                "missing, or without a model_type: nothing says what the model computes",
                file="config.json",
                hint="put the model's config.json beside its weights",
            )
        known = sorted({name for one in FAMILIES if one.recipe for name in one.names})
        raise FitError(
            f"no recipe for model_type '{show(config.get('model_type'), 40)}'",
            file="config.json",
            hint=f"known are {', '.join(known)}",
        )
    return family.recipe(config, names)


def parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and stored shape of every tensor the model takes; rows of tables that config.json does not count are -1.

    A tied head is the embedding, so it is there once.
    """
    embedding = model.embedding
    width = embedding.projection.inputs if embedding.projection else model.hidden
    found: dict[str, tuple[int, ...]] = {embedding.tokens: (model.vocabulary, width)}
    for table in (embedding.positions, embedding.types):
        if table:
            found[table] = (-1, model.hidden)
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
        found |= dict(part)
    return found


def _projection(one: Projection | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    if one is not None:
        yield one.weight, (one.inputs, one.outputs) if one.transposed else (one.outputs, one.inputs)
        if one.bias:
            yield one.bias, (one.outputs,)


def _norm(one: Norm | None, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if one is not None:
        yield from ((name, (width,)) for name in (one.weight, one.bias) if name)


def _branch(one: Branch, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm in (one.before, one.after, one.on_sum):
        yield from _norm(norm, width)


def _layer(layer: Layer, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _branch(layer.attention_branch, width)
    yield from _attention(layer.attention)
    yield from _branch(layer.mlp_branch, width)
    for one in (*layer.mlp.inputs, layer.mlp.output):
        yield from _projection(one)


def _attention(one: Attention) -> Iterator[tuple[str, tuple[int, ...]]]:
    for projection in (*one.inputs, one.output):
        yield from _projection(projection)
    for norm, heads in ((one.q_norm, one.heads), (one.k_norm, one.kv_heads)):
        if one.norm_over == "heads" and norm is not None:
            for head in range(heads):
                yield from ((name.format(h=head), (one.head_dim,)) for name in (norm.weight, norm.bias) if name)
        else:
            yield from _norm(norm, one.head_dim * (heads if one.norm_over == "width" else 1))
