# SPDX-License-Identifier: Apache-2.0
"""Where in the layers two models, or two adapters, differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.reports.conflict import conflict_charts
from surgery.reports.layer_grid import layer_chart
from surgery.reports.sections import Chart

if TYPE_CHECKING:
    from surgery.comparison.entries import ModuleDiff, TensorDiff

__all__ = ["module_charts", "tensor_charts"]


def tensor_charts(tensors: Sequence[TensorDiff]) -> Iterator[Chart]:
    """Differences of tensors relative to A's norm, and the directions they spread over where that is known."""
    values = [(tensor.name, tensor.values) for tensor in tensors if tensor.values is not None]
    sizes = ((name, value.difference**2, value.norm**2) for name, value in values)
    ranks = ((name, value.profile.stable_rank, 1.0) for name, value in values if value.profile is not None)
    intruders = ((name, float(value.intruders), 1.0) for name, value in values if value.intruders is not None)
    charts = (
        layer_chart("Difference relative to A", sizes, _root, log=True),
        layer_chart("Stable rank of the difference", ranks, _mean, log=True, low=1.0),
        layer_chart("Intruder directions of B", intruders, _mean, type="number", low=0.0),
    )
    yield from filter(None, charts)


def module_charts(modules: Sequence[ModuleDiff]) -> Iterator[Chart]:
    """Norms and cosines of deltas by layer, and how the two get in each other's way if they differ."""
    norms = ((module.name, module.a.norm**2, 1.0) for module in modules if module.a and module.a.norm)
    others = ((module.name, module.b.norm**2, 1.0) for module in modules if module.b and module.b.norm)
    cosines = (
        (module.name, module.cosine, 1.0)
        for module in modules
        if module.cosine is not None and module.status != "equal"
    )
    charts = (
        layer_chart("Norm of A's delta", norms, _norm, log=True),
        layer_chart("Norm of B's delta", others, _norm, log=True),
        layer_chart("Cosine of the deltas", cosines, _mean, low=-1.0, high=1.0),
    )
    yield from filter(None, charts)
    yield from conflict_charts({module.name: module.conflict for module in modules if module.conflict is not None})


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else (math.inf if part else 0.0)


def _norm(squares: float, count: float) -> float:
    return math.sqrt(squares) if count else math.nan


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
