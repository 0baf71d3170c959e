# SPDX-License-Identifier: Apache-2.0
"""Soft prompts in a graph: as the default past, as rows after the vocabulary, or in front of an encoder's tokens.

Virtual tokens of a decoder cost nothing once their keys and values are known: they are the default of the past inputs,
which the first call simply omits. With `completed_mask`, callers need not know about them.
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

__all__ = [
    "Virtual",
    "completed_mask",
    "front_model",
    "in_front",
    "key_name",
    "keys_in_front",
    "mask_in_front",
    "rows_after",
    "types_in_front",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Virtual:
    """The soft prompts of a graph.

    Attributes:
        past: ``past_key_values.N.key|value`` -> ``(1, kv_heads, tokens, head_dim)``, the defaults of those inputs;
            empty for none. Arrays without tokens make the inputs optional without a prompt.
        rows: ``(n, width)`` float32 rows after the vocabulary, or None.
        front: Number of rows in front of every text (encoders).
        keys: Keys and values in front of every layer's, by `key_name`, each ``(1, tokens, width)`` (encoders); empty for none.
        embedded: Whether the graph takes ``inputs_embeds (B, S, width)`` instead of ids, to compute the keys and values
            of embeddings.
    """

    past: Mapping[str, Array] = field(default_factory=dict)
    rows: Array | None = None
    front: int = 0
    embedded: bool = False
    keys: Mapping[str, Array] = field(default_factory=dict)

    @property
    def keyed(self) -> int:
        """Number of tokens whose keys and values stand in front of every layer's."""
        return next((int(values.shape[1]) for values in self.keys.values()), 0)


def key_name(layer: int, part: str) -> str:
    """Name of the keys (``key``) or values (``value``) in front of a layer's, in an encoder's graph."""
    return f"prefix.{layer}.{part}"


def keys_in_front(graph: Graph, virtual: Virtual, io: DType, layer: int, ids: str, part: str, own: str, at: str) -> str:
    """`own`, keys or values ``(B, S, width)`` of a layer, behind the virtual tokens'."""
    values = virtual.keys[key_name(layer, part)]
    graph.initializer(key_name(layer, part), values.astype(graph.numpy_type(io)))
    rows = graph.node("Shape", [ids], at, start=0, end=1)
    shape = graph.node("Concat", [rows, graph.ints(*values.shape[1:])], at, axis=0)
    return graph.node("Concat", [graph.node("Expand", [key_name(layer, part), shape], at), own], at, axis=1)


def mask_in_front(graph: Graph, mask: str, count: int) -> str:
    """`mask`, ``(B, S)`` int64, behind ones for virtual tokens."""
    return _prepend(graph, 1, graph.ints(count), mask)


def completed_mask(graph: Graph, ids: str, mask: str, past: str) -> str:
    """Prepend ones to `mask` for those past tokens that it does not cover.

    Callers that ignore virtual tokens pass a mask ``(B, T)`` of their own tokens. If past and present share one buffer,
    the length of the past is not meaningful: there the caller counts virtual tokens itself and passes an empty vector
    as the switch. Only the switch's length is read, because its value would have to be copied from the device.
    """
    switch = graph.input(PAD_SWITCH, DType.I64, ("pad",))
    graph.initializer(PAD_SWITCH, np.zeros(1, np.int64))
    before = graph.node("Shape", [past], "", start=2, end=3)
    new = graph.node("Shape", [ids], "", start=1, end=2)
    covered = graph.node("Shape", [mask], "", start=1, end=2)
    missing = graph.node("Sub", [graph.node("Add", [before, new], ""), covered], "")
    missing = graph.node("Max", [missing, graph.ints(0)], "")
    missing = graph.node("Mul", [missing, graph.node("Shape", [switch], "")], "")
    return _prepend(graph, 1, missing, mask)


def _prepend(graph: Graph, value: int, count: str, rows: str) -> str:
    """Prepend `count` (a vector of length one) times `value` to `rows`, (B, S) int64."""
    batch = graph.node("Shape", [rows], "", start=0, end=1)
    shape = graph.node("Concat", [batch, count], "", axis=0)
    filled = graph.node("Expand", [graph.constant(np.full((1, 1), value, np.int64)), shape], "")
    return graph.node("Concat", [filled, rows], "", axis=1)


def rows_after(graph: Graph, x: str, ids: str, vocabulary: int, rows: Array, io: DType, at: str) -> str:
    """`x`, the table's rows, for `ids` within the vocabulary; `rows` for those after it."""
    offset = graph.node("Sub", [ids, graph.number(vocabulary, DType.I64)], at)
    row = graph.node("Max", [offset, graph.number(0, DType.I64)], at)
    table = graph.constant(rows.astype(graph.numpy_type(io)), "soft_prompt")
    is_known = graph.node(
        "Unsqueeze", [graph.node("Less", [offset, graph.number(0, DType.I64)], at), graph.ints(-1)], at
    )
    return graph.node("Where", [is_known, x, graph.node("Gather", [table, row], at, axis=0)], at)


def in_front(graph: Graph, ids: str, mask: str, vocabulary: int, count: int) -> tuple[str, str]:
    """Prepend `count` virtual tokens, ``V ... V + count - 1``, to every row of an encoder's `ids` and `mask` (B, S)."""
    batch = graph.node("Shape", [ids], "", start=0, end=1)
    shape = graph.node("Concat", [batch, graph.ints(count)], "", axis=0)
    virtual = graph.constant(vocabulary + np.arange(count, dtype=np.int64)[None])
    extended = graph.node("Concat", [graph.node("Expand", [virtual, shape], ""), ids], "", axis=1)
    return extended, _prepend(graph, 1, graph.ints(count), mask)


def types_in_front(graph: Graph, types: str, count: int) -> str:
    """Prepend the token types of virtual tokens, which are 0 (PEFT)."""
    return _prepend(graph, 0, graph.ints(count), types)


def front_model(model: Model) -> Model:
    """The recipe of an encoder over embeddings: positions go by index, even for padding (transformers' RoBERTa)."""
    record: Embedding = model.embedding
    return replace(model, embedding=replace(record, position_rule="absolute")) if record.positions else model
