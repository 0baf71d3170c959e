# SPDX-License-Identifier: Apache-2.0
"""The common interface of the decoders, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import KEEP
from surgery.onnx.graph.read_metadata import initializer_shapes
from surgery.onnx.run.adapters import Past, fill_slots, past_names
from surgery.onnx.run.growing import GrowingDecoder, RowByRow
from surgery.onnx.run.opening import GraphSession, open_prefill
from surgery.onnx.run.ports import as_array, bind_number, execute, run_options
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.shared import SharedDecoder
from surgery_formats.errors import FitError

__all__ = ["Decoder", "default_past", "make_decoder", "text_past"]

Array = npt.NDArray[Any]


class Decoder(Protocol):
    """A batch of sequences that grow together."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(B,)`` tokens in the cache, virtual ones included."""

    @property
    def switch(self) -> int:
        """Length beyond which a longer sequence must be prefilled again (`Contract.rope_switch`); 0 for never."""

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""

    def prefill(self, rows: Rows) -> Array:
        """Start over with `rows`; returns ``(B, V)`` logits after the last token of each, in the graph's type."""

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; returns the ``(B, V)`` logits after it."""


def make_decoder(
    graph: GraphSession,
    *,
    batch: int = 1,
    max_length: int | None = None,
    slots: Mapping[str, Array] | None = None,
    past: Past | None = None,
) -> Decoder:
    """Create a decoder for `batch` rows.

    Args:
        graph: The opened graph.
        batch: Number of rows.
        max_length: Greatest length of a row, including virtual tokens; the size of a shared cache. By default the
            graph's limit.
        slots: Arrays for the graph's slots, see `fill_slots`.
        past: A soft prompt; None for none, even if the graph has its own (`default_past`).

    Raises:
        FitError: not a decoder, or longer than the graph's positions.
    """
    contract = graph.contract
    if contract.kind != "decoder":
        raise FitError("this graph is an encoder and cannot generate", file=graph.path)
    if contract.embedder:
        text = f"this graph takes embeddings: {contract.embedder} makes them of token ids"
        raise FitError(text, file=graph.path, hint="export it without `inputs_embeds=`")
    length = contract.max_length if max_length is None else max_length
    tokens = past.tokens if past else 0
    if length > contract.max_length:
        raise FitError(f"{length} tokens, but the graph's positions end at {contract.max_length}", file=graph.path)
    if past is not None and contract.rope_switch:
        length = min(length, contract.rope_switch)  # the prompt's keys have the angles of short sequences
    if tokens >= length:
        raise FitError(f"{tokens} virtual tokens leave no room in {length}", file=graph.path)
    missing = [name for name in past_names(contract) if name not in graph.inputs]
    if missing:
        raise FitError(f"the graph has no input {missing[0]}", file=graph.path)
    if contract.cache == "shared":
        prefill_graph = open_prefill(graph) if batch > 1 and past is not None else None
        batch_prefill = (
            GrowingDecoder(prefill_graph, batch, length, slots or {}, past) if prefill_graph is not None else None
        )
        return SharedDecoder(graph, batch, length, slots or {}, past, batch_prefill)
    row_by_row = contract.padding == "right" or (contract.padding == "left" and "position_ids" not in graph.inputs)
    if batch > 1 and past is not None and row_by_row:
        # GroupQueryAttention takes one row on top of a past; with positions by index, padding would split them.
        return RowByRow(graph, batch, length, slots or {}, past)
    return GrowingDecoder(graph, batch, length, slots or {}, past)


def default_past(graph: GraphSession) -> Past | None:
    """Return the graph's own soft prompt, the default of its past; None if it has none.

    It is read from the output of one run over one token, which saves finding its bytes in the file.

    Raises:
        FitError: the contract announces virtual tokens that the graph lacks, or another number of them.
    """
    count = graph.contract.virtual_tokens
    if not count:
        return None
    if missing := [name for name in past_names(graph.contract) if name not in graph.optional]:
        raise FitError(f"the contract has {count} virtual tokens, but {missing[0]} has no default", file=graph.path)
    shapes = initializer_shapes(graph.path)
    expected = (1, graph.contract.kv_heads, count, graph.contract.head_dim)
    for name in past_names(graph.contract):
        if (shape := shapes.get(name)) != expected:  # onnxruntime would silently read too much or too little
            text = f"has the shape {list(shape or ())}, but the graph's contract implies {list(expected)}"
            raise FitError(text, file=graph.path, tensor=name, hint="export it again")
    arrays = _present(graph, [0], count)
    return Past(count, {name: np.ascontiguousarray(array[:, :, :count]) for name, array in arrays.items()})


def text_past(graph: GraphSession, ids: Sequence[int]) -> Past:
    """Compute keys and values of the tokens `ids` once, to be placed in front of other rows.

    Raises:
        FitError: no tokens, or more than the graph takes.
    """
    if not 0 < len(ids) <= graph.contract.max_length:
        raise FitError(f"{len(ids)} tokens; the graph takes 1 to {graph.contract.max_length}", file=graph.path)
    return Past(len(ids), _present(graph, ids, None))


def _present(graph: GraphSession, ids: Sequence[int], default: int | None) -> dict[str, Array]:
    """The cache after `ids`, by name of the past input, starting from the graph's `default` tokens or from none."""
    contract = graph.contract
    names = past_names(contract)
    if contract.convolutions:
        raise FitError(
            "short convolutions carry more than keys and values from a prompt: it cannot be kept", file=graph.path
        )
    before = default or 0
    total = before + len(ids)
    binding = graph.session.io_binding()
    binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
    if KEEP in graph.inputs:
        bind_number(binding, KEEP, 1)
    if "position_ids" in graph.inputs:
        binding.bind_cpu_input("position_ids", np.arange(before, total, dtype=np.int64)[None])
    where = (graph.memory.device, graph.memory.index)
    nothing = graph.memory.allocate(1)
    if default is None:
        for name in names:
            empty = (1, contract.kv_heads, 0, contract.head_dim)
            binding.bind_input(name, *where, graph.inputs[name].element, empty, nothing.address)
    for name, empty_factor in fill_slots([], contract, graph.inputs, graph.optional).items():
        binding.bind_cpu_input(name, empty_factor)
    outputs = [name.replace("past_key_values", "present") for name in names]
    for name in ("logits", *outputs):
        binding.bind_output(name, "cpu")
    execute(graph.session, binding, run_options())
    _, *values = binding.get_outputs()
    arrays = {}
    for name, output, value in zip(names, outputs, values, strict=True):
        arrays[name] = as_array(value, graph.outputs[output])
        if arrays[name].shape != (1, contract.kv_heads, total, contract.head_dim):
            shape = list(arrays[name].shape)
            raise FitError(f"the output has the shape {shape}, expected {total} tokens", file=graph.path, tensor=output)
    return arrays
