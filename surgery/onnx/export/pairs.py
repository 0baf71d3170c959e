# SPDX-License-Identifier: Apache-2.0
"""What an export of an encoder-decoder does not take, and which of its graphs stand for the whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from surgery.onnx.graph.build import GraphSet
from surgery.onnx.graph.pair_names import ENCODER, MERGED
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model

if TYPE_CHECKING:
    import onnx

__all__ = ["check_pair", "whole_graphs"]


def check_pair(model: Model, *, texts: Collection[str] = (), modules: bool = False, positions: bool = False) -> None:
    """Refuse what graphs of an encoder-decoder do not have.

    Raises:
        FitError: a text to read in advance, modules that an adapter inserts, or positions as an input.
    """
    if model.encoder is None:
        return
    if texts:
        raise FitError("a text has nothing to be read into: this model has no cache of its own text alone")
    if modules:
        raise FitError(
            "no module of an adapter is inserted into an encoder-decoder", hint="LoRAs and (IA)^3 are merged"
        )
    if positions:
        raise FitError(
            "a decoder that reads an encoder's result counts its positions itself", hint="without `position_ids=`"
        )


def whole_graphs(built: GraphSet) -> list[onnx.ModelProto]:
    """The graphs that read every weight once: the main one, or those of an encoder and of the decoder for all its runs."""
    return [graph.unpacked() for name, graph in built.graphs.items() if name in ("model.onnx", ENCODER, MERGED)]
