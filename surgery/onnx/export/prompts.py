# SPDX-License-Identifier: Apache-2.0
"""Soft prompts, and texts read once, as what a graph holds of them: keys and values, or rows.

Keys and values of embeddings are what the graph itself makes of them: it is built once more over the same weights, in float32 for the CPU,
taking embeddings instead of ids, and run once. Those of prefix tuning are stored as they stand in the cache (`SoftPrompt.key_values`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS, twin
from surgery.onnx.graph.virtual import Virtual
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.models.families.recipe import Model
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

    from surgery_formats.canonical.adapter import Adapter

__all__ = ["Prompt", "WeightLocation", "computed_past", "empty_past", "of_adapter", "stored_past", "unique"]

Array = npt.NDArray[Any]
Past = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, by what it is known.

    Attributes:
        name: Of its file.
        kind: PEFT's name, or ``TEXT``.
        tokens: How many.
        adapter: It comes from, or None for a text.
        embeddings: ``(tokens, width)`` float32, or None.
        ids: Of a text, or empty.
    """

    name: str
    kind: str
    tokens: int
    adapter: Adapter | None = None
    embeddings: Array | None = None
    ids: tuple[int, ...] = ()


def of_adapter(name: str, adapter: Adapter, model: Model) -> Prompt:
    """The soft prompt of an adapter.

    Raises:
        FitError: it has none, or one for a model of other sizes.
    """
    prompt = adapter.prompt
    if prompt is None:
        raise FitError(f"{adapter.kind} trains no virtual tokens", file=adapter.path, hint="--merge or --swap")
    file, tensor = prompt.table.path, prompt.table.name
    if prompt.submodules != 1:
        raise FitError("a soft prompt for an encoder and its decoder", file=file, tensor=tensor)
    if prompt.prefix is not None:
        layers = model.layers if model.kind == "decoder" else ()
        sizes = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in layers}
        found = (prompt.prefix.kv_heads, prompt.prefix.head_dim)
        if not layers:
            raise FitError("keys and values for an encoder, which has no cache", file=file, tensor=tensor)
        if prompt.prefix.layers != len(layers) or sizes != {found}:
            wanted = ", ".join(f"{heads} heads of {dim}" for heads, dim in sorted(sizes))
            raise FitError(
                f"made for {prompt.prefix.layers} layers with {found[0]} heads of {found[1]}, the model has {len(layers)} with {wanted}",
                file=file,
                tensor=tensor,
                hint="is this the base it was trained on?",
            )
        return Prompt(name, prompt.kind, prompt.virtual_tokens, adapter)
    width = model.embedding.projection.inputs if model.embedding.projection else model.hidden
    if prompt.dim != width:
        raise FitError(
            f"embeddings of {prompt.dim} values, the model's have {width}",
            file=file,
            tensor=tensor,
            hint="is this the base it was trained on?",
        )
    rows = prompt.embeddings().float().numpy()
    return Prompt(name, prompt.kind, prompt.virtual_tokens, adapter, rows)


def stored_past(prompt: Prompt, layers: int) -> Past:
    """Keys and values of prefix tuning, float32."""
    assert prompt.adapter is not None
    assert prompt.adapter.prompt is not None
    found: Past = {}
    for layer in range(layers):
        for part, values in zip(("key", "value"), prompt.adapter.prompt.key_values(layer), strict=True):
            found[f"past_key_values.{layer}.{part}"] = np.ascontiguousarray(values.float().numpy()[None])
    return found


def empty_past(model: Model) -> Past:
    """A past of no tokens: the default where none of the prompts is."""
    return {
        f"past_key_values.{number}.{part}": np.zeros((1, layer.attention.kv_heads, 0, layer.attention.head_dim), "f4")
        for number, layer in enumerate(model.layers)
        for part in ("key", "value")
    }


@dataclass(frozen=True, slots=True)
class WeightLocation:
    """Where the weights of a graph lie while it is being exported.

    Attributes:
        folder: Of the weight files.
        below: Folder in it that holds those just written, or empty.
        written: Names of those.
    """

    folder: Path
    below: str = ""
    written: frozenset[str] = frozenset()

    def location(self, name: str) -> str:
        """Path of a weight file relative to `folder`."""
        return f"{self.below}/{name}" if self.below and name in self.written else name


def computed_past(
    prompts: Sequence[Prompt], component: Component, model: Model, options: GraphOptions, place: WeightLocation
) -> list[Past]:
    """Keys and values, float32, of embeddings and texts.

    Args:
        prompts: With embeddings or ids, which go through one graph each.
        component: What the graph is built from.
        model: Its recipe.
        options: Of the export; the weights it overrides are written already.
        place: Where.

    Raises:
        FitError: onnxruntime is not installed, or cannot run the graph.
    """
    sessions: dict[bool, Any] = {}
    found = []
    for prompt in prompts:
        embedded = prompt.embeddings is not None
        if embedded not in sessions:
            plain = replace(
                options,
                target=twin(TARGETS["cpu"]),
                io=DType.F32,
                max_length=max(
                    one.tokens for one in prompts
                ),  # rotary tables are made in memory: no longer than needed
                prefill=False,
                slotted=frozenset(),
                virtual=Virtual(embedded=embedded),
            )
            graph = build(component, plain, model).graphs["model.onnx"]
            sessions[embedded] = _session(graph, place, component)
        feed = _feed(prompt, model)
        names = [name.replace("past_key_values", "present") for name in empty_past(model)]
        try:
            values = sessions[embedded].run(names, feed)
        except Exception as error:  # onnxruntime's own types
            raise FitError(f"onnxruntime cannot run the prompt: {show(error, 500)}", file=component.folder) from error
        found.append(dict(zip(empty_past(model), values, strict=True)))
    return found


def _feed(prompt: Prompt, model: Model) -> dict[str, Array]:
    feed: dict[str, Array] = {"attention_mask": np.ones((1, prompt.tokens), np.int64), **empty_past(model)}
    if prompt.embeddings is not None:
        return feed | {"inputs_embeds": prompt.embeddings[None].astype(np.float32)}
    return feed | {"input_ids": np.array([prompt.ids], np.int64)}


def _session(graph: onnx.ModelProto, place: WeightLocation, component: Component) -> Any:
    """A session over weights that lie where they are."""
    try:
        import onnxruntime
    except ImportError as error:
        raise FitError(
            "keys and values of a prompt are computed by onnxruntime",
            hint="pip install onnxruntime, or --prompt-form rows",
        ) from error
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.location(entry.value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, os.fspath(place.folder.resolve()))
    try:
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types
        raise FitError(f"onnxruntime cannot load it: {show(error, 500)}", file=component.folder) from error


def unique(names: Collection[str], wanted: str) -> str:
    """`wanted`, or with a number behind it where `names` has it already."""
    found, number = wanted, 1
    while found in names:
        number += 1
        found = f"{wanted}-{number}"
    return found
