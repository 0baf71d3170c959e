# SPDX-License-Identifier: Apache-2.0
"""Commands parse, call and show: what people see is a result's summary, and no command draws anything itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import surgery
from surgery_cli.group import COMMANDS
from tests.support.kit import Run

ROOM = Path(__file__).parents[2] / "cli/surgery_cli/commands"
# A script for a shell, and text of a model while it is being generated, are no summaries.
SPEAKING = {"completion.py": 2, "run.py": 2}


def echoes(path: Path) -> int:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return sum(ast.unparse(call) in ("click.echo", "click.secho", "print", "sys.stdout.write") for call in calls)


def test_no_command_writes_to_the_screen_itself():
    assert {path.name: echoes(path) for path in ROOM.glob("*.py") if echoes(path)} == SPEAKING


def test_every_command_shows_a_result():
    silent = [name for name in COMMANDS if "show_" not in (ROOM / f"{name.replace('-', '_')}.py").read_text()]
    assert silent == ["completion"]


@pytest.mark.parametrize("reference", ["examples/base", "examples/lora", "examples/prompt"])
def test_the_screen_is_the_summary_as_text(run: Run, reference):
    result = surgery.inspect(reference)
    shown = run("inspect", reference, "-v")
    assert shown.stdout.rstrip("\n") == result.summary(verbose=True).as_text()
    assert shown.stderr == ""


def test_quiet_keeps_data_and_leaves_hints_out(run: Run):
    loud, quiet = run("inspect", "examples/lora"), run("inspect", "examples/lora", "-q")
    assert loud.stdout == quiet.stdout != ""
    assert loud.stderr.endswith("; -v shows all\n")
    assert quiet.stderr == ""


def test_what_is_left_out_is_shown_with_v(run: Run):
    assert "metadata" not in run("inspect", "examples/lora").stdout
    assert "metadata" in run("inspect", "examples/lora", "-v").stdout
    assert run("inspect", "examples/lora", "-v").stdout == run("inspect", "examples/lora", "--all").stdout
