# SPDX-License-Identifier: Apache-2.0
"""Soft prompts, and texts read in advance, in the form that a graph holds: keys and values, or rows.

Keys and values of embeddings are computed by the graph itself: it is built once more over the same weights, in float32
for the CPU and with embeddings instead of ids as input, and run once. Those of prefix tuning are stored as in the cache
(`SoftPrompt.key_values`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS, twin
from surgery.onnx.graph.virtual_tokens import Virtual, key_name
from surgery.onnx.run.ports import cpu_session
from surgery_formats.binding.prompt_fit import check_prompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MissingPackageError
from surgery_formats.models.component import Component
from surgery_formats.models.families.recipe import Model
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

    from surgery_formats.canonical.adapter import Adapter

__all__ = [
    "Prompt",
    "WeightLocation",
    "computed_past",
    "empty_past",
    "layer_keys",
    "of_adapter",
    "stored_past",
    "unique",
]

Array = npt.NDArray[Any]
Past = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        name: From its file.
        kind: PEFT's name, or ``TEXT``.
        tokens: Number of virtual tokens.
        adapter: The adapter it comes from, or None for a text.
        embeddings: ``(tokens, width)`` float32, or None.
        ids: Token ids of a text, or empty.
    """

    name: str
    kind: str
    tokens: int
    adapter: Adapter | None = None
    embeddings: Array | None = None
    ids: tuple[int, ...] = ()


def of_adapter(name: str, adapter: Adapter, model: Model) -> Prompt:
    """Read the soft prompt of an adapter.

    Raises:
        FitError: it has none, or one for a model of other sizes.
    """
    prompt = adapter.prompt
    if any(layer.attention.convolution is not None for layer in model.layers):
        raise FitError("a model with short convolutions takes no virtual tokens", file=adapter.path)
    if model.altup is not None:
        raise FitError("a model with an embedding for each layer takes no virtual tokens", file=adapter.path)
    if prompt is None:
        raise FitError(f"{adapter.kind} has no virtual tokens", file=adapter.path, hint="`merge=` or `swap=`")
    check_prompt(prompt, model, encoders=True)
    if prompt.prefix is not None:
        return Prompt(name, prompt.kind, prompt.virtual_tokens, adapter)
    rows = prompt.embeddings().astype(np.float32)
    return Prompt(name, prompt.kind, prompt.virtual_tokens, adapter, rows)


def stored_past(prompt: Prompt, layers: int) -> Past:
    """Keys and values of prefix tuning, float32."""
    assert prompt.adapter is not None
    assert prompt.adapter.prompt is not None
    past: Past = {}
    for layer in range(layers):
        for part, values in zip(("key", "value"), prompt.adapter.prompt.key_values(layer), strict=True):
            past[f"past_key_values.{layer}.{part}"] = np.ascontiguousarray(values[None], np.float32)
    return past


def layer_keys(prompt: Prompt, layers: int) -> Past:
    """Keys and values of prefix tuning as an encoder's graph holds them, ``(1, tokens, width)`` float32."""
    past = stored_past(prompt, layers)
    return {
        key_name(layer, part): past[f"past_key_values.{layer}.{part}"]
        .transpose(0, 2, 1, 3)
        .reshape(1, prompt.tokens, -1)
        for layer in range(layers)
        for part in ("key", "value")
    }


def empty_past(model: Model) -> Past:
    """A past without tokens."""
    return {
        f"past_key_values.{number}.{part}": np.zeros((1, layer.attention.kv_heads, 0, layer.attention.head_dim), "f4")
        for number, layer in enumerate(model.caching)
        for part in ("key", "value")
    }


@dataclass(frozen=True, slots=True)
class WeightLocation:
    """Where the weights of a graph lie during the export.

    Attributes:
        folder: Folder of the weight files.
        below: Folder in it with the files just written, or empty.
        written: Names of those files.
        names: Paths of weight files that have another name there.
    """

    folder: Path
    below: str = ""
    written: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)

    def location(self, name: str) -> str:
        """Path of a weight file relative to `folder`."""
        name = self.names.get(name, name)
        return f"{self.below}/{name}" if self.below and name in self.written else name


def computed_past(
    prompts: Sequence[Prompt], component: Component, model: Model, options: GraphOptions, location: WeightLocation
) -> list[Past]:
    """Compute keys and values, float32, of embeddings and texts; each of the two kinds has a graph of its own.

    Weights that override those of the checkpoint have been written already, to `location`.

    Raises:
        FitError: onnxruntime cannot run the graph.
    """
    sessions: dict[bool, Any] = {}
    pasts = []
    for prompt in prompts:
        embedded = prompt.embeddings is not None
        if embedded not in sessions:
            plain = replace(
                options,
                target=twin(TARGETS["cpu"]),
                io=DType.F32,
                max_length=max(p.tokens for p in prompts),  # keeps the rotary tables small
                prefill=False,
                slotted=frozenset(),
                position_ids=False,
                opset=None,
                virtual=Virtual(embedded=embedded),
            )
            graph = build(component, plain, model).graphs["model.onnx"].unpacked()
            sessions[embedded] = _session(graph, location, component)
        feed = _feed(prompt, model)
        names = [name.replace("past_key_values", "present") for name in empty_past(model)]
        try:
            values = sessions[embedded].run(names, feed)
        except Exception as error:  # onnxruntime's own types
            raise FitError(f"onnxruntime cannot run the prompt: {show(error, 500)}", file=component.folder) from error
        pasts.append(dict(zip(empty_past(model), values, strict=True)))
    return pasts


def _feed(prompt: Prompt, model: Model) -> dict[str, Array]:
    feed: dict[str, Array] = {"attention_mask": np.ones((1, prompt.tokens), np.int64), **empty_past(model)}
    if prompt.embeddings is not None:
        return feed | {"inputs_embeds": prompt.embeddings[None].astype(np.float32)}
    return feed | {"input_ids": np.array([prompt.ids], np.int64)}


def _session(graph: onnx.ModelProto, location: WeightLocation, component: Component) -> Any:
    """Open a session over the weights where they lie."""
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.location(entry.value)
    try:
        return cpu_session(graph, location.folder, held=0)  # for one run
    except MissingPackageError:
        raise
    except Exception as error:  # onnxruntime's own types
        raise FitError(f"onnxruntime cannot load it: {show(error, 500)}", file=component.folder) from error


def unique(names: Collection[str], name: str) -> str:
    """Return `name`, with a number appended if `names` contains it."""
    candidate, number = name, 1
    while candidate in names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
