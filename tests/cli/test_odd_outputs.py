# SPDX-License-Identifier: Apache-2.0
"""Outputs that are empty, links, pipes, devices or in the way of something: a message, and nothing is changed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from surgery_cli.group import COMMANDS
from surgery_cli.options import PATH

WRITERS = {
    "folder": ("merge", "BASE", "LORA", "-o", "OUT"),
    "adapter": ("resize", "LORA", "--rank", "1", "-o", "OUT"),
    "file": ("convert", "LORA", "--to", "bare", "-o", "OUT.safetensors"),
    "graphs": ("export-onnx", "BASE", "-o", "OUT"),
    "markdown": ("report", "LORA", "--base", "BASE", "--md", "OUT"),
}
ODD = (
    "",
    ".",
    "..",
    "/",
    "file",
    "full",
    "full/",
    "dangling",
    "loop",
    "pipe",
    "linked",
    "/dev/null",
    "file/out",
    "missing/out",
    "loop/out",
    "n" * 256,
)


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = importlib.import_module(f"surgery_cli.commands.{name.replace('-', '_')}").command
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", one) for inner, one in command.commands.items())


def test_every_option_that_is_a_path_refuses_an_empty_one() -> None:
    paths = [(name, one) for name, command in _commands() for one in command.params if isinstance(one.type, click.Path)]
    assert len(paths) > 30
    assert [(name, one.name) for name, one in paths if one.type is not PATH] == []


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd[:12]))
@pytest.mark.parametrize("writer", WRITERS)
def test_an_odd_output_changes_nothing(writer, odd, run, base, lora, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "place"
    (place / "full").mkdir(parents=True)
    (place / "full/notes").write_text("mine")
    (place / "file").write_text("mine")
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    (place / "linked").symlink_to("full")
    os.mkfifo(place / "pipe")
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.rglob("*"))
    for overwrite in ([], ["--overwrite"]):
        if writer == "markdown" and overwrite and odd in ("file", "dangling", "loop", "linked"):
            continue  # a file, or a link in its place, is what is to be replaced
        words = [
            {"BASE": base, "LORA": lora, "OUT": odd, "OUT.safetensors": odd}.get(word, word) for word in WRITERS[writer]
        ]
        result = run("-q", *words, *overwrite)
        assert result.exit_code in (2, 3, 4), result.stderr
        assert result.stderr.count("error: ") == 1
        assert sorted(path.name for path in place.rglob("*")) == before
        assert (place / "file").read_text() == (place / "full/notes").read_text() == "mine"


def test_an_empty_working_folder_is_not_replaced(run, base, lora, tmp_path: Path, monkeypatch) -> None:
    """Whoever stands in it would see nothing of the output."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = run("-q", "merge", base, lora, "-o", ".")
    assert result.exit_code == 4
    assert "working folder" in result.stderr
    assert os.listdir() == []
