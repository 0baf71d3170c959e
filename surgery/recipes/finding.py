# SPDX-License-Identifier: Apache-2.0
"""The inputs of a recipe, found and checked; and the recipe as a manifest keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.inputs import StrPath, as_path
from surgery.engine.nearby import nearby_inputs
from surgery.engine.recorded import InputNames, input_digest, with_file
from surgery.recipes.recipe import Input, Recipe, Step
from surgery_formats.errors import FitError, NotFoundError, UsageError
from surgery_formats.text import closest, show

__all__ = ["found_inputs", "kept_recipe"]


def found_inputs(recipe: Recipe, told: Mapping[str, StrPath]) -> dict[str, Path]:
    """Where the inputs lie, those of a manifest checked by their content.

    A manifest knows contents alone: an input is looked for here and beside the folder of the manifest, unless it is told.

    Raises:
        UsageError: something is told that the recipe does not name.
        NotFoundError: an input is not there.
        FitError: something else lies there.
    """
    if unknown := [name for name in told if name not in recipe.inputs]:
        raise UsageError(f"the recipe has no input '{show(unknown[0])}'", hint=closest(unknown[0], recipe.inputs))
    if made := [name for name, one in recipe.inputs.items() if one.made]:
        raise FitError(
            f"the input '{show(made[0])}' was in memory and not in a file",
            file=recipe.path,
            hint="write a recipe instead",
        )
    return {name: _found(recipe, name, one, told.get(name)) for name, one in recipe.inputs.items()}


def _found(recipe: Recipe, name: str, one: Input, told: StrPath | None) -> Path:
    if told is not None:
        path = as_path(told, name)
    elif recipe.recorded is None:
        path = as_path(one.reference, name)
    else:
        found = next((place for place in nearby_inputs(recipe.path) if input_digest(place) == one.files), None)
        if found is None:
            raise NotFoundError(
                f"the input '{show(name)}' is neither here nor beside the manifest's folder",
                file=recipe.path,
                hint=f"say where it lies: `inputs={show(name)}=PATH`",
            )
        return found
    if not path.exists():
        raise NotFoundError(f"the input '{show(name)}' is not there", file=path)
    if one.files and input_digest(path) != one.files:
        raise FitError(f"is not the input '{show(name)}' that the recipe was applied to", file=path)
    return path


def kept_recipe(recipe: Recipe, inputs: Mapping[str, Path], last: Step) -> Mapping[str, Any]:
    """The part of a recipe that leads to the result of a step, for its manifest.

    Inputs are said by name and content, and every reference is one of them, or an earlier result.
    """
    if recipe.recorded is not None:
        return {**recipe.recorded["recipe"], "version": __version__}
    names, steps = InputNames(), []
    leading = _leading(recipe, last)
    results = {step.name for step in leading if step.name}
    for step in leading:
        kept: dict[str, Any] = {"verb": step.verb, **step.arguments}
        kept.pop("adapter_output", None)
        if isinstance(vocab := kept.get("vocab"), str):
            kept["vocab"] = with_file(vocab, lambda file: names.name_of("vocab", inputs.get(file, file)))
        for argument, given in step.operands.items():
            said = []
            for operand in given:
                text = operand.text
                if text.removesuffix(".adapter") not in results:
                    with step.located():
                        text = names.name_of(argument, inputs.get(text) or as_path(text, argument))
                said.append(text if operand.weight == 1 else {text: operand.weight})
            kept[argument] = said[0] if len(said) == 1 and isinstance(said[0], str) else said
        if step.name:
            kept["as"] = step.name
        if step.output and step is not leading[-1]:
            kept["output"] = True
        steps.append(kept)
    return {"inputs": names.inputs, "steps": steps, "version": __version__}


def _leading(recipe: Recipe, last: Step) -> list[Step]:
    """The steps that a step needs, in their order, and it."""
    wanted, found = {last.number}, []
    for step in reversed(recipe.steps):
        if step.number in wanted:
            found.append(step)
            names = {one.text.removesuffix(".adapter") for given in step.operands.values() for one in given}
            wanted |= {one.number for one in recipe.steps[: step.number - 1] if one.name in names - {""}}
    return found[::-1]
