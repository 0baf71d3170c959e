# SPDX-License-Identifier: Apache-2.0
"""Help, names and global options: quick, complete, the same on either side of the sub-command."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from surgery_cli.group import COMMANDS, surgery
from tests.support.kit import Run, environment, spawn

LIMIT = 0.3  # seconds; what a person takes for at once


def imported(*words: str) -> set[str]:
    """Modules that a run of the command imports."""
    import subprocess

    script = f"""
import json, sys
from surgery_cli.group import surgery
try:
    surgery.main({list(words)!r}, prog_name="surgery")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_imports_no_command_and_nothing_heavy():
    found = imported("--help")
    assert "surgery_cli.group" in found
    assert not found & {"torch", "onnx", "onnxruntime", "rich", "numpy", "surgery.verbs.merge"}
    assert not [name for name in found if name.startswith("surgery_cli.commands")]


def test_help_is_quick():
    def seconds() -> float:
        before = os.times()
        assert spawn("--help").returncode == 0
        after = os.times()  # of a processor: how long it takes, the other work of the machine decides
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert min(seconds() for _ in range(5)) < LIMIT


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_each_command_says(run: Run, name: str):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert COMMANDS[name] in result.stdout
    assert "--json" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_does_not_import_torch(name: str):
    assert "torch" not in imported(name, "--help")


def test_looking_does_not_import_torch_or_onnx(base, lora):
    for reference in (base, lora):
        assert not imported("inspect", str(reference), "--json") & {"torch", "onnx", "rich"}


def test_a_dry_run_of_a_merge_does_not_import_torch(base, lora):
    assert not imported("merge", str(base), str(lora), "--dry-run", "--json") & {"torch", "onnx", "rich"}


def test_a_merge_imports_neither_writers_nor_other_readers_nor_what_renders(base, lora, tmp_path):
    found = imported("-q", "merge", str(base), str(lora), "-o", str(tmp_path / "out"))
    assert "surgery_formats.adapters.peft.read" in found
    unneeded = (
        "adapters.mlx.read",
        "adapters.kohya.read",
        "adapters.compact.read",
        "adapters.peft.write",
        "families.bert",
    )
    assert not {name for name in found if name.endswith((*unneeded, ".mlx.write", "reports.text", "engine.shares"))}


def test_every_command_is_listed_once_under_a_task(run: Run):
    listed = run("--help").stdout.partition("Change a model:")[2].partition("Exit codes:")[0]
    assert sorted(re.findall(r"^  ([a-z]\S*)", listed, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "words", [("--json", "inspect", "{}"), ("inspect", "{}", "--json"), ("inspect", "--json", "{}")]
)
def test_global_options_on_either_side(run: Run, base, words):
    result = run(*(word.format(base) for word in words))
    assert json.loads(result.stdout)["command"] == "inspect"


def test_version_works_before_and_after_the_command(run: Run):
    from surgery._version import __version__

    assert run("--version").stdout == run("merge", "--version").stdout == f"surgery {__version__}\n"


def test_without_arguments_help_is_an_error_on_stderr(run: Run):
    result = run()
    assert result.exit_code == 2
    assert not result.stdout
    assert "Change a model:" in result.stderr


@pytest.mark.parametrize(("name", "meant"), [("mrge", "merge"), ("export", "export-onnx"), ("extract", "extract-lora")])
def test_a_misspelt_command_is_guessed(name: str, meant: str, run: Run):
    result = run(name)
    assert result.exit_code == 2
    assert f"did you mean '{meant}'" in result.stderr


def test_completion_of_names_comes_from_the_table():
    done = spawn(_SURGERY_COMPLETE="bash_complete", COMP_WORDS="surgery insp", COMP_CWORD="1")
    assert done.stdout == "plain,inspect\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_calls_the_command(run: Run, shell: str):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_SURGERY_COMPLETE" in result.stdout


def test_tools_can_generate_forms_from_the_command_tree():
    import click

    # click keeps the first option for help that it makes: without the settings later tests would find `--help` alone
    info = surgery.to_info_dict(click.Context(surgery, **surgery.context_settings))
    assert list(info["commands"]) == list(COMMANDS)
    assert {"memory_limit", "shard_size"} <= {param["name"] for param in info["commands"]["merge"]["params"]}


def test_the_shell_completes_formats_and_files():
    words = "surgery convert lora --to "
    done = spawn(_SURGERY_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="4")
    assert {"plain,peft", "plain,mlx", "plain,kohya"} <= set(done.stdout.split())
    done = spawn(_SURGERY_COMPLETE="bash_complete", COMP_WORDS="surgery merge ba", COMP_CWORD="2")
    assert done.stdout == "file,ba\n"
