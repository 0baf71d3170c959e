# SPDX-License-Identifier: Apache-2.0
"""Decoding with a growing cache: present is a new tensor, past plus new tokens. For Attention-23 and default pasts.

Rows are padded on the left for positions by index (Attention-23), or on the right (GroupQueryAttention without a shared
buffer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import KEEP
from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.memory import placed
from surgery.onnx.run.opening import GraphSession
from surgery.onnx.run.ports import as_array, bind_number, execute, run_options
from surgery.onnx.run.rows import Rows, pad
from surgery_formats.errors import FitError

__all__ = ["GrowingDecoder", "RowByRow"]

Array = npt.NDArray[Any]


class GrowingDecoder:
    """A batch whose cache onnxruntime reallocates in each step."""

    def __init__(
        self, graph: GraphSession, batch: int, max_length: int, slots: Mapping[str, Array], past: Past | None
    ) -> None:
        self._graph, self._batch, self._max = graph, batch, max_length
        self._slots = {}
        for name, array in slots.items():
            self._slots[name] = placed(graph.memory, array), array.shape
        self._names = past_names(graph.contract)
        kind = graph.inputs[self._names[0]]
        tokens = past.tokens if past else 0
        shape = (batch, graph.contract.kv_heads, tokens, graph.contract.head_dim)
        self._begin = {}
        for name in self._names:
            own = None if past is None else past.of_type(name, kind.dtype)
            array = np.zeros(shape, kind.dtype) if own is None else np.broadcast_to(own, shape)
            self._begin[name] = placed(graph.memory, array)
        self._shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self._names, shape)
        for layer in graph.contract.convolutions:
            name, state = f"past_conv.{layer}", (batch, *graph.contract.state)
            self._begin[name], self._shapes[name] = placed(graph.memory, np.zeros(state, kind.dtype)), state
        self._names = list(self._shapes)
        self._kind, self._tokens = kind, tokens
        self._side = graph.contract.padding
        self._cache: dict[str, Any] = {}  # values of onnxruntime, after the first run
        self._mask = np.zeros((batch, 0), np.int64)
        self.lengths = np.zeros(batch, np.int64)
        self.switch = graph.contract.rope_switch

    @property
    def room(self) -> int:
        """How many more tokens fit; padding takes up room too."""
        return self._max - int(self._mask.shape[1])

    def prefill(self, rows: Rows) -> Array:
        """Start over with `rows`; returns ``(B, V)`` logits after the last token of each, in the graph's type."""
        if len(rows) != self._batch:
            raise FitError(f"{len(rows)} rows, but this decoder has {self._batch}")
        ids, new = pad(rows, self._side)
        self._cache = {}
        self._mask = np.concatenate([np.ones((self._batch, self._tokens), np.int64), new], 1)
        if self.room < 0:
            raise FitError(f"{self._mask.shape[1]} tokens do not fit into {self._max}")
        self.lengths[:] = self._mask.sum(1)
        ends = np.full(self._batch, ids.shape[1]) if self._side == "left" else new.sum(1)
        logits = self._run(ids, keep=int(ids.shape[1] - ends.min()) + 1)
        last_logits: Array = logits[np.arange(self._batch), ends - ids.shape[1] + logits.shape[1] - 1]
        return last_logits

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; returns the ``(B, V)`` logits after it."""
        if self.room < 1:
            raise FitError(f"the graph takes at most {self._max} tokens")
        self._mask = np.concatenate([self._mask, np.ones((self._batch, 1), np.int64)], 1)
        self.lengths += 1
        if self._side == "right":  # the mask must hold a row's length as leading ones
            self._mask = (np.arange(self._mask.shape[1]) < self.lengths[:, None]).astype(np.int64)
        last_logits: Array = self._run(np.asarray(tokens, np.int64).reshape(self._batch, 1))[:, 0]
        return last_logits

    def take_cache(self) -> dict[str, Array]:
        """Return the cache of all rows, by name of the past input, and drop it here."""
        arrays = {}
        for name, value in self._cache.items():
            arrays[name] = as_array(value, self._graph.outputs[_present(name)])
        self._cache = {}
        return arrays

    def _run(self, ids: npt.NDArray[np.int64], keep: int = 0) -> Array:
        """Logits of the new tokens, at least of the last `keep`; 0 for all."""
        graph = self._graph
        where = (graph.memory.device, graph.memory.index)
        binding = graph.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask))
        if KEEP in graph.inputs:
            bind_number(binding, KEEP, keep)
        if "position_ids" in graph.inputs:
            positions = np.maximum(self._mask.cumsum(1) - 1, 0)
            if self._side == "right" and ids.shape[1] == 1:
                positions = self.lengths[:, None] - 1
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[:, -ids.shape[1] :]))
        for name, (buffer, size) in self._slots.items():
            binding.bind_input(name, *where, graph.inputs[name].element, size, buffer.address)
        for name in self._names:
            if self._cache:
                binding.bind_ortvalue_input(name, self._cache[name])
            else:
                binding.bind_input(name, *where, self._kind.element, self._shapes[name], self._begin[name].address)
        binding.bind_output("logits", "cpu")
        for name in self._names:
            binding.bind_output(_present(name), *where)
        execute(graph.session, binding, run_options())
        logits, *present = binding.get_outputs()
        self._cache = dict(zip(self._names, present, strict=True))
        return as_array(logits, graph.outputs["logits"])


def _present(name: str) -> str:
    """The output that the input `name` becomes."""
    return name.replace("past_key_values", "present").replace("past_conv", "present_conv")


class RowByRow:
    """Rows that cannot share a run: each has its own decoder."""

    def __init__(
        self, graph: GraphSession, batch: int, max_length: int, slots: Mapping[str, Array], past: Past | None
    ) -> None:
        self.switch = 0  # used only for rows with a soft prompt, which end before the switch
        self._rows = [GrowingDecoder(graph, 1, max_length, slots, past) for _ in range(batch)]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(B,)`` tokens in the cache, virtual ones included."""
        return np.concatenate([row.lengths for row in self._rows])

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return min(row.room for row in self._rows)

    def prefill(self, rows: Rows) -> Array:
        """Start over with `rows`; returns ``(B, V)`` logits after the last token of each."""
        if len(rows) != len(self._rows):
            raise FitError(f"{len(rows)} rows, but this decoder has {len(self._rows)}")
        return np.concatenate([decoder.prefill([row]) for decoder, row in zip(self._rows, rows, strict=True)])

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; returns the ``(B, V)`` logits after it."""
        flat = np.asarray(tokens, np.int64).reshape(len(self._rows))
        return np.concatenate([decoder.step(flat[r : r + 1]) for r, decoder in enumerate(self._rows)])
