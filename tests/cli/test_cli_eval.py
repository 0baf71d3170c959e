# SPDX-License-Identifier: Apache-2.0
"""``surgery eval``: both models on the screen and in JSON, with the right exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.kit import Run

BASE, TEXT = "examples/base", "examples/heldout/target.txt"


def test_the_command_shows_both_models(run: Run) -> None:
    words = ("eval", BASE, "--adapter", "examples/lora=0.5", "--against", BASE, "--text", TEXT, "--limit", "600")
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    assert "examples/lora=0.5" in shown.stdout
    assert "nats per token" in shown.stdout
    result = json.loads(run("--json", *words).stdout)["result"]
    assert result["text_bytes"] == 600
    assert result["limited"] is True
    assert result["model"]["bits_per_byte"] < result["against"]["bits_per_byte"]


def test_what_is_wrong_has_its_exit_code(run: Run) -> None:
    assert run("eval", BASE, "--text", "nowhere.txt").exit_code == 3
    assert run("eval", BASE, "--text", "examples/base/model.safetensors").exit_code == 3
    assert run("eval", "examples/lora", "--text", TEXT).exit_code == 4
    assert run("eval", BASE, "--text", TEXT, "--context", "8", "--stride", "9").exit_code == 4
    assert run("eval", BASE, "--against-adapter", "examples/lora", "--text", TEXT).exit_code == 2


def test_models_that_are_the_same_are_not_told_apart_by_noise(run: Run) -> None:
    shown = run("eval", BASE, "--against", BASE, "--text", TEXT, "--limit", "300").stdout
    assert "as many for both, to 0.01%" in shown


def test_of_one_there_is_no_plural(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    shown = run("eval", BASE, "--text", str(tmp_path / "a.txt")).stdout
    assert "a.txt (1 byte)" in shown
    assert "1 token, in 1 window of at most 480\n" in shown
