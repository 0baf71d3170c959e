# SPDX-License-Identifier: Apache-2.0
"""What the queries of an encoder make of each key: which they see, how far away it is, and what that adds to the scores.

All layers share these values, each built when first needed. Positions and distances go by place, over padding too.
"""

from __future__ import annotations

from functools import cached_property

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.relative import masked_bias, relative_bias
from surgery.onnx.graph.rotary import RotaryTable, RotaryTables
from surgery.onnx.graph.virtual_tokens import mask_in_front
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Attention, RelativeBias, Rope

__all__ = ["SeenKeys"]


class SeenKeys:
    """The keys of one encoder graph."""

    def __init__(self, ctx: Context, mask: str, max_length: int = 0, *, reads_padding: bool = False) -> None:
        """Keys of the tokens that the input `mask`, ``(B, S)`` int64, has ones for; an empty name for no padding.

        Behind those of virtual tokens where every layer has some, which needs places of no key.
        Rotary tables have `max_length` positions. With `reads_padding`, results at padding are read; it sees the tokens of
        its row.
        """
        self._reads_padding = reads_padding
        self._ctx, self._graph, self._mask = ctx, ctx.graph, mask
        self._tables = RotaryTables(ctx.graph, max_length, ctx.io)
        self._allowed: dict[int | None, str] = {}
        self._biased: dict[tuple[RelativeBias, int | None], str] = {}

    def mask(self, record: Attention) -> str:
        """The mask of a layer's attention: `allowed`, or its bias ``(B, heads, S, S)`` with -inf for what is not."""
        if not self._mask:
            return ""
        if record.bias is None:
            return self.allowed(record.window)
        key = record.bias, record.window
        if key not in self._biased:
            bias = relative_bias(self._ctx, record.bias, record.heads, self.places, self.places)
            self._biased[key] = masked_bias(self._ctx, bias, self.allowed(record.window))
        return self._biased[key]

    def allowed(self, window: int | None) -> str:
        """Visible keys ``(B, 1, S, S)``, bool: all tokens, or those nearer than `window`.

        Results at padding are never read, but it must see something.
        """
        if window not in self._allowed:
            graph, (keys, padding) = self._graph, self._tokens
            if window is not None:
                column = graph.node("Unsqueeze", [self.places, graph.ints(1)], "")
                away = graph.node("Abs", [graph.node("Sub", [self.places, column], "")], "")
                near = graph.node("Less", [away, graph.number(window, DType.I64)], "")
                keys = graph.node("And", [keys, near], "")
            if self._reads_padding:  # nothing besides, in the shape of the operator's mask
                padding = graph.node("Xor", [padding, padding], "")
            self._allowed[window] = graph.node("Or", [keys, padding], "")
        return self._allowed[window]

    @cached_property
    def _tokens(self) -> tuple[str, str]:
        """Which keys are tokens ``(B, 1, 1, S)``, and which queries are padding ``(B, 1, S, 1)``."""
        graph = self._graph
        token = seen = graph.cast(self._mask, DType.BOOL, "")
        if self._ctx.virtual.keyed:
            seen = graph.cast(mask_in_front(graph, self._mask, self._ctx.virtual.keyed), DType.BOOL, "")
        keys = graph.node("Unsqueeze", [seen, graph.ints(1, 2)], "")
        padding = graph.node("Unsqueeze", [graph.node("Not", [token], ""), graph.ints(1, 3)], "")
        return keys, padding

    @cached_property
    def places(self) -> str:
        """``0 ... S - 1``."""
        graph = self._graph
        size = graph.node("Squeeze", [graph.node("Shape", [self._mask], "", start=1, end=2)], "")
        return graph.node("Range", [graph.number(0, DType.I64), size, graph.number(1, DType.I64)], "")

    @cached_property
    def _positions(self) -> str:
        """``(B, S)``."""
        return self._graph.node("Expand", [self.places, self._graph.node("Shape", [self._mask], "")], "")

    def table(self, rope: Rope) -> RotaryTable:
        """Cosines and sines; layers with equal parameters share them."""
        return self._tables.of(rope)

    def shifted_positions(self, rows: RotaryTable) -> str:
        """Row indices into a rotary table ``(B, S)``; no encoder has a second set of angles."""
        assert not rows.original
        return self._positions
