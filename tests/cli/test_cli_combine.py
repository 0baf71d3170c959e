# SPDX-License-Identifier: Apache-2.0
"""Combine and resize on the command line: results and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.adapter_files import peft_deltas
from tests.support.differences import Q, lora, run


def test_combine_and_resize_on_the_command_line(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 2))
    done = run("combine", f"{a}=0.7", f"{b}=-0.3", "-o", tmp_path / "ab", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)["result"]
    assert document["modules"][0]["rank"] == 5
    assert document["error"] < 1e-6
    wanted = sum(w * peft_deltas(p)["model.layers.0.self_attn.q_proj"] for p, w in ((a, 0.7), (b, -0.3)))
    got = peft_deltas(tmp_path / "ab")["model.layers.0.self_attn.q_proj"]
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
    shown = run("combine", a, b, "-o", tmp_path / "ties", "--method", "ties", "--density", "20%", "--rank", 4)
    assert shown.exit_code == 0, shown.stderr
    assert "error" in shown.stdout
    dry = run("resize", tmp_path / "ab", "-o", tmp_path / "small", "--rank", 2, "--dry-run")
    assert dry.exit_code == 0
    assert "nothing was written" in dry.stderr
    assert not (tmp_path / "small").exists()
    assert run("resize", tmp_path / "ab", "-o", tmp_path / "small", "--energy", ".9").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("combine", "A", "-o", "X", "--method", "ties"), 2),
        (("combine", "A", "-o", "X", "--method", "ties", "--density", ".2"), 2),
        (("combine", "A", "-o", "X", "--density", ".2"), 2),
        (("combine", "A", "-o", "X", "--rank", "0"), 2),
        (("combine", "A", "-o", "X", "--energy", "2"), 2),
        (("combine", "-o", "X"), 2),
        (("combine", "A=strong", "-o", "X"), 2),
        (("combine", "A", "A", "-o", "A"), 4),
        (("combine", "A", "-o", "X"), 4),
        (("combine", "A=1", "A=-1", "-o", "X"), 4),
        (("combine", "A", "NOWHERE", "-o", "X"), 3),
        (("resize", "A", "-o", "X"), 2),
        (("resize", "A", "-o", "X", "--rank", "8"), 4),
        (("resize", "NOWHERE", "-o", "X", "--rank", "8"), 3),
    ],
)
def test_exit_codes_of_combine_and_resize(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    lora(tmp_path / "A", (Q, 1, 3))
    places = {"A": tmp_path / "A", "X": tmp_path / "x", "NOWHERE": tmp_path / "nowhere"}
    found = []
    for word in words:
        name, equals, weight = word.partition("=")
        found.append(f"{places.get(name, name)}{equals}{weight}")
    result = run(*found)
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith(("error:", "Usage"))
    assert not (tmp_path / "x").exists()
