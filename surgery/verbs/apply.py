# SPDX-License-Identifier: Apache-2.0
"""Apply: a recipe's verbs one after the other, with as few files between them as their plans allow."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.engine.inputs import StrPath, as_path, local_path
from surgery.progress import Callback
from surgery.recipes.apply_result import ApplyResult, Done, Place
from surgery.recipes.arguments import step_arguments
from surgery.recipes.finding import found_inputs, kept_recipe
from surgery.recipes.placing import check_apart, outputs_of, placed_steps
from surgery.recipes.reading import read_recipe
from surgery.recipes.recipe import Recipe, Step
from surgery.recipes.resuming import JOURNAL, StepJournal, finished_steps, step_ids
from surgery.reports.request import Request, asked
from surgery.reports.result import Result, timed
from surgery_formats.errors import NotFoundError, SurgeryError
from surgery_formats.files.output.manifest import MANIFEST, check_output_name
from surgery_formats.files.output.scratch import hidden_beside, kept_folder, scratch_folder
from surgery_formats.files.output.several import several_outputs
from surgery_formats.files.remote.path import on_a_disk
from surgery_formats.text import listing, show

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
    with _resumable(placed) as folder:
        journal = StepJournal(folder) if folder is not None else None
        several = sum(place == "output" for _, place in placed) > 1 or (journal is not None and journal.resumed)
        runner = _Runner(read, found, folder, overwrite, progress, journal)
        runner.resume(placed)
        with several_outputs(several):
            done = tuple(runner.do(step, place) for step, place in placed)
    result = ApplyResult(done[-1].output, done, None, tuple(runner.warnings))
    return result if read.recorded is None or result.output is None else _compared(read, result)


@contextmanager
def _resumable(placed: list[tuple[Step, Place]]) -> Iterator[Path | None]:
    """The folder of what lies between steps, and of the journal; gone afterwards, whatever happens. None where one step writes."""
    written = [(step, place) for step, place in placed if place in ("output", "temporary")]
    if len(written) < 2 and not any("adapter" in step.operands and step.verb == "layers" for step, _ in written):
        yield None
        return
    outputs = [Path(step.output) for step, place in written if place == "output"]
    if not outputs:  # steps that only look at what others wrote
        with scratch_folder(None) as folder:
            yield folder
        return
    last, parent = outputs[-1].absolute(), Path(os.path.realpath(outputs[-1].absolute().parent))
    if not parent.is_dir():
        hint = f"mkdir -p {show(outputs[-1].parent, 200)}"
        raise NotFoundError("no such folder to write into", file=outputs[-1].parent, hint=hint)
    check_output_name(last)
    job = hashlib.sha256(b"apply\0" + os.fsencode(parent / last.name)).hexdigest()
    with kept_folder(hidden_beside(parent / last.name, job), outputs[-1], JOURNAL) as folder:
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
        journal: Of the finished steps; None where only one writes.
        ids: Of the steps, by number.
        finished: The numbers of those that a killed run finished.
        results: By name: what later steps get.
        warnings: Of all steps.
    """

    recipe: Recipe
    inputs: Mapping[str, Path]
    folder: Path | None
    overwrite: bool
    progress: Callback | None
    journal: StepJournal | None
    ids: Mapping[int, str | None] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    results: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def resume(self, placed: Sequence[tuple[Step, Place]]) -> None:
        """Find the steps that a killed run finished, and remove what it left of others that lie in `folder`."""
        if self.folder is None or self.journal is None:
            return
        self.ids = step_ids(placed, self.inputs, self.folder)
        self.finished = finished_steps(placed, self.ids, self.folder, self.journal)
        for step, place in placed if self.journal.resumed else ():
            if place in ("output", "temporary") and step.number not in self.finished:
                for path in outputs_of(step, place, self.folder):
                    if path.parent == self.folder:
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def do(self, step: Step, place: Place) -> Done:
        """One step.

        Raises:
            SurgeryError: as its verb; the message says which step it is.
        """
        done = Done(step.number, step.verb, step.name, place)
        if place == "folded":
            return done
        if step.number in self.finished:
            return self._kept(step, place, done)
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
        outputs = outputs_of(step, place, self.folder)
        if arguments.get("adapter") is not None and "adapter_output" in step.parameters:
            arguments.setdefault("adapter_output", outputs[1])
        if "progress" in step.parameters:
            arguments["progress"] = self.progress
        arguments["overwrite"] = self.overwrite
        results = {path.resolve(): name for name, path in self.results.items() if isinstance(path, Path)}
        with asked(Request(apply, recipe=kept_recipe(self.recipe, self.inputs, step), results=results)):
            result = step.function(**arguments, output=outputs[0])
        self.warnings += result.warnings
        if self.journal is not None:
            self.journal.note(self.ids[step.number], outputs, result.warnings)
        self._remember_written(step, outputs)
        return replace(done, output=outputs[0] if place == "output" else None, result=result)

    def _kept(self, step: Step, place: Place, done: Done) -> Done:
        """A step that a killed run finished."""
        if place == "memory":
            return done
        assert self.journal is not None
        outputs = outputs_of(step, place, self.folder)
        self.warnings += self.journal.warnings(self.ids[step.number])
        self._remember_written(step, outputs)
        return replace(done, output=outputs[0] if place == "output" else None, kept=True)

    def _remember_written(self, step: Step, outputs: Sequence[Path]) -> None:
        if step.name:
            self.results[step.name] = outputs[0]
            if "adapter" in step.operands and "adapter_output" in step.parameters:
                self.results[f"{step.name}.adapter"] = outputs[1]
