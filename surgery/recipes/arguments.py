# SPDX-License-Identifier: Apache-2.0
"""The arguments of a step as its verb takes them: inputs and results in the place of their names, options of ranks as one choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.arguments import check_types
from surgery.engine.recorded import with_file
from surgery.rank import Rank
from surgery.recipes.recipe import RANKED, Operand, Step
from surgery_formats.errors import UsageError

__all__ = ["step_arguments"]


def step_arguments(step: Step, inputs: Mapping[str, Path], results: Mapping[str, Any]) -> dict[str, Any]:
    """By parameter, without those that only `apply` knows: output, overwrite, progress.

    Args:
        step: Whose.
        inputs: Where the recipe's inputs lie, by name.
        results: Of earlier steps, by name: a path, or what is in memory.

    Raises:
        UsageError: an argument of a wrong type, operands that the parameter does not take, or a choice of ranks that is none.
    """
    arguments = dict(step.arguments)
    ranked = {name: arguments.pop(name) for name in RANKED if name in arguments and step.chooses_ranks}
    if ranked:
        arguments["rank"] = _rank(step, ranked)
    if isinstance(vocab := arguments.get("vocab"), str):
        arguments["vocab"] = with_file(vocab, lambda file: str(inputs.get(file, file)))
    for name, given in step.operands.items():
        several = "AdaptersLike" in str(step.parameters[name].annotation)
        found = [_resolved(step, operand, inputs, results, several=several) for operand in given]
        if not several and len(found) != 1:
            raise step.fail(f"{name} names {len(found)} things")
        arguments[name] = found if several else found[0]
    check_types(step.function.__annotations__, arguments)  # here, since not all steps call their verb
    return arguments


def _resolved(
    step: Step, operand: Operand, inputs: Mapping[str, Path], results: Mapping[str, Any], *, several: bool
) -> Any:
    text = operand.text
    if text in results:
        value: Any = results[text]
    elif text in inputs:
        value = inputs[text]
    elif text.removesuffix(".adapter") in results:
        raise step.fail(f"'{text}': that step moved no adapter")
    else:
        value = text
    if operand.weight == 1.0:
        return value
    if not several:
        raise step.fail(f"'{text}' takes no weight here")
    return value, operand.weight


def _rank(step: Step, told: Mapping[str, Any]) -> Rank:
    """One choice of ranks out of the options that make it."""
    number = told.get("rank")
    if not (number in (None, "auto") or type(number) is int):
        raise step.fail(f"rank is a whole number or auto, not '{number}'")
    rank = Rank.auto if number == "auto" else Rank(number, told.get("rank_pattern") or {})
    try:
        for name, make in (("energy", Rank.energy), ("max_error", Rank.error), ("budget", Rank.budget)):
            if told.get(name) is not None:
                rank = rank & make(told[name])
    except UsageError as error:
        raise step.fail(error.message, error.hint) from error
    return rank
