# SPDX-License-Identifier: Apache-2.0
"""What both decoders are to their callers, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.metadata import initializer_shapes
from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.binding import as_array, execute, not_recorded
from surgery.onnx.run.growing import GrowingDecoder, RowByRow
from surgery.onnx.run.opening import Opened, open_prefill
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
        """Tokens behind which the next one must be prefilled with all before it (`Contract.rope_switch`); 0 for never."""

    @property
    def room(self) -> int:
        """How many more tokens the longest row can take."""

    def prefill(self, rows: Rows) -> Array:
        """Begin anew with `rows`; ``(B, V)`` logits behind the last token of each, in the graph's own type."""

    def step(self, tokens: npt.ArrayLike) -> Array:
        """Append one token to each row; ``(B, V)`` logits behind it."""


def make_decoder(
    opened: Opened,
    *,
    batch: int = 1,
    max_length: int | None = None,
    slots: Mapping[str, Array] | None = None,
    past: Past | None = None,
) -> Decoder:
    """A decoder for `batch` rows.

    Args:
        opened: The graph.
        batch: Rows.
        max_length: Most tokens of a row, virtual ones included; the size of a shared cache. By default what the graph can take.
        slots: Arrays for the graph's slots, see `fill_slots`.
        past: A soft prompt; None for none, even where the graph has one of its own (`default_past`).

    Raises:
        FitError: not a decoder, or longer than the graph's positions reach.
    """
    contract = opened.contract
    if contract.kind != "decoder":
        raise FitError("this graph is an encoder: it generates nothing", file=opened.path)
    length = contract.max_length if max_length is None else max_length
    tokens = past.tokens if past else 0
    if length > contract.max_length:
        raise FitError(f"{length} tokens, the graph's positions end at {contract.max_length}", file=opened.path)
    if past is not None and contract.rope_switch:
        length = min(length, contract.rope_switch)  # the prompt's keys hold the angles of short sequences
    if tokens >= length:
        raise FitError(f"{tokens} virtual tokens leave no room in {length}", file=opened.path)
    missing = [name for name in past_names(contract.layers) if name not in opened.inputs]
    if missing:
        raise FitError(f"the graph has no input {missing[0]}", file=opened.path)
    if contract.cache == "shared":
        other = open_prefill(opened) if batch > 1 and past is not None else None
        together = GrowingDecoder(other, batch, length, slots or {}, past) if other is not None else None
        return SharedDecoder(opened, batch, length, slots or {}, past, together)
    apart = contract.padding == "right" or (contract.padding == "left" and "position_ids" not in opened.inputs)
    if batch > 1 and past is not None and apart:
        # GroupQueryAttention takes one row on top of a past; where places are positions, padding would part a prompt from its text.
        return RowByRow(opened, batch, length, slots or {}, past)
    return GrowingDecoder(opened, batch, length, slots or {}, past)


def default_past(opened: Opened) -> Past | None:
    """The soft prompt that is the graph's own: the default of its past. None if it has none.

    It is what one run over one token gives back in front of that token, so that its bytes need not be sought in the file.

    Raises:
        FitError: the graph speaks of virtual tokens that it does not have, or of another number of them.
    """
    count = opened.contract.virtual_tokens
    if not count:
        return None
    if lacking := [name for name in past_names(opened.contract.layers) if name not in opened.optional]:
        raise FitError(f"the graph speaks of {count} virtual tokens, but {lacking[0]} has no default", file=opened.path)
    shapes = initializer_shapes(opened.path)
    wanted = (1, opened.contract.kv_heads, count, opened.contract.head_dim)
    for name in past_names(opened.contract.layers):
        if (shape := shapes.get(name)) != wanted:  # onnxruntime would read beside it, or read less, without a word
            text = f"shape {list(shape or ())}, the graph's contract makes it {list(wanted)}"
            raise FitError(text, file=opened.path, tensor=name, hint="export it again")
    found = _present(opened, [0], count)
    return Past(count, {name: np.ascontiguousarray(array[:, :, :count]) for name, array in found.items()})


def text_past(opened: Opened, ids: Sequence[int]) -> Past:
    """Keys and values of the tokens `ids`, to stand in front of other rows: a text that is read once for all.

    Raises:
        FitError: no tokens, or more than the graph takes.
    """
    if not 0 < len(ids) <= opened.contract.max_length:
        raise FitError(f"{len(ids)} tokens; the graph takes 1 to {opened.contract.max_length}", file=opened.path)
    return Past(len(ids), _present(opened, ids, None))


def _present(opened: Opened, ids: Sequence[int], default: int | None) -> dict[str, Array]:
    """The whole cache behind `ids`, by name of the past: on `default` tokens of the graph's own, or on none."""
    contract = opened.contract
    names = past_names(contract.layers)
    before = default or 0
    whole = before + len(ids)
    binding = opened.session.io_binding()
    binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, whole), np.int64))
    if "position_ids" in opened.inputs:
        binding.bind_cpu_input("position_ids", np.arange(before, whole, dtype=np.int64)[None])
    where = (opened.memory.device, opened.memory.index)
    nothing = opened.memory.allocate(1)
    if default is None:
        for name in names:
            empty = (1, contract.kv_heads, 0, contract.head_dim)
            binding.bind_input(name, *where, opened.inputs[name].element, empty, nothing.address)
    outputs = [name.replace("past_key_values", "present") for name in names]
    for name in ("logits", *outputs):
        binding.bind_output(name, "cpu")
    execute(opened.session, binding, not_recorded())
    _, *values = binding.get_outputs()
    found = {}
    for name, output, value in zip(names, outputs, values, strict=True):
        found[name] = as_array(value, opened.outputs[output])
        if found[name].shape != (1, contract.kv_heads, whole, contract.head_dim):
            shape = list(found[name].shape)
            raise FitError(f"{shape} comes out where {whole} tokens should", file=opened.path, tensor=output)
    return found
