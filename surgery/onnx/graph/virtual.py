# SPDX-License-Identifier: Apache-2.0
"""Soft prompts inside a graph: as the default of its past, as rows behind its vocabulary, or in front of an encoder's tokens.

Virtual tokens of a decoder cost nothing if their keys and values are there already: they are the default of the past inputs, which a
caller simply leaves out of its first call. `completed_mask` lets such a caller know nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import PAD_SWITCH
from surgery.onnx.graph.graph import Graph
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Embedding, Model

__all__ = ["Virtual", "completed_mask", "front_model", "in_front", "rows_behind", "types_in_front"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Virtual:
    """What a graph holds of soft prompts.

    Attributes:
        past: ``past_key_values.N.key|value`` -> ``(1, kv_heads, tokens, head_dim)``, defaults of those inputs; empty for none. Arrays of
            no tokens make the inputs optional without a prompt.
        rows: ``(n, width)`` float32 rows behind the vocabulary, or None.
        front: How many of the rows stand in front of every text (encoders).
        embedded: The graph takes ``inputs_embeds (B, S, width)`` instead of ids: what computes the keys and values of embeddings.
    """

    past: Mapping[str, Array] = field(default_factory=dict)
    rows: Array | None = None
    front: int = 0
    embedded: bool = False


def completed_mask(graph: Graph, ids: str, mask: str, past: str) -> str:
    """`mask` with ones in front for those past tokens that it does not cover.

    A caller who knows of no virtual tokens gives a mask ``(B, T)`` of its own. Where past and present share one buffer, the length of past
    says nothing: there the caller counts virtual tokens itself and feeds the switch, whose length alone is read (its value would have to be
    brought from the device), as an empty vector.
    """
    switch = graph.input(PAD_SWITCH, DType.I64, ("pad",))
    graph.initializer(PAD_SWITCH, np.zeros(1, np.int64))
    before = graph.node("Shape", [past], "", start=2, end=3)
    new = graph.node("Shape", [ids], "", start=1, end=2)
    covered = graph.node("Shape", [mask], "", start=1, end=2)
    missing = graph.node("Sub", [graph.node("Add", [before, new], ""), covered], "")
    missing = graph.node("Max", [missing, graph.ints(0)], "")
    missing = graph.node("Mul", [missing, graph.node("Shape", [switch], "")], "")
    return _before(graph, 1, missing, mask)


def _before(graph: Graph, value: int, count: str, rows: str) -> str:
    """`rows` (B, S) int64 with `count` (a vector of one) times `value` in front."""
    batch = graph.node("Shape", [rows], "", start=0, end=1)
    shape = graph.node("Concat", [batch, count], "", axis=0)
    filled = graph.node("Expand", [graph.constant(np.full((1, 1), value, np.int64)), shape], "")
    return graph.node("Concat", [filled, rows], "", axis=1)


def rows_behind(graph: Graph, x: str, ids: str, vocabulary: int, rows: Array, io: DType, at: str) -> str:
    """`x`, what the table has for `ids`, where they are of the vocabulary; `rows` for those behind it."""
    beyond = graph.node("Sub", [ids, graph.number(vocabulary, DType.I64)], at)
    soft = graph.node("Max", [beyond, graph.number(0, DType.I64)], at)
    held = graph.constant(rows.astype(graph.numpy_type(io)), "soft_prompt")
    is_known = graph.node(
        "Unsqueeze", [graph.node("Less", [beyond, graph.number(0, DType.I64)], at), graph.ints(-1)], at
    )
    return graph.node("Where", [is_known, x, graph.node("Gather", [held, soft], at, axis=0)], at)


def in_front(graph: Graph, ids: str, mask: str, vocabulary: int, count: int) -> tuple[str, str]:
    """`ids` and `mask` (B, S) of an encoder with `count` virtual tokens, ``V ... V + count - 1``, in front of every row."""
    batch = graph.node("Shape", [ids], "", start=0, end=1)
    shape = graph.node("Concat", [batch, graph.ints(count)], "", axis=0)
    virtual = graph.constant(vocabulary + np.arange(count, dtype=np.int64)[None])
    whole = graph.node("Concat", [graph.node("Expand", [virtual, shape], ""), ids], "", axis=1)
    return whole, _before(graph, 1, graph.ints(count), mask)


def types_in_front(graph: Graph, types: str, count: int) -> str:
    """Token types with those of virtual tokens, which are 0 (PEFT), in front."""
    return _before(graph, 0, graph.ints(count), types)


def front_model(model: Model) -> Model:
    """The recipe of an encoder that is given embeddings: positions go by place, padding or not (transformers' RoBERTa)."""
    record: Embedding = model.embedding
    return replace(model, embedding=replace(record, position_rule="absolute")) if record.positions else model
