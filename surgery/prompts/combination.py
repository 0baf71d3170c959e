# SPDX-License-Identifier: Apache-2.0
"""Several soft prompts as one: one behind the other, or added up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from surgery.prompts.conversion import check_alone, check_positions, table_of
from surgery.prompts.made_prompt import MadePrompt
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["METHODS", "combined"]

_NOTHING = 1e-9  # of the sum of the weights without their signs: what rounding leaves of zero
METHODS = ("concatenate", "average", "mix")


def combined(prompts: Sequence[tuple[Adapter, SoftPrompt, float]], method: str) -> tuple[MadePrompt, str]:
    """The one prompt, and what was done.

    Args:
        prompts: Each with its weight.
        method: ``concatenate``; ``average``: by weights that are made to add up to 1; ``mix``: by the weights as they are.

    Raises:
        FitError: prompts of different kinds or sizes, weights that nothing is done with, or that add up to nothing.
    """
    if method not in METHODS:
        raise FitError(f"no method '{show(method, 40)}'", hint=f"one of {', '.join(METHODS)}")
    if len(prompts) < 2:
        raise FitError("two prompts or more are combined")
    for adapter, prompt, _ in prompts:
        check_alone(adapter, prompt)
        check_positions(adapter, prompt)
    (first, like, _), *others = prompts
    for adapter, prompt, _ in others:
        if (prompt.prefix, prompt.dim) != (like.prefix, like.dim):
            raise FitError(
                f"its tokens are not of the kind and size of those of '{show(first.path.name)}'", file=adapter.path
            )
        if method != "concatenate" and prompt.virtual_tokens != like.virtual_tokens:
            raise FitError(
                f"it has {prompt.virtual_tokens} virtual tokens, '{show(first.path.name)}' {like.virtual_tokens}",
                file=adapter.path,
                hint="prompts of different lengths can be put one behind the other: `method=concatenate`",
            )
    tables, weights = [table_of(prompt) for _, prompt, _ in prompts], [weight for _, _, weight in prompts]
    if method == "concatenate":
        if any(weight != 1 for weight in weights):
            raise FitError(
                "prompts that are put one behind the other have no weights", hint='`method="average"` adds them up'
            )
        table, how = np.concatenate(tables), "one behind the other"
    else:
        if method == "average":
            total = sum(weights)
            if not math.isfinite(total) or abs(total) <= _NOTHING * sum(map(abs, weights)):
                raise FitError("weights that add up to nothing, or to more than a number holds, have no average")
            weights = [weight / total for weight in weights]
        table = np.einsum("p,pij->ij", np.asarray(weights), np.stack(tables).astype(np.float64))
        how = "the sum of " + ", ".join(f"{weight:.4g}" for weight in weights) + " of each"
    kind = "PREFIX_TUNING" if like.prefix else "PROMPT_TUNING"
    names = {adapter.base_name for adapter, _, _ in prompts}
    made = MadePrompt(
        "peft", kind, np.asarray(table, np.float32), like.dim, like.prefix, names.pop() if len(names) == 1 else ""
    )
    return made, how
