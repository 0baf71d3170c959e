# SPDX-License-Identifier: Apache-2.0
"""Reads a recipe, or the one in a manifest, and checks every step of it before any input is opened.

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

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.engine.recorded import NOT_RECORDED, takes_references
from surgery.recipes.document import Collection, Scalar, Value, read_document
from surgery.recipes.recipe import OUTPUTS, RANKED, VERBS, Input, Operand, Recipe, Step
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.output.manifest import FORMAT, MANIFEST
from surgery_formats.text import closest, listing, show

__all__ = ["read_recipe"]

_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")
_OTHER_NAMES = {"for": "consumer", "adapter_out": "adapter_output"}
"""Options that are called otherwise than the parameter."""
_OWN = ("verb", "as", "output")
_OF_APPLY = ("overwrite", "dry_run", "progress")
_NO_OPTIONS = NOT_RECORDED - {"workers", "adapter_output", "output"}
"""Parameters that no recipe sets. Places and threads it may set, though no manifest records them."""
_MOST = 200  # steps


def read_recipe(path: Path) -> Recipe:
    """A recipe, or the one in a manifest.

    Raises:
        NotFoundError: no such file.
        MalformedError: no recipe; the message has the line.
        UsageError: a step with a verb or an argument that is not known.
    """
    if path.name.endswith(".json"):
        from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object

        manifest = read_object(path, MANIFEST_LIMIT)
        if manifest.get("format") == FORMAT:
            recipe = manifest.get("recipe")
            if not isinstance(recipe, Mapping):
                raise FitError(
                    "does not say which command made it",
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
            hint = f"each step is an entry of a list: 'steps:', then '- verb: {key}'" if key in VERBS else None
            raise MalformedError(f"line {value.line}: '{show(key)}' is no part of a recipe", file=path, hint=hint)
    steps = top.get("steps")
    if not isinstance(steps, Collection) or not isinstance(steps.items, list) or not 0 < len(steps.items) <= _MOST:
        raise MalformedError(f"has no steps, or more than {_MOST}", file=path)
    inputs = _inputs(path, top.get("inputs"))
    found: list[Step] = []
    for number, value in enumerate(steps.items, 1):
        step = _step(path, number, value)
        if step.name and (step.name in inputs or step.name in [earlier.name for earlier in found]):
            raise step.fail(f"'{show(step.name)}' is the name of something else")
        found.append(step)
    if (output := top.get("output")) is not None and not found[-1].output:
        found[-1] = replace(found[-1], output=_path(found[-1], "output", output))
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


def _step(path: Path, number: int, value: Value) -> Step:
    fields = value.items if isinstance(value, Collection) else None
    if not isinstance(fields, dict) or not isinstance(verb := fields.get("verb"), Scalar):
        raise MalformedError(f"line {value.line}: step {number} has no verb", file=path)
    step = Step(number, value.line, verb.text.replace("_", "-"), {}, {})
    if step.verb not in VERBS:
        raise step.fail(
            f"no step does '{show(verb.text)}'", closest(verb.text, VERBS) or f"there are {listing(VERBS, 20)}"
        )
    return _with_result(_with_options(step, fields), fields)


def _with_options(step: Step, fields: Mapping[str, Value]) -> Step:
    """`step` with all that is said for parameters of its verb."""
    arguments: dict[str, Any] = {}
    operands: dict[str, tuple[Operand, ...]] = {}
    for key, value in fields.items():
        if key in _OWN and not (step.verb == "verify" and key == "output"):  # what verify looks at
            continue
        name = _parameter(step, key, value.line)
        annotation = "" if _makes_ranks(step, name) else str(step.parameters[name].annotation)
        if takes_references(annotation) and name != "adapter_output":
            operands[name] = tuple(_operands(step, value))
        else:
            written = name in OUTPUTS and isinstance(value, Scalar) and step.line
            arguments[name] = _path(step, key, value) if written else _plain(step, key, value, annotation)
    return replace(step, arguments=arguments, operands=operands)


def _parameter(step: Step, key: str, line: int) -> str:
    """The parameter that an option sets.

    Raises:
        UsageError: the verb has no such option.
    """
    name = key.replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name in _NO_OPTIONS or not (name in step.parameters or _makes_ranks(step, name)):
        known = sorted(one.replace("_", "-") for one in step.parameters if one not in NOT_RECORDED)
        hint = "it is an option of apply itself" if name in _OF_APPLY else closest(name.replace("_", "-"), known)
        raise step.fail(f"'{show(key)}'{_at_line(line)} is no option of {step.verb}", hint)
    return name


def _makes_ranks(step: Step, name: str) -> bool:
    return name in RANKED and step.chooses_ranks


def _with_result(step: Step, fields: Mapping[str, Value]) -> Step:
    """`step` with the name of its result, and where it is written."""
    name, output = (fields.get(key) for key in ("as", "output"))
    called = name.text if isinstance(name, Scalar) else ""
    if name is not None and not _NAME.fullmatch(called):
        raise step.fail(f"'{show(called)}' is no name for a result", "letters, digits, _ and -")
    if step.verb == "verify" or output is None:
        return replace(step, name=called)
    if isinstance(output, Scalar) and output.value is True and not step.line:  # a manifest says that, and not where
        return replace(step, name=called, written=True)
    return replace(step, name=called, output=_path(step, "output", output))


def _path(step: Step, key: str, value: Value) -> str:
    """Where something is written: a text, as a slip of another kind would be the name of a folder.

    Raises:
        UsageError: a number, yes or no, nothing, or a dash, which is no stream here.
    """
    text = value.value if isinstance(value, Scalar) else None
    if not isinstance(text, str) or not text:
        shown = f"'{show(value.text)}'" if isinstance(value, Scalar) and value.text else "what stands there"
        raise step.fail(
            f"{key}{_at_line(value.line)} is a path, and {shown} is none", "a name of digits alone is written ./3"
        )
    if text == "-":
        what = f"{key}{_at_line(value.line)}: '-' is no path, and streams are not supported"
        raise step.fail(what, "a folder of that name is ./-")
    return text


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


def _at_line(line: int) -> str:
    """For messages; a manifest has no lines."""
    return f" (line {line})" if line else ""
