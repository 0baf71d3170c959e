# SPDX-License-Identifier: Apache-2.0
"""The graphs of an encoder-decoder: its encoder, and its decoder's two runs, apart and as branches of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surgery.onnx.graph.branches import as_branches
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.crossed import crossed_decoder
from surgery.onnx.graph.encoder import encoder
from surgery.onnx.graph.graph import Graph
from surgery_formats.models.families.recipe import Model

__all__ = ["PairContexts", "pair_contexts"]


@dataclass(frozen=True)
class PairContexts:
    """What was built.

    Attributes:
        encoder: The encoder.
        first: The decoder's first run.
        begun: All its others.
    """

    encoder: Context
    first: Context
    begun: Context

    def __iter__(self) -> Iterator[Context]:
        return iter((self.encoder, self.first, self.begun))

    def merged(self) -> Graph:
        """Both runs in one graph."""
        return as_branches(self.first.graph, self.begun.graph)


def pair_contexts(model: Model, new: Callable[[], Context], length: int) -> PairContexts:
    """Build the three graphs, each in a context that `new` makes.

    Raises:
        FitError: a tensor is missing or misshapen, or is in no graph.
    """
    assert model.encoder is not None
    built = PairContexts(new(), new(), new())
    encoder(built.encoder, model.encoder, length)
    crossed_decoder(built.first, model, begun=False)
    crossed_decoder(built.begun, model, begun=True)
    elsewhere = dict.fromkeys(built.encoder.weights.used, "the encoder reads it")
    built.first.weights.check({**model.encoder.unused, **model.unused, **elsewhere})
    return built
