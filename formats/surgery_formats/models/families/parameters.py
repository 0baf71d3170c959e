# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a recipe, and from a recipe to the tensors it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import (
    MLP,
    ClassifierHead,
    Experts,
    HiddenHead,
    LanguageHead,
    Model,
    Norm,
    PooledHead,
    Projection,
    SpanHead,
)
from surgery_formats.models.families.recipe_sentence import DenseStep, SentenceHead
from surgery_formats.models.families.registry import families, family_of
from surgery_formats.models.families.settings import ModelSettings
from surgery_formats.models.families.tasks import task_of
from surgery_formats.text import show

__all__ = ["model_of", "parameters", "projections"]

_XIELU = ("alpha_p", "alpha_n", "beta", "eps")


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


def parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Return name and stored shape of every tensor the model needs; -1 rows for tables without a size in config.json.

    A tied head is listed once, as the embedding.
    """
    embedding, head = model.embedding, model.head
    token_width, row_width, norm_width = model.embedded
    shapes: dict[str, tuple[int, ...]] = {} if model.encoder is None else parameters(model.encoder)
    if embedding.tokens:
        shapes[embedding.tokens] = model.vocabulary, token_width
    for step in embedding.stem.convolutions if embedding.stem else ():
        shapes |= {step.weight: (step.outputs, step.inputs, step.kernel), step.bias: (step.outputs,)}
    if embedding.patches is not None:
        shapes |= embedding.patches.shapes(model.hidden)
    shapes |= {table: (-1, row_width) for table in (embedding.positions, embedding.types) if table}

    def project(*projections: Projection | None) -> None:
        for each in filter(None, projections):
            shape = (each.outputs, each.inputs)[:: -1 if each.transposed else 1]
            count = each.stack[1:] if each.stack else ()
            shapes[each.weight] = (*count, *shape)
            if each.bias:
                shapes[each.bias] = (*count, each.outputs)

    def transform(*parts: MLP | Experts | None) -> None:
        for part in parts:
            if part is None:
                continue
            if isinstance(part, MLP):
                project(*part.inputs, part.output)
                if part.shape:
                    numbers = {name: (1,) if name.startswith("alpha") else () for name in _XIELU}
                    shapes.update((f"{part.shape}.{name}", shape) for name, shape in numbers.items())
                continue
            project(part.router, part.shared_gate)
            transform(*part.experts, part.shared)
            if part.correction:
                shapes[part.correction] = (*((1,) if part.correction_row else ()), len(part.experts))

    def normalise(width: int, *norms: Norm | None) -> None:
        for each in filter(None, norms):
            shapes.update((name, (width,)) for name in (each.weight, each.bias) if name)

    project(embedding.projection, *((*model.altup.begins, *model.altup.ends) if model.altup else ()))
    if (by_layer := embedding.per_layer) is not None:
        shapes[by_layer.table] = by_layer.rows, by_layer.projection.outputs
        project(by_layer.projection)
        normalise(by_layer.width, by_layer.norm)
    normalise(norm_width, embedding.norm)
    normalise(model.hidden, model.final_norm)
    for layer in model.layers:
        attend, mlp = layer.attention, layer.mlp
        for branch in (layer.attention_branch, layer.mlp_branch, *((layer.cross.branch,) if layer.cross else ())):
            normalise(model.hidden, branch.before, branch.after, branch.on_sum)
            if branch.gains:
                shapes[branch.gains] = (model.hidden,)
        project(*attend.inputs, attend.output)
        transform(mlp)
        if (streams := layer.altup) is not None:
            project(streams.router, streams.predict, streams.correct, streams.laurel.first, streams.laurel.second)
            project(streams.input.gate, streams.input.projection)
            normalise(model.hidden, streams.norm, streams.laurel.norm, streams.input.norm)
            shapes |= {streams.gains: (model.hidden,)} if streams.gains else {}
        if layer.cross is not None:
            project(*layer.cross.attention.inputs, layer.cross.attention.output)
        if attend.bias is not None:
            shapes[attend.bias.table] = attend.bias.buckets, attend.heads
        shapes |= {name: (attend.heads * attend.head_dim,) for name in (attend.q_bias, attend.v_bias) if name}
        if (distances := attend.disentangled) is not None:
            shapes[distances.table] = 2 * distances.span, model.hidden
            normalise(model.hidden, distances.norm)
            project(distances.keys, distances.queries)
        if attend.convolution is not None:
            shapes[attend.convolution.weight] = (attend.output.inputs, 1, attend.convolution.kernel)
        if attend.sinks:
            shapes[attend.sinks] = (attend.heads,)
        if (latent := attend.latent) is not None:
            project(latent.key_value, latent.query)
            normalise(latent.key_value.inputs, latent.norm)
            normalise(latent.query.inputs if latent.query else 0, latent.query_norm)
        for norm, heads in ((attend.q_norm, attend.heads), (attend.k_norm, attend.kv_heads)):
            if norm is not None and attend.norm_over == "heads" and "{h}" not in norm.weight:
                shapes.update((name, (heads, attend.head_dim)) for name in (norm.weight, norm.bias) if name)
            elif norm is not None and attend.norm_over == "heads":
                own = (replace(norm, weight=norm.weight.format(h=h), bias=norm.bias.format(h=h)) for h in range(heads))
                normalise(attend.head_dim, *own)
            else:
                normalise(attend.head_dim * (heads if attend.norm_over == "width" else 1), norm)
    if (added := model.convolution) is not None:
        shapes[added.weight] = model.hidden, model.hidden // added.groups, added.width
        shapes[added.bias] = (model.hidden,)
        normalise(model.hidden, added.norm)
    if isinstance(head, ClassifierHead):
        project(*(step for step, _ in head.steps))
        normalise(head.steps[-1][0].inputs, head.norm)
    elif isinstance(head, HiddenHead):
        project(head.pooler)
    elif isinstance(head, PooledHead):
        project(head.projection)
        normalise(model.hidden, head.norm)
        if head.probe is not None:
            shapes[head.probe.query] = 1, 1, model.hidden
            project(head.probe.inputs, head.probe.output)
            normalise(model.hidden, head.probe.norm)
            transform(head.probe.mlp)
    elif isinstance(head, SentenceHead):
        project(*(step.projection for step in head.steps if isinstance(step, DenseStep)))
    else:
        project(head.projection)
    if isinstance(head, SpanHead):
        project(head.before[0] if head.before else None)
        normalise(head.projection.inputs, head.norm)
    if isinstance(head, LanguageHead):
        project(head.before)
        normalise(head.projection.inputs, head.norm)
        if head.bias:
            shapes[head.bias] = 1, head.projection.outputs
    return shapes


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
