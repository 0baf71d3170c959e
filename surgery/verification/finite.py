# SPDX-License-Identifier: Apache-2.0
"""Can the logits prove anything: are they finite in the type that a graph computes in, and not all 0?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.reference.stored import LARGEST_HALF, Stored, watched
from surgery.verification.logit_difference import SOFT_PROMPT, LogitDifference
from surgery_formats.errors import ProofError
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery.verification.session import GraphFile

__all__ = ["check_finite", "fits_half", "nothing_to_compare"]

_NEAR = 0.5  # of the largest: rounding on the way may carry less of it beyond

Measure = Callable[[], Sequence[LogitDifference]]


def check_finite(graph: GraphFile, measures: Sequence[LogitDifference], seen: Stored) -> None:
    """Refuse logits that are not finite in float32, or all 0: a weight is damaged, or far too large.

    A soft prompt may be 0: it is what was stored, not what was computed. So may be some of the comparisons: the head of a task
    that the base does not have is 0 until a slot is filled.

    Raises:
        ProofError: a logit is NaN or Inf, or all of every comparison are 0.
    """
    if not all(math.isfinite(measure.size) for measure in measures):
        raise ProofError(
            f"logits are not finite: the first values that are not are those of {show(seen.beyond, 200)}",
            file=graph.path,
            hint="the weights are damaged, or were before the export",
        )
    computed = [measure for measure in measures if measure.name != SOFT_PROMPT]
    if computed and not any(measure.size for measure in computed):
        raise nothing_to_compare(graph.path, computed[0].name)


def nothing_to_compare(graph: Path, what: str) -> ProofError:
    """The error for a reference that computes nothing but 0: a graph that is wrong may agree with it."""
    return ProofError(
        f"{what}: all that the model itself computes is 0, which gives nothing to compare",
        file=graph,
        hint="its weights are 0, or so large that a norm makes 0 of them: check them, and the weights of the adapters",
    )


def fits_half(graph: GraphFile, seen: Stored, again: Measure) -> str:
    """What is said of a graph of float16 whose values fit.

    Args:
        graph: The graph.
        seen: What the model computed in float32.
        again: Computes all once more.

    Raises:
        ProofError: with every stored value rounded to float16 a logit is NaN or Inf.
    """
    if seen.largest > _NEAR * LARGEST_HALF:
        with watched(torch.float16) as rounded:
            measures = again()
        if not all(math.isfinite(measure.size) for measure in measures):
            raise ProofError(
                f"logits are not finite in fp16: values of {show(rounded.beyond, 200)} are beyond {LARGEST_HALF:,.0f} "
                f"(the largest of all is {seen.largest:,.0f}); where a runtime computes in fp32 inside, it does not show",
                file=graph.path,
                hint='export with `dtype="bf16"` or `dtype="fp32"`',
            )
    return f"{seen.largest:,.4g} at most, {show(seen.where, 120)}; fp16 ends at {LARGEST_HALF:,.0f}"
