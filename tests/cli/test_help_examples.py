# SPDX-License-Identifier: Apache-2.0
"""Every example that a command's help shows is a command line that the command takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from surgery_cli.group import surgery

_FILE = re.compile(r"[\w.-]+\.(txt|jsonl?|ya?ml|safetensors|onnx|md|html)")
_BEHIND = re.compile(r"\s{2,}|\s[|>]\s")
"""What follows an example on its line: what it does, or where its output goes."""


def _examples(command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from _examples(found)
        return
    for line in (command.help or "").splitlines():
        if line.strip().startswith("surgery "):
            yield _BEHIND.split(line.strip())[0]


EXAMPLES = sorted(set(_examples(surgery)))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 90


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_help_is_understood(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(example)[1:]
    for word in words:
        if _FILE.fullmatch(word):
            Path(word).write_text("")
    command: click.Command = surgery
    while isinstance(command, click.Group):
        while words[0].startswith("-"):  # global options
            words.pop(0)
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None
        command = found
    command.make_context("surgery", words)
