# SPDX-License-Identifier: Apache-2.0
"""`unmerge MERGED` alone: what was merged is told, and the whole command where all of it lies near by its content."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import surgery
from tests.support.kit import Run, make_base, make_lora


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, two adapters, and their merge."""
    base = make_base(tmp_path / "base")
    make_lora(tmp_path / "my style=1", strength=1 / 4)
    make_lora(tmp_path / "facts", strength=2 / 4)
    monkeypatch.chdir(tmp_path)
    surgery.merge(base, [("my style=1", 1.0), ("facts", 0.5)], output="merged")
    return tmp_path


def test_the_command_is_given_and_works(place: Path, run: Run) -> None:
    asked = run("unmerge", "merged", "-o", "back")
    assert asked.exit_code == 2
    assert "no adapter was named, and 2 adapters were merged into it: a peft LORA (content " in asked.stderr
    assert ", a peft LORA with the weight 0.5 (content " in asked.stderr
    hint = asked.stderr.split("  hint: surgery ")[1].strip()
    assert hint == "unmerge merged 'my style=1=1' facts=0.5 -o OUT"
    assert run(*shlex.split(hint)).exit_code == 0
    assert (place / "OUT" / "model.safetensors").exists()


@pytest.mark.parametrize("change", ["moved", "other content"])
def test_nothing_is_guessed_where_one_is_missing(change: str, place: Path, run: Run) -> None:
    shutil.move("facts", "deeper" if change == "other content" else place.parent / f"{place.name} elsewhere")
    if change == "other content":
        make_lora(place / "facts", strength=3 / 4)
        shutil.rmtree("deeper")
    asked = run("unmerge", "merged", "-o", "back")
    assert asked.exit_code == 2
    assert "a peft LORA with the weight 0.5 (content " in asked.stderr
    assert "hint: name them as they were merged, in their order: ADAPTER=WEIGHT" in asked.stderr
    assert not (place / "back").exists()


def test_a_reversible_merge_knows_names(place: Path, run: Run) -> None:
    surgery.merge("base", [("facts", 0.5)], output="kept", reversible=True)
    asked = run("unmerge", "kept", "--dry-run")
    assert "1 adapter was merged into it: 'facts' with the weight 0.5 (content " in asked.stderr
    assert "hint: surgery unmerge kept facts=0.5 -o OUT" in asked.stderr


@pytest.mark.parametrize(
    "adapters", [[], "x", [{"files": 1, "weight": 1}], [{"files": ["a"], "weight": "\x1b[2J"}], [3]]
)
def test_a_record_that_is_damaged_is_not_believed(adapters: object, place: Path, run: Run) -> None:
    manifest = place / "merged" / "surgery_manifest.json"
    told = json.loads(manifest.read_text())
    told["inputs"]["adapters"] = adapters
    manifest.write_text(json.dumps(told))
    asked = run("unmerge", "merged", "--dry-run")
    assert asked.exit_code == 2
    assert "nothing beside the model says which were merged into it" in asked.stderr


def test_a_model_of_no_merge_is_said_to_be_none(place: Path, run: Run) -> None:
    surgery.layers("base", drop="0", output="fewer")
    for model in ("base", "fewer"):
        asked = run("unmerge", model, "--dry-run")
        assert asked.exit_code == 2
        assert "nothing beside the model says which were merged into it" in asked.stderr


def test_a_weight_is_told_to_its_last_digit(place: Path, run: Run) -> None:
    surgery.merge("base", [("facts", 1 / 3)], output="third", reversible=True)
    wrong = run("unmerge", "third", "facts=0.333333", "--dry-run")
    assert wrong.exit_code == 4
    assert (
        "was merged with the weight 0.3333333333333333, not 0.333333\n  hint: write facts=0.3333333333333333"
        in wrong.stderr
    )
    asked = run("unmerge", "third", "--dry-run")
    assert "with the weight 0.3333333333333333 (content " in asked.stderr
    hint = asked.stderr.split("  hint: surgery ")[1].strip()
    assert run(*shlex.split(hint)).exit_code == 0


def test_what_a_merge_kept_elsewhere_is_in_the_command(place: Path, run: Run) -> None:
    surgery.merge("base", [("facts", 0.5)], output="kept", reversible=True)
    shutil.move("kept/base.rounding", "of kept.rounding")
    asked = run("unmerge", "kept", "--base-rounding", "of kept.rounding", "--dry-run")
    assert asked.stderr.strip().endswith("facts=0.5 --base-rounding 'of kept.rounding' -o OUT")


def test_a_folder_that_cannot_be_listed_holds_no_adapters(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(folder: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("surgery.engine.nearby.os", SimpleNamespace(listdir=denied))
    asked = run("unmerge", "merged", "--dry-run")
    assert asked.exit_code == 2
    assert "hint: name them as they were merged, in their order: ADAPTER=WEIGHT" in asked.stderr
