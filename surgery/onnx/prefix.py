# SPDX-License-Identifier: Apache-2.0
"""Soft prompts as keys and values that every sequence stands on: no virtual token is ever computed again.

Prefix tuning (arXiv:2101.00190) trained just those. Prompt tuning (arXiv:2104.08691) and P-tuning (arXiv:2103.10385) trained embeddings;
what the model makes of them is computed here once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from surgery.onnx.swap import as_numpy
from surgery_formats.adapter import Adapter
from surgery_formats.checkpoint import Component
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.families.recipe import Model

if TYPE_CHECKING:
    import numpy as np
    import torch

    from surgery.plan import Plan

__all__ = ["prompt_past"]


def prompt_past(
    adapter: Adapter, component: Component, model: Model, io: DType, merged: Plan | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Defaults of a graph's past inputs, each ``(1, kv_heads, tokens, head_dim)``.

    Args:
        adapter: With a soft prompt.
        component: Of the base.
        model: Its recipe's record.
        io: Type of the cache.
        merged: What other adapters make of the base; None for none.

    Raises:
        FitError: no soft prompt, or one for a model of other sizes.
    """
    prompt = adapter.prompt
    if prompt is None:
        raise FitError(
            "is no soft prompt, so it cannot stand in front of the input", file=adapter.path, hint="--merge it"
        )
    if model.kind != "decoder" or prompt.submodules != 1:
        raise FitError("a soft prompt needs a decoder with a cache", file=adapter.path)
    if prompt.prefix is None:
        pairs = _computed(adapter, component, model, merged)
    else:
        first = model.layers[0].attention
        sizes = (prompt.prefix.layers, prompt.prefix.kv_heads, prompt.prefix.head_dim)
        wanted = (len(model.layers), first.kv_heads, first.head_dim)
        if sizes != wanted:
            raise FitError(
                f"was trained for {sizes} layers, key heads and values per head, the model has {wanted}",
                file=adapter.path,
                tensor=prompt.table.name,
            )
        pairs = [(key[None], value[None]) for key, value in map(prompt.key_values, range(len(model.layers)))]
    return {
        f"past_key_values.{layer}.{part}": as_numpy(values, io)
        for layer, pair in enumerate(pairs)
        for part, values in zip(("key", "value"), pair, strict=True)
    }


def _computed(
    adapter: Adapter, component: Component, model: Model, merged: Plan | None
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    from surgery.reference import open_reference, prompt_cache

    assert adapter.prompt is not None
    embeddings = adapter.prompt.embeddings()
    if embeddings.shape[1] != model.hidden:
        raise FitError(
            f"has embeddings of {embeddings.shape[1]} numbers, the model {model.hidden}",
            file=adapter.path,
            tensor=adapter.prompt.table.name,
        )
    return prompt_cache(open_reference(component, merged), embeddings).layers
