# SPDX-License-Identifier: Apache-2.0
"""Values that all layers of a decoder share: lengths, positions, masks and rotary tables, each built when first needed.

``B`` batch, ``S`` new tokens, ``T`` past and new tokens.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import END
from surgery.onnx.graph.relative import masked_bias
from surgery.onnx.graph.rotary import RotaryTable, RotaryTables
from surgery_formats.dtypes import DType
from surgery_formats.models.families.recipe import Alibi, PositionScale, Rope

__all__ = ["Frame"]


class Frame:
    """The shared values of one decoder graph.

    With GroupQueryAttention the mask only gives the number of tokens of each row, and rows are padded on the right.
    With the standard operator, positions count the ones of the mask, so that padding may be anywhere.

    Attributes:
        mask: Input of ones and zeros ``(B, T)``, int64.
        places: Input of positions ``(B, S)``, on a grid ``(3, B, S)``, or empty.
        types: Input of ones for tokens of images ``(B, S)``, each image of which sees itself, or empty.
        keys_of: Keys and values of new tokens by number of the layer, for layers that take another's.
    """

    def __init__(self, ctx: Context, mask: str, max_length: int, own: str = "", places: str = "") -> None:
        """Rotary tables have `max_length` positions; `own` is the caller's part of the mask, where that is not all of it."""
        self._ctx = ctx
        self._graph = ctx.graph
        self.mask = mask
        self._own = own or mask
        self.places = places
        self.types = ""
        self._grids: list[tuple[Rope, tuple[str, str]]] = []
        self.keys_of: dict[int, tuple[str, str]] = {}
        self._is_guarded = False
        self._tables = RotaryTables(ctx.graph, max_length, ctx.io)
        self._masks: dict[int | None, str] = {}
        self._biased: dict[tuple[int | None, Alibi], str] = {}
        self._factors: dict[PositionScale, str] = {}

    def table(self, rope: Rope) -> RotaryTable:
        """Cosines and sines; layers with equal parameters share them."""
        return self._tables.of(rope)

    @cached_property
    def _new_tokens(self) -> str:
        """``[S]``."""
        return self._graph.node("Shape", [self._ctx.ids], "", start=1, end=2)

    @cached_property
    def _tokens(self) -> str:
        """Number of tokens in every row, including past ones: ``(B, 1)``, int64."""
        return self._graph.node("ReduceSum", [self.mask, self._graph.ints(1)], "", keepdims=1)

    @cached_property
    def lengths(self) -> tuple[str, str]:
        """``seqlens_k (B,)`` and ``total_sequence_length ()`` of GroupQueryAttention, int32."""
        tokens = self._graph.node("ReduceSum", [self.mask, self._graph.ints(1)], "", keepdims=0)
        last = self._graph.node("Sub", [tokens, self._graph.ints(1)], "")
        total = self._graph.node("Shape", [self.mask], "", start=1, end=2)
        scalar = self._graph.node("Squeeze", [total], "")
        return self._graph.cast(last, DType.I32, ""), self._graph.cast(scalar, DType.I32, "")

    def guarded(self, value: str, at: str) -> str:
        """``value (B, S, ...)``, but without a finite number in rows that are padded on the left, in the first layer that asks.

        GroupQueryAttention would take their last tokens for padding, and give numbers that are wrong without a word. What is divided
        by the mask's 0 is infinite, and the softmax of it NaN. That costs three operators, once per graph.
        """
        if self._is_guarded:
            return value
        self._is_guarded = True
        graph = self._graph
        first = graph.node("Gather", [self._own, graph.constant(np.zeros((1, 1), np.int64))], "", axis=1)
        one = graph.cast(first, self._ctx.io, "")
        return graph.node("Div", [value, one], at)

    @cached_property
    def positions(self) -> str:
        """Position of every new token ``(B, S)``, int64."""
        if self.places:
            return self.places
        graph = self._graph
        if self._ctx.target.attention == "gqa":
            return self._counted
        return graph.node("Max", [self._new_positions, graph.ints(0)], "")

    @cached_property
    def _counted(self) -> str:
        """Places of new tokens behind the past ``(B, S)``, where rows are padded on the right.

        The length of the past is what the mask has beyond S.
        """
        graph = self._graph
        past = graph.node("Max", [graph.node("Sub", [self._tokens, self._new_tokens], ""), graph.ints(0)], "")
        return graph.node("Add", [past, self._range(self._new_tokens)], "")

    @cached_property
    def real(self) -> str:
        """Which new tokens are no padding ``(B, S)``, bool."""
        graph = self._graph
        if self._ctx.target.attention == "gqa":  # of a new token the mask may have its one elsewhere
            return graph.node("Less", [self._counted, self._tokens], "")
        start = graph.node("Neg", [self._new_tokens], "")
        return graph.cast(graph.node("Slice", [self.mask, start, graph.ints(END), graph.ints(1)], ""), DType.BOOL, "")

    @cached_property
    def last_new(self) -> str:
        """Number of new tokens of every row up to its last that is no padding ``(B, 1)``, int64."""
        graph = self._graph
        ends = graph.node("Add", [self._range(self._new_tokens), graph.ints(1)], "")
        ends = graph.node("Mul", [graph.cast(self.real, DType.I64, ""), ends], "")
        return graph.node("ReduceMax", [ends, graph.ints(1)], "", keepdims=1)

    def shifted_positions(self, rows: RotaryTable) -> str:
        """Row indices into a rotary table: positions, or the second half of the table for long sequences."""
        if not rows.original:
            return self.positions
        graph = self._graph
        longest = graph.node("ReduceMax", [self._tokens], "", keepdims=0)
        is_long = graph.node("Greater", [longest, graph.number(rows.original, DType.I64)], "")
        shift = graph.node("Mul", [graph.cast(is_long, DType.I64, ""), graph.number(rows.rows, DType.I64)], "")
        return graph.node("Add", [self.positions, shift], "")

    def grid_angles(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines of every new token ``(B, S, dims / 2)``, each pair's by its place in time, height or width."""
        for known, values in self._grids:
            if known == rope:
                return values
        graph, rows = self._graph, self.table(rope)
        chosen = np.equal.outer(np.arange(3), np.array(rope.axes))[:, None, None].astype(graph.numpy_type(self._ctx.io))
        angles = []
        for table in (rows.cos, rows.sin):
            every = graph.node("Gather", [table, self.places], "", axis=0)
            kept = graph.node("Mul", [every, graph.constant(chosen)], "")
            angles.append(graph.node("ReduceSum", [kept, graph.ints(0)], "", keepdims=0))
        self._grids.append((rope, (angles[0], angles[1])))
        return angles[0], angles[1]

    def query_factor(self, scale: PositionScale) -> str:
        """Factor on the queries of every new token ``(B, S)``; layers with equal parameters share it."""
        if scale not in self._factors:
            graph = self._graph
            periods = graph.node("Div", [self.positions, graph.number(scale.period, DType.I64)], "")  # rounds down
            counted = graph.cast(graph.node("Add", [periods, graph.number(1, DType.I64)], ""), DType.F32, "")
            grown = graph.node("Mul", [graph.node("Log", [counted], ""), graph.number(scale.beta, DType.F32)], "")
            factor = graph.node("Add", [grown, graph.number(1.0, DType.F32)], "")
            self._factors[scale] = factor if self._ctx.io is DType.F32 else graph.cast(factor, self._ctx.io, "")
        return self._factors[scale]

    def _range(self, length: str) -> str:
        """``0 ... length - 1`` for a length ``[n]``."""
        zero, step = (self._graph.number(n, DType.I64) for n in (0, 1))
        return self._graph.node("Range", [zero, self._graph.node("Squeeze", [length], ""), step], "")

    @cached_property
    def _key_positions(self) -> str:
        """Position of every key ``(B, T)``: the number of tokens in the mask before it."""
        counted = self._graph.node("CumSum", [self.mask, self._graph.number(1, DType.I64)], "")
        return self._graph.node("Sub", [counted, self._graph.ints(1)], "")

    @cached_property
    def _new_positions(self) -> str:
        """The last S key positions; -1 for padding before the first token."""
        graph = self._graph
        start = graph.node("Neg", [self._new_tokens], "")
        return graph.node("Slice", [self._key_positions, start, graph.ints(END), graph.ints(1)], "")

    def allowed(self, window: int | None) -> str:
        """Visible keys ``(B, 1, S, T)``, bool: tokens up to the query, the last `window` of them.

        A query always sees its own key, so that padding before a sequence attends to something and never becomes NaN.
        """
        if window not in self._masks:
            self._masks[window] = self._allowed(window)
        return self._masks[window]

    def visible(self, window: int | None, alibi: Alibi | None) -> str:
        """The mask of the standard operator: `allowed`, or with `alibi` what is added to the scores ``(B, H, S, T)``."""
        allowed = self.allowed(window)
        if alibi is None:
            return allowed
        if (window, alibi) not in self._biased:
            self._biased[window, alibi] = masked_bias(self._ctx, self._bias(alibi), allowed)
        return self._biased[window, alibi]

    def _bias(self, alibi: Alibi) -> str:
        """``scale slope position`` of every key, less that of the query unless it is rounded: small numbers are exact."""
        graph = self._graph
        key, query = self._columns
        slopes = np.array(alibi.slopes, np.float32)[None, :, None, None]
        if alibi.rounded:
            places = graph.node("Unsqueeze", [self._bfloat16(graph.cast(key, DType.F32, "")), graph.ints(1)], "")
            product = graph.node("Mul", [places, self._bfloat16(graph.constant(slopes))], "")
            bias = graph.node("Mul", [self._bfloat16(product), graph.number(alibi.scale, DType.F32)], "")
        else:
            distance = graph.cast(graph.node("Sub", [key, query], ""), DType.F32, "")
            places = graph.node("Unsqueeze", [distance, graph.ints(1)], "")
            bias = graph.node("Mul", [places, graph.constant(slopes * np.float32(alibi.scale))], "")
        return bias if self._ctx.io is DType.F32 else graph.cast(bias, self._ctx.io, "")

    def _bfloat16(self, value: str) -> str:
        """Round a float32 value to bfloat16."""
        return self._graph.cast(self._graph.cast(value, DType.BF16, ""), DType.F32, "")

    def _allowed(self, window: int | None) -> str:
        graph = self._graph
        key, query = self._columns
        conditions: list[str] = [self._causal if not self.types else self._causal_or_same_image]
        if window is not None:
            first = graph.node("Sub", [query, graph.number(window, DType.I64)], "")
            conditions.append(graph.node("Greater", [key, first], ""))
        value = conditions[0]
        for condition in conditions[1:]:
            value = graph.node("And", [value, condition], "")
        return graph.node("Unsqueeze", [graph.node("Or", [value, self._self_seen], ""), graph.ints(1)], "")

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """Positions of keys ``(B, 1, T)`` and queries ``(B, S, 1)``."""
        return (
            self._graph.node("Unsqueeze", [self._key_positions, self._graph.ints(1)], ""),
            self._graph.node("Unsqueeze", [self._new_positions, self._graph.ints(2)], ""),
        )

    @cached_property
    def _causal(self) -> str:
        """Whether a key is a token at or before the query ``(B, S, T)``."""
        graph = self._graph
        key, query = self._columns
        is_token = graph.cast(graph.node("Unsqueeze", [self.mask, graph.ints(1)], ""), DType.BOOL, "")
        return graph.node("And", [graph.node("LessOrEqual", [key, query], ""), is_token], "")

    @cached_property
    def _causal_or_same_image(self) -> str:
        """The same, or a token of the same image; images are runs of ones in `types`, and each is in one call."""
        graph = self._graph
        image = graph.node("Equal", [self.types, graph.number(1, DType.I64)], "")
        number = graph.cast(image, DType.I64, "")
        shift = graph.node("Pad", [number, graph.ints(1, -1), "", graph.ints(1)], "")  # the token before
        begins = graph.node("Max", [graph.node("Sub", [number, shift], ""), graph.ints(0)], "")
        group = graph.node("Mul", [graph.node("CumSum", [begins, graph.number(1, DType.I64)], ""), number], "")
        past = graph.node("Sub", [graph.node("Shape", [self.mask], "", start=1, end=2), self._new_tokens], "")
        pads = graph.node("Concat", [past, graph.ints(0)], "", axis=0)
        keys = graph.node("Unsqueeze", [graph.node("Pad", [group, pads, "", graph.ints(1)], ""), graph.ints(1)], "")
        queries = graph.node("Unsqueeze", [group, graph.ints(2)], "")
        same = graph.node("Equal", [keys, queries], "")
        same = graph.node("And", [same, graph.node("Greater", [queries, graph.ints(0)], "")], "")
        is_token = graph.cast(graph.node("Unsqueeze", [self.mask, graph.ints(1)], ""), DType.BOOL, "")
        return graph.node("Or", [self._causal, graph.node("And", [same, is_token], "")], "")

    @cached_property
    def _self_seen(self) -> str:
        """Whether key and query have the same index ``(S, T)``."""
        graph = self._graph
        total = graph.node("Shape", [self.mask], "", start=1, end=2)
        keys = self._range(total)
        start = graph.node("Neg", [self._new_tokens], "")
        queries = graph.node("Slice", [keys, start, graph.ints(END), graph.ints(0)], "")
        return graph.node("Equal", [keys, graph.node("Unsqueeze", [queries, graph.ints(1)], "")], "")
