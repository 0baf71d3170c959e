# SPDX-License-Identifier: Apache-2.0
"""A faulty adapter or base is refused with one message that names it, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery_cli.group import surgery as cli
from tests.oracles.faults import FAULTS, MARKER, Fault, good


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return good(tmp_path_factory.mktemp("sound"))


def test_the_sound_pair_merges(sound: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["merge", *map(str, sound), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_faulty_adapter_or_base_is_refused(fault: Fault, sound: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = fault.make(*sound, tmp_path)
    before = set(os.listdir(tmp_path))
    result = CliRunner().invoke(cli, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out")])
    assert result.exit_code in fault.exit_codes, result.stderr or repr(result.exception)
    message = result.stderr
    for wanted in fault.mentions:
        assert wanted in message
    for unwanted in fault.forbids:
        assert unwanted not in message
    assert len([line for line in message.splitlines() if line.startswith("error")]) == 1, message
    assert set(os.listdir(tmp_path)) - {MARKER} == before - {MARKER}, "something was written"
    assert not list(tmp_path.rglob(MARKER)), "code in an input was run"
