# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas of ``--json``: each document of the tests is validated, or makes its schema wider.

With ``SURGERY_WRITE_SCHEMAS=1`` what a schema does not know is added to it, of results of functions too; then look at the
difference. Otherwise it fails the test that made the document.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery_cli.schemas import FOLDER, error_schema, schema_of

WRITING = bool(os.environ.get("SURGERY_WRITE_SCHEMAS"))
DIALECT = "https://json-schema.org/draft/2020-12/schema"
TREE = "tree"
FIELD = re.compile(r"[a-z_][A-Za-z0-9_]*")
# Objects whose keys are data: names of files, kinds of tensors, a program's own configuration.
MAPS = frozenset(
    {
        "alphas",
        "arrays",
        "classes",
        "config",
        "configs",
        "deep",
        "dequantised",
        "dtypes",
        "errors",
        "files",
        "ignored",
        "kinds",
        "losses",
        "metadata",
        "missing",
        "options",
        "ranks",
        "renamed",
        "roles",
        "scales",
        "tables",
        "tensors",
        "ties",
        "timings",
        "token_rows",
        "without_output",
    }
)
Schema = dict[str, Any]


def variant(result: Any) -> str:
    """The shape of a result of which a command has several."""
    return str(result.get("type", "result")) if isinstance(result, Mapping) else "result"


def check(document: Mapping[str, Any]) -> None:
    """Validate what a command wrote on stdout, strictly: a field that the schema lacks is undocumented.

    Raises:
        AssertionError: it is not as the schema says.
    """
    import jsonschema  # machines with GPUs may lack it

    command = document["command"]
    if WRITING:
        widen_file(command, document["result"])
    try:
        _validator(command, _stamp(command)).validate(document)
    except (jsonschema.ValidationError, FileNotFoundError) as error:
        told = (
            f"{error.json_path}: {error.message[:300]}" if isinstance(error, jsonschema.ValidationError) else str(error)
        )
        hint = "SURGERY_WRITE_SCHEMAS=1 python -m pytest with this test adds what is new"
        raise AssertionError(f"surgery {command} --json: {told}; {hint}") from error


def check_error(document: Mapping[str, Any]) -> None:
    """Validate an error that a command wrote on stderr."""
    import jsonschema

    jsonschema.validate(document, closed(error_schema()))


def _stamp(command: str) -> int:
    path = FOLDER / f"{command.replace(' ', '-')}.json"
    return path.stat().st_mtime_ns if path.exists() else 0


@functools.cache
def _validator(command: str, stamp: int) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(closed(schema_of(command)))


def closed(schema: Any) -> Any:
    """A schema to which an object may have no field that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner


def widen_file(command: str, result: Any, described: Mapping[str, str] | None = None) -> None:
    """Add what `result` shows to the schema of `command`."""
    path = FOLDER / f"{command.replace(' ', '-')}.json"
    whole = json.loads(path.read_text()) if path.exists() else _empty(command)
    name, kinds = variant(result), whole["$defs"]
    before = json.dumps(whole)
    tree = _Tree(kinds.pop(TREE, None))
    kinds[name] = widened(kinds.get(name), result, tree)
    if name != "result":
        kinds[name]["properties"]["type"] = {"const": name}
    for field, text in (described or {}).items():
        if field in kinds[name].get("properties", {}):
            kinds[name]["properties"][field] = {"description": text, **kinds[name]["properties"][field]}
    whole["properties"]["result"] = {"anyOf": [{"$ref": f"#/$defs/{kind}"} for kind in sorted(kinds)]}
    kinds |= {TREE: tree.schema} if tree.schema else {}
    if json.dumps(whole) != before or not path.exists():
        path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def _empty(command: str) -> Schema:
    return {
        "$schema": DIALECT,
        "$id": f"urn:model-surgery:json:1:{command.replace(' ', '-')}",
        "title": f"surgery {command} --json",
        "type": "object",
        "required": ["command", "result", "schema_version"],
        "properties": {"schema_version": {"const": 1}, "command": {"const": command}},
        "$defs": {},
    }


class _Tree:
    """The schema of a module, whose children are modules: it refers to itself."""

    def __init__(self, schema: Schema | None) -> None:
        self.schema = schema

    def widen(self, value: Mapping[str, Any]) -> Schema:
        children = value.get("children", [])
        self.schema = widened(self.schema, {**value, "children": []}, self)
        self.schema["properties"]["children"] = {"type": "array", "items": {"$ref": f"#/$defs/{TREE}"}}
        for child in children:
            self.widen(child)
        return {"$ref": f"#/$defs/{TREE}"}


def widened(schema: Schema | None, value: Any, tree: _Tree, name: str = "") -> Schema:
    """`schema`, or none, with `value` valid too."""
    if name == "result":  # of a step of a recipe: what its own command would write
        return {"type": ["null", "object"]}
    if name == TREE and isinstance(value, dict):
        return tree.widen(value)
    if schema is not None and "type" not in schema:  # a constant, or anything
        return schema
    schema = dict(schema or {"type": []})
    types = schema["type"] if isinstance(schema.get("type"), list) else [schema["type"]]
    kind = _type(value)
    if kind == "integer" and "number" in types:
        kind = "number"
    types = sorted({*types, kind} - ({"integer"} if kind == "number" else set()))
    schema["type"] = types[0] if len(types) == 1 else types
    if isinstance(value, dict):
        _widen_object(schema, value, tree, name)
    if isinstance(value, list):
        for item in value:
            schema["items"] = widened(schema.get("items"), item, tree, name)
    return schema


def _widen_object(schema: Schema, value: Mapping[str, Any], tree: _Tree, name: str) -> None:
    if "additionalProperties" in schema or name in MAPS or not all(map(FIELD.fullmatch, value)):
        known = schema.pop("properties", {})
        schema.pop("required", None)
        inner = schema.get("additionalProperties") or {"type": []}
        for one in known.values():
            inner = _either(inner, one)
        for one in value.values():
            inner = widened(inner, one, tree)
        schema["additionalProperties"] = inner if inner["type"] else {}
        return
    fresh = "properties" not in schema
    fields = schema.setdefault("properties", {})
    schema["required"] = sorted(value if fresh else set(schema.get("required", ())) & set(value))
    for key, one in value.items():
        fields[key] = widened(fields.get(key), one, tree, key)


def _either(one: Schema, other: Schema) -> Schema:
    """What either of two schemas of a field allows, as far as types go."""
    types = {*([one["type"]] if isinstance(one["type"], str) else one["type"])}
    types |= {*([other["type"]] if isinstance(other.get("type"), str) else other.get("type", ()))}
    types -= {"integer"} if "number" in types else set()
    listed = sorted(types)
    return {**other, **one, "type": listed[0] if len(listed) == 1 else listed}


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def descriptions(kind: type) -> dict[str, str]:
    """What the docstring of a result says of its attributes, and those of its properties."""
    text = inspect.getdoc(kind) or ""
    lines = text.partition("Attributes:\n")[2]
    found = dict(_attributes(lines))
    for name, member in vars(kind).items():
        if isinstance(member, property) and member.__doc__:
            found[name] = " ".join(member.__doc__.split())
    return found


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"\n(?=    \w+: )", "\n" + text):
        name, colon, told = part.strip().partition(": ")
        if colon and name.isidentifier():
            yield name, " ".join(told.split())
