# SPDX-License-Identifier: Apache-2.0
"""The schemas of ``--json``: there is one of every command, it is shown, and it is strict in the tests."""

from __future__ import annotations

import json

import jsonschema
import pytest

from surgery_cli.commands.prompt import command as prompt
from surgery_cli.group import COMMANDS
from surgery_cli.schemas import FOLDER, error_schema, schema_of
from tests.support import json_schemas
from tests.support.kit import Run

NAMES = [name for name in COMMANDS if name not in ("prompt", "strip", "fold")] + [
    f"prompt {name}" for name in prompt.commands
]


@pytest.mark.parametrize("name", [*NAMES, "strip", "fold"])
def test_every_command_shows_its_schema(name: str, run: Run) -> None:
    shown = run(*name.split(), "--json-schema")
    assert shown.exit_code == 0
    schema = json.loads(shown.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["command"] == {"const": name}
    assert schema == schema_of(name)


def test_the_schema_of_errors_is_that_of_the_whole_command(run: Run) -> None:
    assert json.loads(run("--json-schema").stdout) == error_schema()
    assert "its own schema" in run("prompt", "--json-schema").stderr


def test_there_is_no_schema_without_a_command() -> None:
    stems = {name.replace(" ", "-") for name in [*NAMES, "strip", "fold"]} | {"error"}
    assert {path.stem for path in FOLDER.glob("*.json")} == stems


def test_a_field_that_a_schema_lacks_fails_the_test_that_made_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schemas, "WRITING", False)
    document = json.loads(run("completion", "bash", "--json").stdout)
    json_schemas.check(document)
    with pytest.raises(AssertionError, match="completion --json"):
        json_schemas.check(document | {"result": document["result"] | {"fresh": 1}})
    with pytest.raises(AssertionError, match="completion --json"):
        json_schemas.check(document | {"result": {"shell": "bash", "script": 5}})
    with pytest.raises(AssertionError, match="completion --json"):
        json_schemas.check(document | {"schema_version": 2})


def test_a_schema_grows_by_what_it_sees() -> None:
    schema: dict[str, object] = {}
    tree = json_schemas._Tree(None)
    values = (
        {"a": 1, "files": {"x": 1}},
        {"a": None, "b": [1.5]},
        {"a": 2, "tree": {"name": "", "children": [{"name": "c", "children": []}]}},
    )
    for value in values:
        schema = json_schemas.widened(schema or None, value, tree)
        jsonschema.validate(value, {**schema, "$defs": {"tree": tree.schema} if tree.schema else {}})
    assert schema["required"] == ["a"]
    assert schema["properties"]["a"] == {"type": ["integer", "null"]}
    assert schema["properties"]["files"]["additionalProperties"] == {"type": "integer"}
