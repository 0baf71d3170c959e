# SPDX-License-Identifier: Apache-2.0
"""Decoding where present is a new tensor, past with the new tokens behind it: Attention-23, and graphs with a default past.

Rows are padded on the left, where a place is a position (Attention-23), or on the right (GroupQueryAttention without a shared buffer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.binding import as_array, execute, not_recorded
from surgery.onnx.run.opening import Opened
from surgery.onnx.run.rows import Rows, pad
from surgery_formats.errors import FitError

__all__ = ["GrowingDecoder", "RowByRow"]

Array = npt.NDArray[Any]


class GrowingDecoder:
    """A batch whose cache onnxruntime makes anew each step."""

    def __init__(
        self, opened: Opened, batch: int, max_length: int, slots: Mapping[str, Array], past: Past | None
    ) -> None:
        self._opened, self._batch, self._max = opened, batch, max_length
        self._slots = {}
        for name, array in slots.items():
            buffer = opened.memory.allocate(array.nbytes)
            opened.memory.write(buffer, array)
            self._slots[name] = buffer, array.shape
        self._names = past_names(opened.contract.layers)
        kind = opened.inputs[self._names[0]]
        tokens = past.tokens if past else 0
        shape = (batch, opened.contract.kv_heads, tokens, opened.contract.head_dim)
        self._begin = {}
        for name in self._names:
            array = np.zeros(shape, kind.dtype) if past is None else np.broadcast_to(past.arrays[name], shape)
            if array.dtype != kind.dtype:
                raise FitError(f"a soft prompt of {array.dtype}, the cache holds {kind.dtype}", tensor=name)
            buffer = opened.memory.allocate(array.nbytes)
            opened.memory.write(buffer, array)
            self._begin[name] = buffer
        self._shape, self._kind, self._tokens = shape, kind, tokens
        self._side = opened.contract.padding
        self._cache: dict[str, Any] = {}  # values of onnxruntime, once there are any
        self._mask = np.zeros((batch, 0), np.int64)
        self.lengths = np.zeros(batch, np.int64)
        self.switch = opened.contract.rope_switch

    @property
    def room(self) -> int:
        """How many more tokens fit: places count, and padding takes places."""
        return self._max - int(self._mask.shape[1])

    def prefill(self, rows: Rows) -> Array:
        """Begin anew with `rows`; ``(B, V)`` logits behind the last token of each, in the graph's own type."""
        if len(rows) != self._batch:
            raise FitError(f"{len(rows)} rows, this decoder has {self._batch}")
        ids, new = pad(rows, self._side)
        self._cache = {}
        self._mask = np.concatenate([np.ones((self._batch, self._tokens), np.int64), new], 1)
        if self.room < 0:
            raise FitError(f"{self._mask.shape[1]} tokens do not fit into {self._max}")
        self.lengths[:] = self._mask.sum(1)
        logits = self._run(ids)
        ends = ids.shape[1] - 1 if self._side == "left" else new.sum(1) - 1
        found: Array = logits[np.arange(self._batch), ends]
        return found

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; ``(B, V)`` logits behind it."""
        if self.room < 1:
            raise FitError(f"{self._max} tokens are the most this graph takes")
        self._mask = np.concatenate([self._mask, np.ones((self._batch, 1), np.int64)], 1)
        self.lengths += 1
        if self._side == "right":  # the row's length is the sum of its marks
            self._mask = (np.arange(self._mask.shape[1]) < self.lengths[:, None]).astype(np.int64)
        found: Array = self._run(np.asarray(tokens, np.int64).reshape(self._batch, 1))[:, 0]
        return found

    def hand_over(self) -> dict[str, Array]:
        """The cache behind all rows so far, by name of the past; it is another's from now on."""
        found = {}
        for name, value in self._cache.items():
            found[name] = as_array(value, self._opened.outputs[name.replace("past_key_values", "present")])
        self._cache = {}
        return found

    def _run(self, ids: npt.NDArray[np.int64]) -> Array:
        opened = self._opened
        where = (opened.memory.device, opened.memory.index)
        binding = opened.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask))
        if "position_ids" in opened.inputs:
            places = np.maximum(self._mask.cumsum(1) - 1, 0)
            if self._side == "right" and ids.shape[1] == 1:
                places = self.lengths[:, None] - 1
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(places[:, -ids.shape[1] :]))
        for name, (buffer, size) in self._slots.items():
            binding.bind_input(name, *where, opened.inputs[name].element, size, buffer.address)
        for name in self._names:
            if self._cache:
                binding.bind_ortvalue_input(name, self._cache[name])
            else:
                binding.bind_input(name, *where, self._kind.element, self._shape, self._begin[name].address)
        binding.bind_output("logits", "cpu")
        for name in self._names:
            binding.bind_output(name.replace("past_key_values", "present"), *where)
        execute(opened.session, binding, not_recorded())
        logits, *present = binding.get_outputs()
        self._cache = dict(zip(self._names, present, strict=True))
        return as_array(logits, opened.outputs["logits"])


class RowByRow:
    """Rows that cannot share a run: each has a decoder of its own."""

    def __init__(
        self, opened: Opened, batch: int, max_length: int, slots: Mapping[str, Array], past: Past | None
    ) -> None:
        self.switch = 0  # only rows with a soft prompt come here, which end before it
        self._rows = [GrowingDecoder(opened, 1, max_length, slots, past) for _ in range(batch)]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(B,)`` tokens in the cache, virtual ones included."""
        return np.concatenate([row.lengths for row in self._rows])

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return min(row.room for row in self._rows)

    def prefill(self, rows: Rows) -> Array:
        """Begin anew with `rows`; ``(B, V)`` logits behind the last token of each."""
        if len(rows) != len(self._rows):
            raise FitError(f"{len(rows)} rows, this decoder has {len(self._rows)}")
        return np.concatenate([one.prefill([row]) for one, row in zip(self._rows, rows, strict=True)])

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; ``(B, V)`` logits behind it."""
        flat = np.asarray(tokens, np.int64).reshape(len(self._rows))
        return np.concatenate([one.step(flat[r : r + 1]) for r, one in enumerate(self._rows)])
