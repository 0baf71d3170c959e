# SPDX-License-Identifier: Apache-2.0
"""Which base gives the behaviour that an adapter had when it was trained, in words and from measurements."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from surgery.engine.inputs import CheckpointLike
from surgery.engine.two_bases.as_trained import RULES, TrainedValues, quantised_model, rule_values, values_of
from surgery.engine.two_bases.gap import BaseGap, base_gap
from surgery.reports.base_choice import BaseChoice
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.quantised_base import QuantisedBase, quantised_base_of
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show

__all__ = ["base_choice", "cost_of_other_base", "times"]


def base_choice(adapter: Adapter, base: Checkpoint, other: CheckpointLike) -> BaseChoice:
    """Measure two bases beside an adapter, every value of the weights that it changes.

    Raises:
        FitError: the adapter does not fit, or the other base is no version of the base.
        InputError: it cannot be read.
    """
    values = _values(other, base)
    binding = bind([(adapter, 1.0)], base)
    gap = base_gap(binding, values.weights)
    own, others = _kinds(base), ", ".join(values.kinds) or _kinds(values.checkpoint or base)
    names = base.path.resolve().name, values.root.resolve().name if values.root is not None else values.name
    said = quantised_base_of(adapter)
    coded = (base.is_quantised, bool(values.quantised))
    attached = ""
    if said is not None and coded in ((True, False), (False, True)):
        attached = names[0] if coded[0] else names[1]
    update = gap.update or float("nan")
    return BaseChoice(
        adapter.path.resolve().name,
        (names[0], own),
        (names[1], others),
        "" if said is None else f"{said.method} ({said.evidence})",
        attached,
        gap.weights,
        gap.others,
        gap.apart / gap.base if gap.base else float("nan"),
        gap.beside,
        gap.rows / update,
        gap.columns / update,
        gap.both / update,
    )


def _values(other: CheckpointLike, base: Checkpoint) -> TrainedValues:
    if isinstance(other, str) and other in RULES and not Path(other).exists():
        return rule_values(other, base)
    return values_of(quantised_model(other, "other_base"), base)


def _kinds(base: Checkpoint) -> str:
    """The format of most of a model's numbers."""
    counted: Counter[str] = Counter()
    for component in base.components.values():
        for weight in component.parameters.values():
            counted[weight.storage.kind] += weight.numel
    return counted.most_common(1)[0][0]


def cost_of_other_base(binding: Binding, adapter: int, trained_on: QuantisedBase) -> str:
    """A warning that an adapter was trained on a quantised base, and what it costs to merge it into the release.

    What its rounding did is worked out where bitsandbytes quantised the release on the fly, from a few rows.
    """
    name = show(binding.adapters[adapter][0].path.name)
    said = (
        f"{name}: was trained on a base in {trained_on.method} ({trained_on.evidence}), and this one is not quantised"
    )
    if not trained_on.rule:
        return f"{said}: without that base it cannot be told what this costs; --as-trained with its folder takes its values"
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
