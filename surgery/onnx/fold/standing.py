# SPDX-License-Identifier: Apache-2.0
"""LoRAs that a graph adds by itself, whatever it is given: the genai builder's ``adapter_path``, a traced model of PEFT's.

Weights that are found by value are the base's all the same, so that nothing but the branches tells of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from surgery.onnx.fold.branches import LoraBranch, find_branches
from surgery.onnx.fold.constants import Constants
from surgery_formats.containers.onnx import OnnxGraph

__all__ = ["standing_branches", "warning_of_branches", "what_is_added"]

_INPUTS_BY_CHOICE = 4  # IR version; before, every weight had to be an input


def standing_branches(graph: OnnxGraph, explained: Collection[str] = ()) -> tuple[LoraBranch, ...]:
    """The branches that no input can switch off or fill, and that add something.

    Args:
        graph: The graph.
        explained: Tensors whose use is known: a network may be made of small products itself.
    """
    model = graph.proto
    constants = Constants(graph, model, {}, defaults=model.ir_version < _INPUTS_BY_CHOICE)
    return tuple(
        branch
        for branch in find_branches(model, constants)
        if not explained or not set(branch.constants) <= set(explained)
        if all(factor.any() for factor in branch.factors.read())
    )


def what_is_added(branches: Sequence[LoraBranch]) -> str:
    """``the graph itself adds LoRAs to 14 weights``."""
    return (
        f"the graph itself adds {'a LoRA to 1 weight' if len(branches) == 1 else f'LoRAs to {len(branches)} weights'}"
    )


def warning_of_branches(graph: OnnxGraph) -> tuple[str, ...]:
    """A word on adapters that a change of the weights leaves where they are."""
    branches = standing_branches(graph)
    return (f"{what_is_added(branches)}, and still does: surgery fold takes them in",) if branches else ()
