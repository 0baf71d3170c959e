# SPDX-License-Identifier: Apache-2.0
"""Where the result of each step of a recipe is to be, before anything is done: as little is written as can be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from surgery.recipes.apply_result import Place
from surgery.recipes.recipe import OUTPUTS, Operand, Recipe, Step
from surgery_formats.text import show

__all__ = ["adds_to", "check_apart", "outputs_of", "placed_steps"]

_FOLDED = {"base", "adapters"}
"""All that a merge may say that an export takes over."""

_OF_FILES = {"dtype", "to", "shard_size", "adapter_output"}
"""What is said of the files of a result, and what is written beside it: there is none of that in memory."""


def check_apart(steps: Sequence[Step]) -> None:
    """Refuse outputs that are one, or lie in one another, before anything is written.

    An export may add its files to the folder of the model that an earlier step writes.

    Raises:
        UsageError: such outputs.
    """
    known: list[tuple[str, Step]] = []
    for step in steps:
        more = [step.arguments.get(name) for name in OUTPUTS]
        for text in (step.output, *more):
            if not isinstance(text, str) or not text:
                continue
            path = os.path.realpath(text)
            for other, owner in known:
                if path == other and not adds_to(step, owner):
                    raise step.fail(f"'{show(text)}' is an output of {owner.title} too")
                if path != other and os.path.commonpath((path, other)) in (path, other):
                    raise step.fail(f"'{show(text)}' and an output of {owner.title} lie in one another")
            known.append((path, step))


def adds_to(step: Step, owner: Step) -> bool:
    """Whether a step adds its files to the folder that an earlier one writes."""
    base = step.operands.get("base", ())
    same = bool(step.output and owner.output) and os.path.realpath(step.output) == os.path.realpath(owner.output)
    return step.verb == "export-onnx" and same and [one.text for one in base] == [owner.name]


def outputs_of(step: Step, place: Place, folder: Path | None) -> tuple[Path, ...]:
    """What a step writes: its result, an adapter that it moves, and other outputs.

    Args:
        step: One that writes.
        place: Of its result.
        folder: For what is written and not kept.
    """
    adapter = step.arguments.get("adapter_output")
    if adapter is None and "adapter" in step.operands and "adapter_output" in step.parameters:
        assert folder is not None
        adapter = folder / f"{step.name or step.number}.adapter"
    others = (step.arguments.get(name) for name in OUTPUTS if name != "adapter_output")
    more = [Path(one) for one in (adapter, *others) if one]
    return (Path(step.output) if place == "output" else _in_folder(step, folder), *more)


def _in_folder(step: Step, folder: Path | None) -> Path:
    """Where a result is written that only later steps read; formats of one file are told by their ending."""
    from surgery_formats.adapters.registry import format_to_write

    assert folder is not None
    to = step.arguments.get("to")
    if step.verb == "convert" and isinstance(to, str) and (target := format_to_write(to)).single_file:
        suffix = {"gguf": ".gguf", "torchtune": ".pt", "keras": ".lora.h5"}.get(target.name, ".safetensors")
        return folder / f"{step.name or step.number}{suffix}"
    return folder / (step.name or str(step.number))


def placed_steps(recipe: Recipe) -> list[tuple[Step, Place]]:
    """Every step with the place of its result.

    A merge whose only user is an export, and that says nothing but what to merge, becomes that export's.

    Raises:
        UsageError: a result that nobody uses and that is written nowhere; a name that is used before it is there.
    """
    users: dict[str, list[Step]] = {step.name: [] for step in recipe.steps if step.name}
    known = set(recipe.inputs)
    for step in recipe.steps:
        for operand in (one for given in step.operands.values() for one in given):
            name = operand.text.removesuffix(".adapter")
            if name in users and name not in known:
                raise step.fail(f"'{name}' is the result of a later step")
            if name in users:
                users[name].append(step)
        known |= {step.name} if step.name else set()
    rebuilt = {step.name for step in recipe.steps if step.verb == "layers"}
    placed: list[tuple[Step, Place]] = []
    folded: dict[str, Step] = {}
    for step in recipe.steps:
        own = users.get(step.name, [])
        if step.verb == "verify":
            place: Place = "check"
        elif step.output:
            place = "output"
        elif not own:
            hint = "name the folder to make: `output=OUT`" if recipe.recorded is not None else "give it an `output:`"
            raise step.fail("its result is written nowhere, and no step uses it", hint)
        elif step.written:
            place = "temporary"
        elif _can_fold(step, own) and not rebuilt & {one.text for one in step.operands.get("base", ())}:
            place = "folded"
            folded[step.name] = step
        elif _OF_FILES & step.arguments.keys():
            place = "temporary"
        elif step.verb in ("combine", "resize") or (step.verb == "layers" and all(one.verb == "merge" for one in own)):
            place = "memory"  # a graph refers to files, and a rebuilt model has none
        else:
            place = "temporary"
        placed.append((_with_folded(step, folded), place))
    return placed


def _can_fold(step: Step, users: Sequence[Step]) -> bool:
    return (
        step.verb == "merge"
        and len(users) == 1
        and users[0].verb == "export-onnx"
        and users[0].operands.get("base") == (Operand(step.name),)
        and not {"merge", "adapters"} & users[0].operands.keys()
        and not step.arguments
        and step.operands.keys() <= _FOLDED
    )


def _with_folded(step: Step, folded: Mapping[str, Step]) -> Step:
    """An export that does the merge in front of it, too."""
    base = step.operands.get("base", ())
    merge = folded.get(base[0].text) if step.verb == "export-onnx" and len(base) == 1 else None
    if merge is None:
        return step
    operands = {**step.operands, "base": merge.operands["base"], "merge": merge.operands["adapters"]}
    return replace(step, operands=operands)
