# SPDX-License-Identifier: Apache-2.0
"""Bad input ends every command with one message that names it and the right exit code, soon, and with nothing written."""

from __future__ import annotations

import os
import shutil
import stat
import time
import warnings
from pathlib import Path

import pytest

from tests.oracles.bad_inputs import COMMANDS, Damage, crossed
from tests.oracles.bad_words import WORDS, Words
from tests.support.small_world import invoke, make_world

SECONDS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_world(tmp_path_factory.mktemp("world"))


def _seen(*folders: Path) -> set[tuple[object, ...]]:
    """Everything under `folders`, as far as a write would show."""
    found = set()
    for folder in folders:
        for at, inner, files in os.walk(folder):
            for name in (*inner, *files):
                status = os.lstat(os.path.join(at, name))
                whole = not stat.S_ISDIR(status.st_mode)  # a folder changes when a staged one comes and goes
                found.add((os.path.join(at, name), *((status.st_size, status.st_mtime_ns) if whole else ())))
    return found


def _refused(words: list[str], codes: tuple[int, ...], mentions: tuple[str, ...], *folders: Path) -> None:
    before, began = _seen(*folders), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # as the process of the command has it
        result = invoke(*words)
    told = result.stderr
    assert result.exit_code in codes, told or repr(result.exception)
    assert len([line for line in told.splitlines() if line.startswith("error")]) == 1, told
    assert "Traceback" not in told
    assert all(line.isprintable() for line in told.splitlines()), told
    for wanted in mentions:
        assert wanted in told
    assert time.process_time() - began < SECONDS
    assert _seen(*folders) == before, "something was written"


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_line_is_right_for_sound_inputs(line: str, world: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*line.format(out=tmp_path / "out", **world).split())
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("damage", "line"), crossed(), ids=lambda each: each.name if isinstance(each, Damage) else each
)
def test_a_damaged_input_is_refused(damage: Damage, line: str, world: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad" / damage.of
    bad.parent.mkdir()
    sound = world[damage.of]
    if sound.is_dir():
        shutil.copytree(sound, bad)
    else:
        bad = bad.with_suffix(sound.suffix)
        shutil.copyfile(sound, bad)
    damage.change(bad)
    words = line.format(out=tmp_path / "out", **{**world, damage.of: bad}).split()
    _refused(words, damage.codes, damage.mentions, tmp_path, bad.parent)


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case.name)
def test_a_wrong_command_line_is_refused(
    case: Words, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    words = [word.format(out=place / "out", place=place, **world) for word in case.words]
    _refused(words, case.codes, case.mentions, tmp_path, world["base"].parent)
