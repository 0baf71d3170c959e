# SPDX-License-Identifier: Apache-2.0
"""Decoding with an encoder's result: one run of the encoder, then a decoder whose cache grows beside what it kept of that.

Both branches of the merged decoder are in one session. Keys and values of the encoder's result stay where the first run
made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.pair_names import MASK, STATES, SWITCH, kept_names
from surgery.onnx.run.memory import Buffer, placed
from surgery.onnx.run.opening import GraphSession
from surgery.onnx.run.ports import as_array, execute, run_options
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.starts import Starts
from surgery_formats.errors import FitError

__all__ = ["EncoderStates", "PairDecoder"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class EncoderStates:
    """What an encoder made of a batch.

    Attributes:
        values: ``(B, E, D)``.
        mask: ``(B, E)`` ones for what is no padding, int64; None for sound.
    """

    values: Array
    mask: Array | None = None


class PairDecoder:
    """A batch that answers what an encoder has read; all rows begin with as many tokens."""

    switch = 0

    def __init__(
        self, graph: GraphSession, read: EncoderStates, max_length: int, slots: Mapping[str, Array], starts: Starts
    ) -> None:
        if SWITCH not in graph.inputs:
            raise FitError(f"the graph has no input {SWITCH}", file=graph.path, hint="run the folder")
        self._graph, self._read, self._starts = graph, read, starts
        self._max = min(max_length, graph.contract.max_length)
        self._layers = graph.contract.layers
        self._where = (graph.memory.device, graph.memory.index)
        contract, rows = graph.contract, len(read.values)
        names = (*kept_names(self._layers, "decoder"), *kept_names(self._layers, "encoder"))
        empty = np.zeros((rows, contract.kv_heads, 0, contract.head_dim), graph.inputs[names[0]].dtype)
        self._fed = {name: self._held(array) for name, array in {**slots, STATES: read.values}.items()}
        self._none = dict.fromkeys(names, self._held(empty))
        self._length = 0
        self._cache: dict[str, Any] = {}

    def _held(self, array: Array) -> tuple[Buffer, tuple[int, ...]]:
        """An array where the graph runs."""
        return placed(self._graph.memory, array), array.shape

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(B,)`` tokens in the cache."""
        return np.full(len(self._read.values), self._length, np.int64)

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self._max - self._length

    def prefill(self, rows: Rows) -> Array:
        """Start over with `rows`; returns ``(B, V)`` logits after the last token of each.

        Raises:
            FitError: another number of rows, rows of different lengths, or more tokens than fit.
        """
        if len(rows) != len(self._read.values):
            raise FitError(f"{len(rows)} rows, but this decoder has {len(self._read.values)}")
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise FitError("the decoder's rows begin with as many tokens each, one at least")
        self._length, self._cache = 0, {}
        logits = self._run(np.array(rows, np.int64))[:, -1].copy()
        logits[:, sorted({*self._starts.never, *self._starts.never_first})] = -np.inf
        return logits

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; returns the ``(B, V)`` logits after it."""
        logits = self._run(np.asarray(tokens, np.int64).reshape(-1, 1))[:, 0].copy()
        logits[:, sorted(self._starts.never)] = -np.inf
        return logits

    def _run(self, ids: npt.NDArray[np.int64]) -> Array:
        if self.room < ids.shape[1]:
            raise FitError(f"{self._length + ids.shape[1]} tokens, but the graph takes at most {self._max}")
        graph = self._graph
        binding = graph.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        if MASK in graph.inputs and self._read.mask is not None:
            binding.bind_cpu_input(MASK, self._read.mask)
        binding.bind_cpu_input(SWITCH, np.array([bool(self._cache)]))
        for name, (buffer, shape) in {**self._fed, **({} if self._cache else self._none)}.items():
            binding.bind_input(name, *self._where, graph.inputs[name].element, shape, buffer.address)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        own, theirs = (kept_names(self._layers, side) for side in ("decoder", "encoder"))
        binding.bind_output("logits", "cpu")
        outputs = [name.replace("past_key_values", "present") for name in (*own, *theirs)]
        for name in outputs:
            binding.bind_output(name, *self._where)
        execute(graph.session, binding, run_options())
        logits, *present = binding.get_outputs()
        kept = dict(zip((*own, *theirs), present, strict=True))
        self._cache = kept if not self._cache else self._cache | {name: kept[name] for name in own}
        self._length += ids.shape[1]
        return as_array(logits, graph.outputs["logits"])
