# SPDX-License-Identifier: Apache-2.0
"""What both decoders are to their callers, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.adapters import Past, past_names
from surgery.onnx.run.binding import as_array, execute, not_recorded
from surgery.onnx.run.growing import GrowingDecoder, RowByRow
from surgery.onnx.run.opening import Opened
from surgery.onnx.run.rows import Rows
from surgery.onnx.run.shared import SharedDecoder
from surgery_formats.errors import FitError

__all__ = ["Decoder", "default_past", "make_decoder"]

Array = npt.NDArray[Any]


class Decoder(Protocol):
    """A batch of sequences that grow together."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """``(B,)`` tokens in the cache, virtual ones included."""

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
    if tokens >= length:
        raise FitError(f"{tokens} virtual tokens leave no room in {length}", file=opened.path)
    missing = [name for name in past_names(contract.layers) if name not in opened.inputs]
    if missing:
        raise FitError(f"the graph has no input {missing[0]}", file=opened.path)
    if contract.cache == "shared":
        return SharedDecoder(opened, batch, length, slots or {}, past)
    if batch > 1 and past is not None and (contract.padding != "left" or "position_ids" not in opened.inputs):
        # Padding must not part a prompt from its text, and GroupQueryAttention takes one row on top of a past.
        return RowByRow(opened, batch, length, slots or {}, past)
    return GrowingDecoder(opened, batch, length, slots or {}, past)


def default_past(opened: Opened) -> Past | None:
    """The soft prompt that is the graph's own: the default of its past. None if it has none.

    It is what one run over one token gives back in front of that token, so that it need not be sought in the file.
    """
    contract = opened.contract
    if not contract.virtual_tokens:
        return None
    names = past_names(contract.layers)
    if lacking := [name for name in names if name not in opened.optional]:
        text = f"the graph speaks of {contract.virtual_tokens} virtual tokens, but {lacking[0]} has no default"
        raise FitError(text, file=opened.path)
    binding = opened.session.io_binding()
    count = contract.virtual_tokens
    binding.bind_cpu_input("input_ids", np.zeros((1, 1), np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, count + 1), np.int64))
    if "position_ids" in opened.inputs:
        binding.bind_cpu_input("position_ids", np.full((1, 1), count, np.int64))
    wanted = [name.replace("past_key_values", "present") for name in names]
    for name in ("logits", *wanted):
        binding.bind_output(name, "cpu")
    execute(opened.session, binding, not_recorded())
    values = dict(zip(("logits", *wanted), binding.get_outputs(), strict=True))
    arrays = {}
    for name, output in zip(names, wanted, strict=True):
        array = as_array(values[output], opened.outputs[output])
        if array.shape != (1, contract.kv_heads, count + 1, contract.head_dim):
            raise FitError(f"'{name}' begins with {array.shape[2] - 1} virtual tokens, not {count}", file=opened.path)
        arrays[name] = np.ascontiguousarray(array[:, :, :count])
    return Past(count, arrays)
