# SPDX-License-Identifier: Apache-2.0
"""``surgery prompt``: every sub-command on the shipped prompt, as a person and as a program see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.kit import ROOT, Run

BASE, TUNED, PROMPT = (str(ROOT / "examples" / name) for name in ("base", "tuned", "prompt"))
LOOKS = {
    "show": ["show", PROMPT, "--base", BASE],
    "nearest": ["nearest", PROMPT, BASE, "--top", "2"],
    "effect": ["nearest", PROMPT, BASE, "--by", "effect", "--ids", "0,54,585,294,755"],
}
WRITES = {
    "bake": ["bake", PROMPT, BASE],
    "bake kv": ["bake", PROMPT, BASE, "--as", "kv"],
    "bake a text": ["bake", BASE, "--as", "kv", "--text", "The following"],
    "combine": ["combine", PROMPT, PROMPT],
    "average": ["combine", f"{PROMPT}=0.5", f"{PROMPT}=0.5", "--method", "average"],
    "convert": ["convert", PROMPT, "--to", "cpt"],
    "transfer": ["transfer", PROMPT, BASE, "--onto", TUNED],
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_looks_shows_tables_and_json(run: Run, name: str) -> None:
    shown = run("prompt", *LOOKS[name])
    assert shown.exit_code == 0, shown.stderr
    assert "PROMPT_TUNING" in shown.stdout
    document = json.loads(run("prompt", *LOOKS[name], "--json").stdout)
    assert document["command"] == f"prompt {LOOKS[name][0]}"
    assert document["result"]["kind"] == "PROMPT_TUNING"


@pytest.mark.parametrize("name", WRITES)
def test_what_writes_has_dry_runs_and_overwrites(run: Run, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = run("prompt", *WRITES[name], "-o", out, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "nothing was written" in dry.stderr
    assert not out.exists()
    done = run("prompt", *WRITES[name], "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert (result["output"], result["verb"]) == (str(out), f"prompt {WRITES[name][0]}")
    assert result["nbytes"] > 0
    again = run("prompt", *WRITES[name], "-o", out)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run("prompt", *WRITES[name], "-o", out, "--overwrite").exit_code == 0
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_help_and_misspelt_names(run: Run) -> None:
    assert "transfer" in run("prompt", "--help").stdout
    bare = run("prompt")
    assert bare.exit_code == 2
    assert "Commands:" in bare.stderr
    assert run("prompt", "nearst", PROMPT).exit_code == 2


def test_errors_name_options(run: Run, tmp_path: Path) -> None:
    found = run("prompt", "bake", BASE, "--text", "a", "-o", tmp_path / "out")
    assert found.exit_code == 2
    assert "bake it as --as kv" in found.stderr
    found = run("prompt", "convert", PROMPT, "--to", "prefix", "-o", tmp_path / "out")
    assert found.exit_code == 4
    assert "give it with --base" in found.stderr
    found = run("prompt", "nearest", PROMPT, BASE, "--by", "effect")
    assert found.exit_code == 2


def test_a_file_that_is_no_text_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    told = run("prompt", "nearest", PROMPT, BASE, "--by", "effect", "--text-file", tmp_path / "text")
    assert told.exit_code == 3
    assert "not a text in UTF-8" in told.stderr
