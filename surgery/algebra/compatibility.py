# SPDX-License-Identifier: Apache-2.0
"""Whether adapters can be combined at all, before any weight is looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.engine.input_checks import check_base_id
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["check_compatible"]


def check_compatible(terms: Sequence[WeightedAdapter], base: Checkpoint | None) -> list[str]:
    """Refuse adapters without deltas, or of different bases.

    Returns:
        Warnings.

    Raises:
        FitError: an adapter cannot be one of several that are added up.
    """
    warnings = []
    for term in terms:
        if not math.isfinite(term.weight):
            raise FitError(f"a weight of {term.weight}", file=term.adapter.path)
        _check_has_deltas(term.adapter)
        warnings += [f"{term.name}: {issue}" for issue in term.adapter.known_issues()]
        if term.weight == 0.0:
            warnings.append(f"{term.name}: its weight is 0, so it is left out")
    adapters = [term.adapter for term in terms]
    if len({adapter.base_id for adapter in adapters if adapter.base_id}) > 1:
        raise FitError("the adapters record different bases: their deltas cannot be added")
    if base is not None:
        check_base_id(base, adapters)
    names = sorted({adapter.base_name.rstrip("/").rpartition("/")[2] for adapter in adapters if adapter.base_name})
    if len(names) > 1:
        warnings.append(f"the adapters name different bases: {listing(names)}")
    if len({adapter.keeps_ties for adapter in adapters}) > 1:
        warnings.append(
            "mlx-lm lets a tied head follow its embedding, the other format does not: the first one's rule holds"
        )
    return warnings


def _check_has_deltas(adapter: Adapter) -> None:
    check_consumed(adapter)
    if adapter.prompt is not None:
        raise FitError(f"{adapter.kind} trains virtual tokens, not weights: there is nothing to add", file=adapter.path)
    if not adapter.updates:
        raise FitError("the adapter holds no tensors", file=adapter.path)
