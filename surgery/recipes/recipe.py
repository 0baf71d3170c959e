# SPDX-License-Identifier: Apache-2.0
"""A recipe: steps with a verb each, their arguments, and the names of results; checked before anything is read.

::

    inputs:
      base: llama/
    steps:
      - verb: combine
        adapters: {style/: 0.7, facts/: 0.5}
        as: both
      - verb: merge
        base: base
        adapters: both
    output: merged/
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.engine.recorded import NOT_RECORDED, takes_references
from surgery.recipes.document import Collection, Scalar, Value, read_document
from surgery_formats.errors import FitError, MalformedError, SurgeryError, UsageError
from surgery_formats.files.output.manifest import FORMAT, MANIFEST
from surgery_formats.text import closest, listing, show

__all__ = ["RANKED", "VERBS", "Input", "Operand", "Recipe", "Step", "read_recipe"]

VERBS = (
    *("combine", "resize", "convert", "extract-lora", "insert", "merge", "unmerge", "layers", "export-onnx", "verify"),
    *("fold", "prompt-bake", "prompt-combine", "prompt-convert", "prompt-transfer"),
)
"""What a step may do."""
RANKED = ("rank", "energy", "max_error", "budget", "rank_pattern")
"""Options that make one choice of ranks together."""
_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")
_OTHER_NAMES = {"for": "consumer", "adapter_out": "adapter_output"}
"""Options that are called otherwise than the parameter."""
_OWN = ("verb", "as", "output")
_MOST = 200  # steps


@dataclass(frozen=True, slots=True)
class Input:
    """A named input.

    Attributes:
        reference: A path, or a name on the hub; empty for one of a manifest.
        files: Digest of what lay there when the recipe was written into a manifest; empty in a recipe of one's own.
        made: Digest of what a program had made of it in memory; such an input cannot be opened again.
        line: Where it stands.
    """

    reference: str
    files: str = ""
    made: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Operand:
    """A model or an adapter that a step works on, by name: an input, a result, or a model reference as the command takes it."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One verb.

    Attributes:
        number: From 1.
        line: Where it begins.
        verb: As the command calls it.
        arguments: By parameter: plain values.
        operands: By parameter: what it names; whether as a list.
        name: Of its result, or empty.
        output: Where it is written, or empty.
        written: Whether it was written to an output when the manifest was made: later steps read rounded values then.
    """

    number: int
    line: int
    verb: str
    arguments: Mapping[str, Any]
    operands: Mapping[str, tuple[Operand, ...]]
    name: str = ""
    output: str = ""
    written: bool = False

    @property
    def title(self) -> str:
        """For messages."""
        where = f", line {self.line}" if self.line else ""
        return f"step {self.number} ({self.verb}){where}"

    @property
    def function(self) -> Callable[..., Any]:
        """The verb."""
        return _function(self.verb)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Errors inside say which step they are of."""
        try:
            yield
        except SurgeryError as error:
            if not error.message.startswith(self.title):
                error.message = f"{self.title}: {error.message}"
                error.args = (error.message,)
            raise

    def fail(self, what: str, hint: str | None = None) -> UsageError:
        """An error that says where."""
        return UsageError(f"{self.title}: {what}", hint=hint)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A chain of steps.

    Attributes:
        path: The file.
        inputs: By name.
        steps: In order.
        recorded: The manifest that it was read from; None for a recipe of one's own.
    """

    path: Path
    inputs: Mapping[str, Input]
    steps: tuple[Step, ...]
    recorded: Mapping[str, Any] | None = field(default=None, repr=False)


def _at_line(line: int) -> str:
    """For messages; a manifest has no lines."""
    return f" (line {line})" if line else ""


def read_recipe(path: Path) -> Recipe:
    """A recipe, or the one in a manifest.

    Raises:
        NotFoundError: no such file.
        MalformedError: no recipe; the message has the line.
        UsageError: a step with a verb or an argument that is not known.
    """
    if path.name.endswith(".json"):
        from surgery_formats.files.bounded_json import INDEX_LIMIT, read_object

        manifest = read_object(path, INDEX_LIMIT)
        if manifest.get("format") == FORMAT:
            recipe = manifest.get("recipe")
            if not isinstance(recipe, Mapping):
                raise FitError(
                    "says not by which command it was made",
                    file=path,
                    hint="run the command: older manifests name none, nor do those of a command's second output",
                )
            return _recipe(path, _value(recipe), manifest)
    if path.is_dir():
        manifest_in = path / MANIFEST
        hint = (
            f"name the manifest in it: {show(manifest_in)}" if manifest_in.is_file() else "name a recipe or a manifest"
        )
        raise FitError("a folder, not a recipe", file=path, hint=hint)
    return _recipe(path, read_document(path), None)


def _value(value: Any) -> Any:
    """JSON values as those of a document; it has no lines."""
    if isinstance(value, Mapping):
        return Collection({str(key): _value(inner) for key, inner in value.items()}, 0)
    if isinstance(value, list):
        return Collection([_value(inner) for inner in value], 0)
    return Scalar(str(value), value, 0)


def _recipe(path: Path, document: Collection, manifest: Mapping[str, Any] | None) -> Recipe:
    top = document.items
    if not isinstance(top, dict):
        raise MalformedError("is no recipe", file=path)
    for key, value in top.items():
        if key not in ("inputs", "steps", "output", "version"):
            raise MalformedError(f"line {value.line}: '{show(key)}' is no part of a recipe", file=path)
    steps = top.get("steps")
    if not isinstance(steps, Collection) or not isinstance(steps.items, list) or not 0 < len(steps.items) <= _MOST:
        raise MalformedError(f"has no steps, or more than {_MOST}", file=path)
    inputs = _inputs(path, top.get("inputs"))
    found: list[Step] = []
    for number, entry in enumerate(steps.items, 1):
        found.append(_step(path, number, entry))
        name = found[-1].name
        if name and (name in inputs or name in [step.name for step in found[:-1]]):
            raise found[-1].fail(f"'{show(name)}' is the name of something else")
    output = top.get("output")
    if isinstance(output, Scalar) and not found[-1].output:
        last = found[-1]
        fields = (last.arguments, last.operands, last.name, output.text)
        found[-1] = Step(last.number, last.line, last.verb, *fields)
    return Recipe(path, inputs, tuple(found), manifest)


def _inputs(path: Path, value: Value | None) -> dict[str, Input]:
    if value is None:
        return {}
    if not isinstance(value, Collection) or not isinstance(value.items, dict):
        raise MalformedError(f"line {value.line}: inputs is a mapping of names to references", file=path)
    inputs = {}
    for name, inner in value.items.items():
        if not _NAME.fullmatch(name):
            raise MalformedError(f"line {inner.line}: '{show(name)}' is no name", file=path)
        if isinstance(inner, Scalar):
            inputs[name] = Input(inner.text, line=inner.line)
            continue
        fields = inner.items if isinstance(inner.items, dict) else {}
        texts = {key: one.text for key, one in fields.items() if isinstance(one, Scalar)}
        if "files" not in texts:
            raise MalformedError(f"line {inner.line}: '{show(name)}' is no reference", file=path)
        inputs[name] = Input("", texts["files"], texts.get("made", ""), inner.line)
    return inputs


def _function(verb: str) -> Callable[..., Any]:
    name = verb.replace("-", "_")
    function: Callable[..., Any] = getattr(import_module(f"surgery.verbs.{name}"), name)
    return function


def _step(path: Path, number: int, entry: Value) -> Step:
    fields = entry.items if isinstance(entry, Collection) else None
    if not isinstance(fields, dict) or not isinstance(verb := fields.get("verb"), Scalar):
        raise MalformedError(f"line {entry.line}: step {number} has no verb", file=path)
    step = Step(number, entry.line, verb.text.replace("_", "-"), {}, {})
    if step.verb not in VERBS:
        raise step.fail(
            f"no step does '{show(verb.text)}'", closest(verb.text, VERBS) or f"there are {listing(VERBS, 20)}"
        )
    parameters = inspect.signature(step.function).parameters
    arguments: dict[str, Any] = {}
    operands: dict[str, tuple[Operand, ...]] = {}
    for key, value in fields.items():
        name = key.replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        ranked = name in RANKED and "Rank" in str(getattr(parameters.get("rank"), "annotation", ""))
        if key in _OWN and not (step.verb == "verify" and key == "output"):
            continue
        if (name not in parameters and not ranked) or (name in NOT_RECORDED - {"workers", "adapter_output", "output"}):
            of_apply = name in ("overwrite", "dry_run", "progress")
            known = sorted(
                {one.replace("_", "-") for one in parameters} - {one.replace("_", "-") for one in NOT_RECORDED}
            )
            hint = "it is an option of apply itself" if of_apply else closest(name.replace("_", "-"), known)
            raise step.fail(f"'{show(key)}'{_at_line(value.line)} is no option of {step.verb}", hint)
        annotation = "" if ranked else str(parameters[name].annotation)
        if takes_references(annotation) and name != "adapter_output":
            operands[name] = tuple(_operands(step, value))
        else:
            arguments[name] = _plain(step, key, value, annotation)
    texts = {key: one.text for key, one in fields.items() if isinstance(one, Scalar)}
    name, output = texts.get("as", ""), "" if step.verb == "verify" else texts.get("output", "")
    written = (
        entry.line == 0 and isinstance(told := fields.get("output"), Scalar) and told.value is True
    )  # of a manifest
    if "as" in fields and not _NAME.fullmatch(name):
        raise step.fail(f"'{show(name)}' is no name for a result", "letters, digits, _ and -")
    return Step(number, entry.line, step.verb, arguments, operands, name, "" if written else output, written)


def _operands(step: Step, value: Value) -> list[Operand]:
    if isinstance(value, Scalar):
        return [Operand(value.text)]
    if isinstance(value.items, list):
        return [one for inner in value.items for one in _operands(step, inner)]
    found = []
    for text, weight in value.items.items():
        number = weight.value if isinstance(weight, Scalar) else None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise step.fail(f"the weight of '{show(text)}'{_at_line(weight.line)} is no number")
        found.append(Operand(text, float(number)))
    return found


def _plain(step: Step, key: str, value: Value, annotation: str) -> Any:
    """An argument; of a parameter that is a text, what stands there: ``keep: 3`` is a text, too."""
    if isinstance(value, Scalar):
        is_text = annotation.startswith("str") and not isinstance(value.value, bool) and value.value is not None
        return value.text if is_text else value.value
    if isinstance(value.items, list):
        return [_plain(step, key, inner, annotation) for inner in value.items]
    return {name: _plain(step, key, inner, "") for name, inner in value.items.items()}
