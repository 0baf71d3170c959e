# SPDX-License-Identifier: Apache-2.0
"""A decoder's graph in onnxruntime, as it would be deployed: in its own types, with its own codes and soft prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.evaluation.predictor import no_decoder
from surgery.onnx.graph.contract import KEEP
from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.chosen_adapters import choose_adapters, slot_arrays
from surgery.onnx.run.memory import Buffer, placed
from surgery.onnx.run.opening import GraphSession, open_graph
from surgery.onnx.run.ports import as_array, bind_number, execute, run_options
from surgery.onnx.run.prepare import chosen_past
from surgery_formats.errors import FitError

__all__ = ["GraphPredictor", "open_graph_predictor"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class GraphPredictor:
    """See `surgery.evaluation.predictor.Predictor`. Rows run one by one, which every kind of cache takes.

    Attributes:
        graph: The graph.
        adapters: What fills its slots.
        past: Its own soft prompt, or None.
        begin: What every row begins with: arrays in the graph's memory, by input.
        warnings: None so far.
    """

    graph: GraphSession
    adapters: tuple[str, ...]
    past: Past | None
    begin: dict[str, tuple[Buffer, tuple[int, ...]]]
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The graph."""
        return self.graph.path

    @property
    def folder(self) -> Path:
        """The graph's, or that above it."""
        return self.graph.folder

    @property
    def computed_by(self) -> str:
        """The runtime, and its device."""
        return f"onnxruntime on {self.graph.memory.device}"

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return self.graph.contract.vocabulary

    @property
    def room(self) -> int:
        """The graph's positions without those of its soft prompt."""
        taken = (self.past.tokens if self.past else 0) + len(self._ahead)
        return self.graph.contract.max_length - taken

    @property
    def _ahead(self) -> range:
        """Tokens of a soft prompt that is rows of the vocabulary."""
        first, count = self.graph.contract.vocabulary_rows or (0, 0)
        return range(first, first + count)

    def logits(self, rows: npt.NDArray[np.int64], done: Callable[[float], None]) -> Array:
        """``(B, S, V)`` after every token of `rows`, row by row."""
        found = []
        for number, row in enumerate(rows, start=1):
            found.append(self._row(row))
            done(number / len(rows))
        return np.concatenate(found)

    def _row(self, row: npt.NDArray[np.int64]) -> Array:
        graph = self.graph
        before = self.past.tokens if self.past else 0
        ids = np.concatenate([np.array(self._ahead, np.int64), row])[None]
        total = before + ids.shape[1]
        binding = graph.session.io_binding()
        feed: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64)}
        if "position_ids" in graph.inputs:
            positions = np.arange(before, total, dtype=np.int64)[None]
            on_grid = len(graph.inputs["position_ids"].shape) == 3
            feed["position_ids"] = np.stack([positions] * 3) if on_grid else positions
        if "token_type_ids" in graph.inputs:
            feed["token_type_ids"] = np.zeros_like(ids)
        for name, array in feed.items():
            if name in graph.inputs:
                kind = graph.inputs[name].dtype
                binding.bind_cpu_input(name, np.ascontiguousarray(array.astype(kind)))
        if KEEP in graph.inputs:
            bind_number(binding, KEEP, 0)
        where = (graph.memory.device, graph.memory.index)
        for name, (buffer, shape) in self.begin.items():
            binding.bind_input(name, *where, graph.inputs[name].element, shape, buffer.address)
        binding.bind_output("logits", "cpu")
        execute(graph.session, binding, run_options())
        found = as_array(binding.get_outputs()[0], graph.outputs["logits"])
        if found.ndim != 3 or found.shape[1] != ids.shape[1]:
            raise FitError(f"logits of the shape {list(found.shape)} for {ids.shape[1]} tokens", file=graph.path)
        return found[:, -len(row) :].astype(np.float32)


def open_graph_predictor(path: Path, adapters: Sequence[str], device: str, threads: int | None) -> GraphPredictor:
    """Open a decoder's graph, its slots filled with `adapters`.

    Raises:
        InputError: something cannot be read.
        FitError: no decoder, a graph that takes embeddings, a device that is not there, adapters that do not fit.
        ProofError: the weights are not those it was exported with.
    """
    graph = open_graph(path, device=device, threads=threads, cuda_graph=False)
    contract = graph.contract
    if contract.kind != "decoder" or contract.encoder or "logits" not in graph.outputs:
        raise no_decoder(graph.path)
    if contract.embedder or "input_ids" not in graph.inputs:
        raise FitError("takes embeddings, not tokens", file=graph.path, hint="export it without `inputs_embeds=`")
    slots = slot_arrays(choose_adapters(adapters, graph), graph)
    past = chosen_past(graph, None)
    arrays: dict[str, Array] = dict(slots)
    for name in past_names(contract):
        if name not in graph.inputs:
            raise FitError(f"the graph has no input {name}", file=graph.path)
        empty = np.zeros((1, contract.kv_heads, 0, contract.head_dim), graph.inputs[name].dtype)
        arrays[name] = empty if past is None else past.arrays[name]
    for layer in contract.convolutions:
        name = f"past_conv.{layer}"
        arrays[name] = np.zeros((1, *contract.state), graph.inputs[name].dtype)
    begin = {name: (placed(graph.memory, array), array.shape) for name, array in arrays.items()}
    return GraphPredictor(graph, tuple(adapters), past, begin)
