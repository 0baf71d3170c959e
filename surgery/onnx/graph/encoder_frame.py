# SPDX-License-Identifier: Apache-2.0
"""Values that all layers of an encoder share, each built when first needed."""

from __future__ import annotations

from functools import cached_property

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.relative import masked, relative_bias
from surgery.onnx.graph.rotary import RotaryTable, table
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import RelativeBias, Rope

__all__ = ["EncoderFrame"]


class EncoderFrame:
    """The shared values of one encoder graph. Positions and distances go by place, over padding too.

    Attributes:
        mask: Input of ones and zeros ``(B, S)``, int64.
        max_length: Positions of the rotary tables.
    """

    def __init__(self, ctx: Context, mask: str, max_length: int) -> None:
        self._ctx = ctx
        self._graph = ctx.graph
        self.mask = mask
        self.max_length = max_length
        self._tables: list[tuple[Rope, RotaryTable]] = []
        self._masks: dict[int | None, str] = {}
        self._biases: dict[tuple[RelativeBias, int | None], str] = {}

    def table(self, rope: Rope) -> RotaryTable:
        """Cosines and sines; layers with equal parameters share them."""
        for known, tables in self._tables:
            if known == rope:
                return tables
        tables = table(self._graph, rope, self.max_length, self._ctx.io)
        self._tables.append((rope, tables))
        return tables

    def shifted_positions(self, rows: RotaryTable) -> str:
        """Row indices into a rotary table ``(B, S)``."""
        return self._positions

    @cached_property
    def _places(self) -> str:
        """``0 ... S - 1``."""
        length = self._graph.node("Shape", [self._ctx.ids], "", start=1, end=2)
        zero, step = (self._graph.number(n, DType.I64) for n in (0, 1))
        return self._graph.node("Range", [zero, self._graph.node("Squeeze", [length], ""), step], "")

    @cached_property
    def _positions(self) -> str:
        """``(B, S)``."""
        shape = self._graph.node("Shape", [self._ctx.ids], "", start=0, end=2)
        return self._graph.node("Expand", [self._places, shape], "")

    @cached_property
    def distance(self) -> str:
        """How far the key lies behind the query, ``(S, S)``."""
        column = self._graph.node("Unsqueeze", [self._places, self._graph.ints(1)], "")
        return self._graph.node("Sub", [self._places, column], "")

    def allowed(self, window: int | None) -> str:
        """Visible keys ``(B, 1, S, S)``, bool: all tokens, or those nearer than `window`.

        Results at padding are never read, but it must see something.
        """
        if window not in self._masks:
            self._masks[window] = self._allowed(window)
        return self._masks[window]

    def _allowed(self, window: int | None) -> str:
        graph, (keys, padding) = self._graph, self._tokens
        if window is not None:
            away = graph.node("Abs", [self.distance], "")
            keys = graph.node("And", [keys, graph.node("Less", [away, graph.number(window, DType.I64)], "")], "")
        return graph.node("Or", [keys, padding], "")

    @cached_property
    def _tokens(self) -> tuple[str, str]:
        """Which keys are tokens ``(B, 1, 1, S)``, and which queries are padding ``(B, 1, S, 1)``."""
        graph = self._graph
        token = graph.cast(self.mask, DType.BOOL, "")
        keys = graph.node("Unsqueeze", [token, graph.ints(1, 2)], "")
        padding = graph.node("Unsqueeze", [graph.node("Not", [token], ""), graph.ints(1, 3)], "")
        return keys, padding

    def biased(self, record: RelativeBias, heads: int, window: int | None) -> str:
        """What is added to the scores ``(B, heads, S, S)``; layers with the same table share it."""
        if (record, window) not in self._biases:
            bias = relative_bias(self._ctx, record, heads, self.distance)
            self._biases[record, window] = masked(self._ctx, bias, self.allowed(window))
        return self._biases[record, window]
