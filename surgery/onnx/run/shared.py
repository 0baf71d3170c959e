# SPDX-License-Identifier: Apache-2.0
"""Decoding over one buffer for past and present (GroupQueryAttention): steps allocate, move and rebind nothing.

Past and present of a layer are bound to one address, so the kernel writes a new key in place instead of copying the
cache. The mask of a step always has the cache's full width: only values change between steps, never shapes or
addresses, so a step can be recorded once as a CUDA graph and replayed. Rows are padded on the right;
GroupQueryAttention takes a row's length from the sum of its mask and writes the next key right after it, so rows of
different length have no gaps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import KEEP, PAD_SWITCH
from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.growing import GrowingDecoder
from surgery.onnx.run.memory import Buffer, DeviceScratch, placed
from surgery.onnx.run.opening import GraphSession
from surgery.onnx.run.ports import bind_number, execute, run_options
from surgery.onnx.run.rows import Rows, pad
from surgery_formats.errors import FitError

__all__ = ["SharedDecoder"]

Array = npt.NDArray[Any]
_CHUNK = 2048  # tokens of one row per run of a prefill: bounds its logits
_SINGLE_WRITES = 4  # up to this many rows, a step writes single elements of the mask instead of all of it
_KEPT_BINDINGS = 64  # bindings kept for prefills of repeated shapes
_recordings = itertools.count(1)


class SharedDecoder:
    """A decoder with a shared cache; see the module."""

    def __init__(
        self,
        graph: GraphSession,
        batch: int,
        max_length: int,
        slots: Mapping[str, Array],
        past: Past | None,
        batch_prefill: GrowingDecoder | None = None,
    ) -> None:
        """If given, `batch_prefill` prefills rows on top of `past` at once, on the host, instead of one by one."""
        self._batch_prefill = batch_prefill
        self._graph, self._batch, self._max = graph, batch, max_length
        memory, contract = graph.memory, graph.contract
        self._names = past_names(contract)
        self._kind = graph.inputs[self._names[0]]
        self._row = contract.kv_heads * max_length * contract.head_dim * self._kind.dtype.itemsize  # bytes
        self._cache = {name: memory.allocate(batch * self._row) for name in self._names}
        self._slots: dict[str, tuple[Buffer, tuple[int, ...]]] = {}
        for name, array in slots.items():
            self._slots[name] = placed(memory, array), array.shape
        self._tokens = past.tokens if past else 0
        if past is not None:
            self._write_past(past)  # once: all later keys follow it
        self._scratch = DeviceScratch(memory)
        self._bindings: dict[tuple[int, ...], Any] = {}  # of prefills
        self._logits = graph.outputs["logits"]
        self.lengths = np.zeros(batch, np.int64)
        self.switch = contract.rope_switch
        # For steps: allocated once.
        self._mask = np.zeros((batch, max_length), np.int64)
        self._ids_buffer = memory.allocate(batch * 8)
        self._positions_buffer = memory.allocate(batch * 8)
        self._mask_buffer = memory.allocate(self._mask.nbytes)
        self._logits_nbytes = batch * contract.vocabulary * self._logits.dtype.itemsize
        self._logits_buffer = memory.allocate(self._logits_nbytes)
        self._step = self._bind(
            slice(0, batch),
            (batch, 1),
            self._ids_buffer,
            self._mask_buffer,
            max_length,
            self._positions_buffer,
            self._logits_buffer,
        )
        self._options = run_options(next(_recordings) if graph.cuda_graph else -1)

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return self._max - int(self.lengths.max(initial=0))

    def prefill(self, rows: Rows) -> Array:
        """Start over with `rows`; returns ``(B, V)`` logits after the last token of each, in the graph's type."""
        if len(rows) != self._batch:
            raise FitError(f"{len(rows)} rows, but this decoder has {self._batch}")
        tokens = self._tokens
        if tokens + max(map(len, rows)) > self._max:
            raise FitError(
                f"{tokens + max(map(len, rows))} tokens do not fit into a cache of {self._max}", hint="give fewer"
            )
        self.lengths[:] = tokens
        if self._batch_prefill is not None and max(map(len, rows)) <= _CHUNK:
            logits = self._batch_prefill.prefill(rows)
            self._take(self._batch_prefill)
        elif tokens or (max(map(len, rows)) > _CHUNK and not self.switch):
            # On top of a past, GroupQueryAttention takes several new tokens only for one row at a time.
            parts = [self._feed(slice(r, r + 1), [row]) for r, row in enumerate(rows)]
            logits = np.concatenate(parts)
        else:
            logits = self._feed(slice(0, self._batch), rows)
        self._mask[:] = np.arange(self._max) < self.lengths[:, None]
        self._graph.memory.write(self._mask_buffer, self._mask)
        return logits

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; returns the ``(B, V)`` logits after it."""
        self.advance(tokens)
        return self.logits()

    def advance(self, tokens: npt.ArrayLike) -> None:
        """Like `step`, but leaves the logits on the device."""
        if not self.room:
            raise FitError(f"the cache of {self._max} tokens is full")
        memory, lengths = self._graph.memory, self.lengths
        memory.write(self._ids_buffer, np.asarray(tokens, np.int64).reshape(self._batch))
        if "position_ids" in self._graph.inputs:
            memory.write(self._positions_buffer, lengths)
        self._mask[np.arange(self._batch), lengths] = 1
        if self._batch <= _SINGLE_WRITES:
            for row, length in enumerate(lengths.tolist()):
                at = row * self._max + length
                memory.write(self._mask_buffer, self._mask.reshape(-1)[at : at + 1], at * 8)
        else:
            memory.write(self._mask_buffer, self._mask)
        lengths += 1
        execute(self._graph.session, self._step, self._options)

    def logits(self) -> Array:
        """The logits of the last `advance`, ``(B, V)``."""
        raw = self._graph.memory.read(self._logits_buffer.address, self._logits_nbytes)
        return raw.view(self._logits.dtype).reshape(self._batch, -1)

    def _feed(self, rows_of_cache: slice, rows: Rows) -> Array:
        """Append `rows` to rows of the cache: all at once to an empty cache, otherwise one row in chunks."""
        longest = max(map(len, rows))
        logits = None
        chunk = longest if self.switch else _CHUNK  # a first chunk cannot know that the sequence is long
        for begin in range(0, longest, chunk):
            logits = self._run(rows_of_cache, [row[begin : begin + chunk] for row in rows])
        assert logits is not None
        return logits

    def _run(self, rows_of_cache: slice, rows: Rows) -> Array:
        memory, contract = self._graph.memory, self._graph.contract
        ids, new = pad(rows, "right")
        batch, width = ids.shape
        before = self.lengths[rows_of_cache]
        mask = np.concatenate([np.ones((batch, int(before.max())), np.int64), new], 1)  # batch > 1: nothing before
        positions = before[:, None] + np.arange(width)
        buffers = []
        for name, array in (("ids", ids), ("mask", mask), ("places", positions)):
            buffers.append(self._scratch.get(name, array.nbytes))
            memory.write(buffers[-1], array)
        size = contract.vocabulary * self._logits.dtype.itemsize
        ends = new.sum(1)
        keep = width - int(ends.min()) + 1 if KEEP in self._graph.inputs else width
        logits = self._scratch.get("logits", batch * keep * size)
        key = (rows_of_cache.start, *ids.shape, keep, mask.shape[1], *(buffer.address for buffer in (*buffers, logits)))
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= _KEPT_BINDINGS:
                self._bindings.clear()
            binding = self._bind(
                rows_of_cache, ids.shape, buffers[0], buffers[1], mask.shape[1], buffers[2], logits, keep
            )
            self._bindings[key] = binding
        execute(self._graph.session, binding, run_options())
        self.lengths[rows_of_cache] += ends
        first = width - keep  # the first position whose logits there are
        last = [
            memory.read(logits.address + (r * keep + int(end) - 1 - first) * size, size) for r, end in enumerate(ends)
        ]
        return np.stack([raw.view(self._logits.dtype) for raw in last])

    def _take(self, decoder: GrowingDecoder) -> None:
        """Take the cache of `decoder`, whose rows are padded on the right as here."""
        for name, array in decoder.take_cache().items():
            cache = self._cache[name].owner.view(self._kind.dtype)  # in host memory
            cache[: self._batch * self._row // self._kind.dtype.itemsize].reshape(
                self._batch, array.shape[1], self._max, array.shape[3]
            )[:, :, : array.shape[2]] = array
        self.lengths[:] = decoder.lengths

    def _write_past(self, past: Past) -> None:
        """Write the soft prompt in front of every row."""
        memory, contract = self._graph.memory, self._graph.contract
        stride = self._max * contract.head_dim * self._kind.dtype.itemsize  # between heads
        for name in self._names:
            array = past.of_type(name, self._kind.dtype)
            for row in range(self._batch):
                for head in range(contract.kv_heads):
                    memory.write(self._cache[name], array[0, head], row * self._row + head * stride)

    def _bind(
        self,
        rows_of_cache: slice,
        shape: tuple[int, ...],
        ids: Buffer,
        mask: Buffer,
        mask_width: int,
        positions: Buffer,
        logits: Buffer,
        keep: int = 1,
    ) -> Any:
        graph, contract = self._graph, self._graph.contract
        where = (graph.memory.device, graph.memory.index)
        binding = graph.session.io_binding()
        batch = shape[0]
        binding.bind_input("input_ids", *where, np.int64, shape, ids.address)
        binding.bind_input("attention_mask", *where, np.int64, (batch, mask_width), mask.address)
        if "position_ids" in graph.inputs:
            binding.bind_input("position_ids", *where, np.int64, shape, positions.address)
        for name, (buffer, size) in self._slots.items():
            binding.bind_input(name, *where, graph.inputs[name].element, size, buffer.address)
        if PAD_SWITCH in graph.inputs:  # our masks count virtual tokens, which a shared buffer's length does not show
            binding.bind_input(PAD_SWITCH, *where, np.int64, (0,), ids.address)
        cache = (batch, contract.kv_heads, self._max, contract.head_dim)
        for name, buffer in self._cache.items():
            address = buffer.address + rows_of_cache.start * self._row
            binding.bind_input(name, *where, self._kind.element, cache, address)
            output = name.replace("past_key_values", "present")
            binding.bind_output(output, *where, self._kind.element, cache, address)
        if KEEP in graph.inputs and (shape[1] > 1 or KEEP not in graph.optional):
            bind_number(binding, KEEP, keep)
        result = (batch, keep, contract.vocabulary)
        binding.bind_output("logits", *where, self._logits.element, result, logits.address)
        return binding
