# SPDX-License-Identifier: Apache-2.0
"""Apply: a recipe's verbs one after the other, with as few files between them as their plans allow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.engine.inputs import StrPath, as_path, local_path
from surgery.progress import Callback
from surgery.recipes.apply_result import ApplyResult, Done, Place
from surgery.recipes.arguments import step_arguments
from surgery.recipes.finding import found_inputs, kept_recipe
from surgery.recipes.placing import check_apart, placed_steps
from surgery.recipes.reading import read_recipe
from surgery.recipes.recipe import Recipe, Step
from surgery.reports.request import Request, asked
from surgery.reports.result import Result, timed
from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.output.scratch import scratch_folder
from surgery_formats.files.output.several import several_outputs
from surgery_formats.files.remote.path import on_a_disk
from surgery_formats.text import listing

__all__ = ["ApplyResult", "apply"]


@timed
def apply(
    recipe: StrPath,
    *,
    output: StrPath | None = None,
    inputs: Mapping[str, StrPath] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> ApplyResult:
    """Apply a recipe, or the one in a manifest.

    Args:
        recipe: A YAML file, or the ``surgery_manifest.json`` of an output.
        output: Of the last step; by default what the recipe says. A manifest says none.
        inputs: Where inputs lie that the recipe names.
        overwrite: Replace existing outputs, atomically.
        dry_run: Check the recipe and say what would be written where.
        progress: Called with every step.

    Returns:
        Every step with its result; of a manifest, whether the files are what they were.

    Raises:
        UsageError: a step that says something else than its verb knows; no output.
        InputError: the recipe, or an input, cannot be read.
        FitError: an input is another than the manifest's.
        SurgeryError: as the verb of a step, whose number and line the message has.
    """
    path = as_path(recipe, "recipe")
    _needs_a_disk(path)
    with _naming(path):
        return _applied(read_recipe(path), output, inputs or {}, overwrite, dry_run, progress)


def _needs_a_disk(place: StrPath) -> None:
    on_a_disk(place, "a recipe looks for its inputs, and keeps its steps, in folders beside it")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors inside that name no file are the recipe's."""
    try:
        yield
    except SurgeryError as error:
        error.file = error.file or str(path)
        raise


def _applied(
    read: Recipe,
    output: StrPath | None,
    inputs: Mapping[str, StrPath],
    overwrite: bool,
    dry_run: bool,
    progress: Callback | None,
) -> ApplyResult:
    for place in (output or "", *(step.output for step in read.steps)):
        _needs_a_disk(place)
    if output is not None:
        last = read.steps[-1]
        steps = (*read.steps[:-1], replace(last, output=str(local_path(output, "output"))))
        read = replace(read, steps=steps)
    elif dry_run and not read.steps[-1].output and read.recorded is not None:
        read = replace(read, steps=(*read.steps[:-1], replace(read.steps[-1], output="OUT")))
    check_apart(read.steps)
    placed = placed_steps(read)
    found = found_inputs(read, inputs)
    if dry_run:
        return ApplyResult(None, tuple(Done(one.number, one.verb, one.name, place) for one, place in placed))
    several = sum(place == "output" for _, place in placed) > 1
    with _temporary(placed) as folder, several_outputs(several):
        runner = _Runner(read, found, folder, overwrite, progress)
        done = tuple(runner.do(step, place) for step, place in placed)
    result = ApplyResult(done[-1].output, done, None, tuple(runner.warnings))
    return result if read.recorded is None or result.output is None else _compared(read, result)


@contextmanager
def _temporary(placed: list[tuple[Step, Place]]) -> Iterator[Path | None]:
    """A folder beside the last output, on its disk; gone afterwards, whatever happens."""
    moved = (step for step, place in placed if place == "output" and step.verb == "layers")
    if all(place != "temporary" for _, place in placed) and not any("adapter" in step.operands for step in moved):
        yield None
        return
    outputs = [Path(step.output) for step, place in placed if place == "output"]
    with scratch_folder(outputs[-1].absolute().parent if outputs else None) as folder:
        yield folder


def _compared(recipe: Recipe, result: ApplyResult) -> ApplyResult:
    """`result` with whether its files are those of the manifest."""
    assert recipe.recorded is not None
    assert result.output is not None
    manifest = result.output / MANIFEST
    made = json.loads(manifest.read_bytes()) if manifest.is_file() else {}
    old, new = (dict(one.get("files") or {}) for one in (recipe.recorded, made))
    other = sorted(name for name in {*old, *new} if not _is_same(old.get(name), new.get(name)))
    same = not other and made.get("plan") == recipe.recorded.get("plan")
    before, now = recipe.recorded["recipe"].get("version"), made.get("recipe", {}).get("version")
    told = f"; the manifest is of surgery {before}, this is {now}" if before != now else ""
    which = f": {listing(other)}" if other else ""
    warnings = () if same else (f"not all is what the manifest says{which}{told}",)
    return replace(result, same=same, warnings=(*result.warnings, *warnings))


def _is_same(old: Any, new: Any) -> bool:
    """Whether two entries are of the same file, as far as both tell: not every run takes a sha256."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return False
    return all(old[key] == new[key] for key in old.keys() & new.keys())


@dataclass
class _Runner:
    """Runs the steps.

    Attributes:
        recipe: All of them.
        inputs: Where inputs lie.
        folder: For what is written and not kept.
        overwrite: Replace outputs.
        progress: Called with every step.
        results: By name: what later steps get.
        warnings: Of all steps.
    """

    recipe: Recipe
    inputs: Mapping[str, Path]
    folder: Path | None
    overwrite: bool
    progress: Callback | None
    results: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def do(self, step: Step, place: Place) -> Done:
        """One step.

        Raises:
            SurgeryError: as its verb; the message says which step it is.
        """
        done = Done(step.number, step.verb, step.name, place)
        if place == "folded":
            return done
        with step.located():
            if place == "memory":
                self._remember(step)
                return done
            return self._written(step, place, done)

    def _remember(self, step: Step) -> None:
        """A result that is a plan and no file."""
        from surgery_formats.models.checkpoint import Checkpoint

        arguments = step_arguments(step, self.inputs, self.results)
        arguments.pop("workers", None)  # nothing is computed for a plan
        if step.verb == "layers":
            from surgery.algebra.moved_adapter import plan_move
            from surgery.engine.inputs import as_adapter, as_checkpoint
            from surgery.verbs.layers import rebuild

            adapter, base = arguments.pop("adapter", None), as_checkpoint(arguments.pop("base"))
            rebuilt = rebuild(base, **arguments)
            checkpoint: Checkpoint = rebuilt.checkpoint
            self.results[step.name] = checkpoint
            self.warnings += rebuilt.warnings
            if adapter is not None:
                self.results[f"{step.name}.adapter"] = plan_move(as_adapter(adapter), rebuilt).moved.adapter
            return
        from surgery.algebra.output import combination_id
        from surgery.verbs.combine import combined
        from surgery.verbs.resize import resized

        planned: Callable[..., Any] = combined if step.verb == "combine" else resized
        plan = planned(**arguments)
        self.results[step.name] = replace(plan.adapter, made=combination_id(plan))
        self.warnings += plan.result.warnings

    def _written(self, step: Step, place: Place, done: Done) -> Done:
        arguments = step_arguments(step, self.inputs, self.results)
        if place == "check":
            result: Result = step.function(**arguments)
            return replace(done, result=result)
        output = Path(step.output) if place == "output" else self._place(step)
        if arguments.get("adapter") is not None and "adapter_output" in step.parameters:
            arguments.setdefault("adapter_output", self._beside(step))
        if "progress" in step.parameters:
            arguments["progress"] = self.progress
        arguments["overwrite"] = self.overwrite
        with asked(Request(apply, recipe=kept_recipe(self.recipe, self.inputs, step))):
            result = step.function(**arguments, output=output)
        self.warnings += result.warnings
        if step.name:
            self.results[step.name] = output
            beside = arguments.get("adapter_output")
            if beside is not None:
                self.results[f"{step.name}.adapter"] = Path(beside)
        return replace(done, output=output if place == "output" else None, result=result)

    def _beside(self, step: Step) -> Path:
        """Where an adapter is moved to that the recipe writes nowhere."""
        assert self.folder is not None
        return self.folder / f"{step.name or step.number}.adapter"

    def _place(self, step: Step) -> Path:
        """Where a result is written that only later steps read; formats of one file are told by their ending."""
        from surgery_formats.adapters.registry import format_to_write

        assert self.folder is not None
        to = step.arguments.get("to")
        if step.verb == "convert" and isinstance(to, str) and (target := format_to_write(to)).single_file:
            suffix = {"gguf": ".gguf", "torchtune": ".pt", "keras": ".lora.h5"}.get(target.name, ".safetensors")
            return self.folder / f"{step.name or step.number}{suffix}"
        return self.folder / (step.name or str(step.number))
