# SPDX-License-Identifier: Apache-2.0
"""Decoding over one buffer for past and present (GroupQueryAttention): nothing is made, moved or bound again from step to step.

Past and present of a layer are bound to one address, so that the kernel writes a new key where it belongs instead of copying the cache.
The mask of a step always has the cache's full width: what changes from step to step are values, never shapes or addresses, and so a step
can be recorded once as a CUDA graph and replayed. Rows are padded on the right; GroupQueryAttention takes a row's length from the sum
of its mask and writes its next key right behind it, so rows of different length have no gaps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import PAD_SWITCH
from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.binding import execute, not_recorded, recorded
from surgery.onnx.run.growing import GrowingDecoder
from surgery.onnx.run.memory import Buffer, DeviceScratch
from surgery.onnx.run.opening import Opened
from surgery.onnx.run.rows import Rows, pad
from surgery_formats.errors import FitError

__all__ = ["SharedDecoder"]

Array = npt.NDArray[Any]
_CHUNK = 2048  # tokens of one row per run of a prefill: bounds its logits
_SINGLE_WRITES = 4  # rows up to which a step writes one mark each instead of the whole mask
_KEPT_BINDINGS = 64  # prefills of one shape need not be bound again
_recordings = itertools.count(1)


class SharedDecoder:
    """See the module."""

    def __init__(
        self,
        opened: Opened,
        batch: int,
        max_length: int,
        slots: Mapping[str, Array],
        past: Past | None,
        together: GrowingDecoder | None = None,
    ) -> None:
        """With `together`, rows on top of `past` are prefilled by it at once, on the host, instead of one by one."""
        self._together = together
        self._opened, self._batch, self._max = opened, batch, max_length
        memory, contract = opened.memory, opened.contract
        self._names = past_names(contract.layers)
        self._kind = opened.inputs[self._names[0]]
        self._row = contract.kv_heads * max_length * contract.head_dim * self._kind.dtype.itemsize  # bytes
        self._cache = {name: memory.allocate(batch * self._row) for name in self._names}
        self._slots: dict[str, tuple[Buffer, tuple[int, ...]]] = {}
        for name, array in slots.items():
            buffer = memory.allocate(array.nbytes)
            memory.write(buffer, array)
            self._slots[name] = buffer, array.shape
        self._tokens = past.tokens if past else 0
        if past is not None:
            self._write_past(past)  # once: every later key goes behind it
        self._scratch = DeviceScratch(memory)
        self._bindings: dict[tuple[int, ...], Any] = {}  # of prefills
        self._logits = opened.outputs["logits"]
        self.lengths = np.zeros(batch, np.int64)
        self.switch = contract.rope_switch
        # Of a step: made once.
        self._mask = np.zeros((batch, max_length), np.int64)
        self._ids_buffer = memory.allocate(batch * 8)
        self._places_buffer = memory.allocate(batch * 8)
        self._mask_buffer = memory.allocate(self._mask.nbytes)
        self._logits_nbytes = batch * contract.vocabulary * self._logits.dtype.itemsize
        self._logits_buffer = memory.allocate(self._logits_nbytes)
        self._step = self._bind(
            slice(0, batch),
            (batch, 1),
            self._ids_buffer,
            self._mask_buffer,
            max_length,
            self._places_buffer,
            self._logits_buffer,
        )
        self._options = recorded(next(_recordings)) if opened.cuda_graph else not_recorded()

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""
        return self._max - int(self.lengths.max(initial=0))

    def prefill(self, rows: Rows) -> Array:
        """Begin anew with `rows`; ``(B, V)`` logits behind the last token of each, in the graph's own type."""
        if len(rows) != self._batch:
            raise FitError(f"{len(rows)} rows, this decoder has {self._batch}")
        tokens = self._tokens
        if tokens + max(map(len, rows)) > self._max:
            raise FitError(
                f"{tokens + max(map(len, rows))} tokens do not fit into a cache of {self._max}", hint="give fewer"
            )
        self.lengths[:] = tokens
        if self._together is not None and max(map(len, rows)) <= _CHUNK:
            logits = self._together.prefill(rows)
            self._take(self._together)
        elif tokens or (max(map(len, rows)) > _CHUNK and not self.switch):
            # GroupQueryAttention takes several new tokens on top of a past for one row at a time only.
            found = [self._feed(slice(r, r + 1), [row]) for r, row in enumerate(rows)]
            logits = np.concatenate(found)
        else:
            logits = self._feed(slice(0, self._batch), rows)
        self._mask[:] = np.arange(self._max) < self.lengths[:, None]
        self._opened.memory.write(self._mask_buffer, self._mask)
        return logits

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; ``(B, V)`` logits behind it."""
        self.advance(tokens)
        return self.logits()

    def advance(self, tokens: npt.ArrayLike) -> None:
        """As `step`, leaving the logits where they are."""
        if not self.room:
            raise FitError(f"the cache of {self._max} tokens is full")
        memory, lengths = self._opened.memory, self.lengths
        memory.write(self._ids_buffer, np.asarray(tokens, np.int64).reshape(self._batch))
        if "position_ids" in self._opened.inputs:
            memory.write(self._places_buffer, lengths)
        self._mask[np.arange(self._batch), lengths] = 1
        if self._batch <= _SINGLE_WRITES:
            for row, length in enumerate(lengths.tolist()):
                at = row * self._max + length
                memory.write(self._mask_buffer, self._mask.reshape(-1)[at : at + 1], at * 8)
        else:
            memory.write(self._mask_buffer, self._mask)
        lengths += 1
        execute(self._opened.session, self._step, self._options)

    def logits(self) -> Array:
        """Of the last `advance`, ``(B, V)``."""
        raw = self._opened.memory.read(self._logits_buffer.address, self._logits_nbytes)
        return raw.view(self._logits.dtype).reshape(self._batch, -1)

    def _feed(self, which: slice, rows: Rows) -> Array:
        """Append `rows` to the cache rows `which`: all at once on an empty cache, one row in chunks on top of a past."""
        longest = max(map(len, rows))
        found = None
        chunk = longest if self.switch else _CHUNK  # a first chunk would not know that the sequence is a long one
        for begin in range(0, longest, chunk):
            found = self._run(which, [row[begin : begin + chunk] for row in rows])
        assert found is not None
        return found

    def _run(self, which: slice, rows: Rows) -> Array:
        memory, contract = self._opened.memory, self._opened.contract
        ids, new = pad(rows, "right")
        batch, width = ids.shape
        before = self.lengths[which]
        mask = np.concatenate([np.ones((batch, int(before.max())), np.int64), new], 1)  # batch > 1: nothing before
        places = before[:, None] + np.arange(width)
        buffers = []
        for name, array in (("ids", ids), ("mask", mask), ("places", places)):
            buffers.append(self._scratch.get(name, array.nbytes))
            memory.write(buffers[-1], array)
        size = contract.vocabulary * self._logits.dtype.itemsize
        logits = self._scratch.get("logits", batch * width * size)
        key = (which.start, *ids.shape, mask.shape[1], *(buffer.address for buffer in (*buffers, logits)))
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= _KEPT_BINDINGS:
                self._bindings.clear()
            binding = self._bind(which, ids.shape, buffers[0], buffers[1], mask.shape[1], buffers[2], logits)
            self._bindings[key] = binding
        execute(self._opened.session, binding, not_recorded())
        ends = new.sum(1)
        self.lengths[which] += ends
        found = [memory.read(logits.address + (r * width + int(end) - 1) * size, size) for r, end in enumerate(ends)]
        return np.stack([raw.view(self._logits.dtype) for raw in found])

    def _take(self, other: GrowingDecoder) -> None:
        """The whole cache of `other`, whose rows are padded on the right as ours are."""
        for name, array in other.hand_over().items():
            cache = self._cache[name].owner.view(self._kind.dtype)  # of the host
            cache[: self._batch * self._row // self._kind.dtype.itemsize].reshape(
                self._batch, array.shape[1], self._max, array.shape[3]
            )[:, :, : array.shape[2]] = array
        self.lengths[:] = other.lengths

    def _write_past(self, past: Past) -> None:
        """The soft prompt in front of every row."""
        memory, contract = self._opened.memory, self._opened.contract
        stride = self._max * contract.head_dim * self._kind.dtype.itemsize  # from head to head
        for name in self._names:
            array = past.arrays[name]
            if array.dtype != self._kind.dtype:
                raise FitError(f"a soft prompt of {array.dtype}, the cache holds {self._kind.dtype}", tensor=name)
            for row in range(self._batch):
                for head in range(contract.kv_heads):
                    memory.write(self._cache[name], array[0, head], row * self._row + head * stride)

    def _bind(
        self,
        which: slice,
        shape: tuple[int, ...],
        ids: Buffer,
        mask: Buffer,
        mask_width: int,
        places: Buffer,
        logits: Buffer,
    ) -> Any:
        opened, contract = self._opened, self._opened.contract
        where = (opened.memory.device, opened.memory.index)
        binding = opened.session.io_binding()
        batch = shape[0]
        binding.bind_input("input_ids", *where, np.int64, shape, ids.address)
        binding.bind_input("attention_mask", *where, np.int64, (batch, mask_width), mask.address)
        if "position_ids" in opened.inputs:
            binding.bind_input("position_ids", *where, np.int64, shape, places.address)
        for name, (buffer, size) in self._slots.items():
            binding.bind_input(name, *where, opened.inputs[name].element, size, buffer.address)
        if PAD_SWITCH in opened.inputs:  # our masks count virtual tokens; a buffer's length would say that they do not
            binding.bind_input(PAD_SWITCH, *where, np.int64, (0,), ids.address)
        cache = (batch, contract.kv_heads, self._max, contract.head_dim)
        for name, buffer in self._cache.items():
            address = buffer.address + which.start * self._row
            binding.bind_input(name, *where, self._kind.element, cache, address)
            output = name.replace("past_key_values", "present")
            binding.bind_output(output, *where, self._kind.element, cache, address)
        result = (*shape, contract.vocabulary)
        binding.bind_output("logits", *where, self._logits.element, result, logits.address)
        return binding
