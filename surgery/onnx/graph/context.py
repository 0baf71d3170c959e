# SPDX-License-Identifier: Apache-2.0
"""What all components of a graph under construction need, and the few values that all layers share.

Hidden states are rows ``(B*S, D)`` if linear maps are Gemm, otherwise ``(B, S, D)``; no linear map needs a reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from surgery.onnx.graph.contract import Slot
from surgery.onnx.graph.dims import BATCH, CHOICES, SEQUENCE
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.opset import NEWEST
from surgery.onnx.graph.target import OperatorSet
from surgery.onnx.graph.virtual_tokens import Virtual
from surgery.onnx.graph.weights import GraphWeights
from surgery_formats.dtypes import DType

__all__ = ["CacheValues", "Context", "ResidualStream", "module_of"]


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The residual stream: ``value + pending``, summed by its reader, which may be a norm that adds in passing.

    Attributes:
        value: Hidden states.
        pending: A branch not yet added, or empty.
    """

    value: str
    pending: str = ""


@dataclass(frozen=True, slots=True)
class CacheValues:
    """Names of one layer's inputs and outputs, each ``(B, kv_heads, tokens, head_dim)``."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass
class Context:
    """A graph under construction, its weights, and how it is built.

    Attributes:
        graph: The graph.
        weights: The checkpoint's weights.
        target: The operators to use.
        io: Type of hidden states, logits and cache.
        ids: Input of token ids ``(B, S)``.
        slotted: Weights that get a slot for a LoRA, under the recipe's names, except that a tied head is called `head`.
        required: Whether slots are inputs without a default.
        packed: Whether weights of the same input share a slot.
        head: Name of a tied head: it shares the embedding's weight but not its slot.
        virtual: Soft prompts.
        slots: The slots made so far.
        real: Returns which new tokens are no padding ``(B, S)``, bool.
        choices: Whether inputs are the choices of questions, ``(B, C, S)``, which are rows inside the graph.
        batch: Size of the inputs' first axis: a name, or 1.
        position_ids: Whether positions are an input of the graph.
        images: How images stand among embeddings, see `Model`; ``row`` where there are tokens alone.
        keep_logits: Whether the number of positions whose logits are computed is an input.
        sequence: Number of tokens, or the name of the axis.
        in_front: Number of tokens in front of those of an image's patches.
        opset: Of ONNX's own operators; an older one for nodes that are put into a graph of another exporter.
    """

    graph: Graph
    weights: GraphWeights
    target: OperatorSet
    io: DType
    ids: str = "input_ids"
    slotted: frozenset[str] = frozenset()
    required: bool = False
    packed: bool = False
    head: str = ""
    virtual: Virtual = field(default_factory=Virtual)
    slots: list[Slot] = field(default_factory=list)
    real: Callable[[], str] = str
    position_ids: bool = False
    images: str = "row"
    keep_logits: bool = False
    sequence: int | str = SEQUENCE
    in_front: int = 0
    opset: int = NEWEST
    choices: bool = False
    batch: str | int = BATCH

    def per_token(self, name: str) -> str:
        """Add an input with an integer for each token, as rows ``(B, S)``."""
        if not self.choices:
            return self.graph.input(name, DType.I64, (self.batch, SEQUENCE))
        value = self.graph.input(name, DType.I64, (self.batch, CHOICES, SEQUENCE))
        length = self.graph.node("Shape", [value], "", start=2, end=3)
        shape = self.graph.node("Concat", [self.graph.ints(-1), length], "", axis=0)
        return self.graph.node("Reshape", [value, shape], "")

    @property
    def flat(self) -> bool:
        """Whether hidden states are rows."""
        return self.target.linear == "gemm"

    @cached_property
    def _batch_shape(self) -> str:
        """``[B, S, -1]``."""
        shape = self.graph.node("Shape", [self.ids], "", start=0, end=2)
        return self.graph.node("Concat", [shape, self.graph.ints(-1)], "", axis=0)

    def batched(self, value: str, at: str, *, out: str = "*") -> str:
        """Reshape rows, or anything with ``B*S`` rows, to ``(B, S, ...)``."""
        return self.graph.node("Reshape", [value, self._batch_shape], at, out=out)

    def reshaped(self, value: str, shape: Sequence[int], at: str) -> str:
        """Reshape `value`; at most one size is -1."""
        return self.graph.node("Reshape", [value, self.graph.ints(*shape)], at)

    def total(self, stream: ResidualStream, at: str) -> str:
        """Add the pending branch."""
        return self.graph.node("Add", [stream.value, stream.pending], at) if stream.pending else stream.value


def module_of(weight: str) -> str:
    """``model.norm.weight`` -> ``model.norm``."""
    return weight.rpartition(".")[0] or weight
