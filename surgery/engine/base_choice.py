# SPDX-License-Identifier: Apache-2.0
"""Which base gives the behaviour that an adapter had when it was trained, in words and from measurements."""

from __future__ import annotations

from surgery.engine.as_trained import rule_values
from surgery.engine.base_gap import BaseGap, base_gap
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.quantised_base import QuantisedBase
from surgery_formats.text import show

__all__ = ["cost_of_other_base", "times"]


def cost_of_other_base(binding: Binding, adapter: int, trained_on: QuantisedBase) -> str:
    """A warning that an adapter was trained on a quantised base, and what it costs to merge it into the release.

    What its rounding did is worked out where bitsandbytes quantised the release on the fly, from a few rows.
    """
    name = show(binding.adapters[adapter][0].path.name)
    said = (
        f"{name}: was trained on a base in {trained_on.method} ({trained_on.evidence}), and this one is not quantised"
    )
    if not trained_on.rule:
        return f"{said}: without that base it cannot be told what this costs; --as-trained takes its values"
    gap = base_gap(binding, rule_values(trained_on.rule, binding.checkpoint).weights, adapter=adapter, sampled=True)
    if not gap.weights:
        return f"{said}; --as-trained {trained_on.rule} adds the error of that rounding back"
    return (
        f"{said}: the output lacks the error of that rounding, {times(gap)} the norm of the update (from "
        f"{gap.read:.1%} of the values); --as-trained {trained_on.rule} adds it back"
    )


def times(gap: BaseGap) -> str:
    """``3.1 times``: the distance of two bases in norms of an update."""
    return f"{gap.beside:.2g} times"
