# SPDX-License-Identifier: Apache-2.0
"""Check says what programs do: their own loaders' results on every adapter of ``tests/loaders``, recorded and, where they run, anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery_formats.errors import SurgeryError
from tests.loaders.adapters import ADAPTERS
from tests.loaders.judging import HOME, LOADERS, MAX_RANK, MEANING, Made, command_of, fix, load, make
from tests.loaders.record import PAGE, page, read

RECORDED = read()
UNREAD = frozenset(["layer-replication", "activated", "rank-contradicts", "factor-missing"])
"""Refused as they are read: no weight of the base holds the first two, and of the others nobody knows what was trained."""
FEW = ("plain", "rslora", "alpha-pattern", "dora", "head-saved", "names-bare", "loha", "qwen2-tied-embedding")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def checked(made: Mapping[str, Made]) -> Mapping[str, Mapping[str, str]]:
    """What check says of each adapter that it reads, by consumer."""
    said: dict[str, dict[str, str]] = {consumer: {} for consumer in LOADERS}
    for name, one in made.items():
        if name in UNREAD:
            continue
        for check in surgery.check(one.base, one.adapter).consumers:
            if check.name in said:
                said[check.name][name] = MEANING[check.outcome]
    return said


@pytest.mark.parametrize("consumer", LOADERS)
def test_check_says_what_the_program_did(consumer: str, checked: Mapping[str, Mapping[str, str]]) -> None:
    did = {name: entry["did"] for name, entry in RECORDED[consumer]["adapters"].items()}
    assert did.keys() == ADAPTERS.keys()
    assert checked[consumer].keys() == ADAPTERS.keys() - UNREAD
    assert {name: (said, did[name]) for name, said in checked[consumer].items() if said != did[name]} == {}


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_what_has_two_readings_is_refused(name: str, made: Mapping[str, Made]) -> None:
    with pytest.raises(SurgeryError):
        surgery.check(made[name].base, made[name].adapter)


@pytest.mark.parametrize("consumer", LOADERS)
def test_what_is_written_for_a_program_acts_in_it(consumer: str) -> None:
    wrong = {
        name: entry for name, entry in RECORDED[consumer]["adapters"].items() if entry.get("fixed", "right") != "right"
    }
    assert wrong == {}


def test_the_page_is_the_record() -> None:
    assert PAGE.read_text() == page(RECORDED)


def _observed(consumer: str, made: Mapping[str, Made], folder: Path) -> dict[str, Any]:
    did, _ = load(consumer, made, folder)
    return {name: one.outcome for name, one in did.items()}


@pytest.mark.parametrize("consumer", HOME)
def test_the_installed_library_does_what_was_recorded(consumer: str, made: Mapping[str, Made], tmp_path: Path) -> None:
    recorded = {name: entry["did"] for name, entry in RECORDED[consumer]["adapters"].items()}
    assert _observed(consumer, made, tmp_path) == recorded


@pytest.mark.nightly
@pytest.mark.parametrize("consumer", [consumer for consumer in LOADERS if consumer not in HOME])
def test_a_program_does_what_was_recorded(consumer: str, made: Mapping[str, Made], tmp_path: Path) -> None:
    if command_of(consumer) is None:
        pytest.skip(f"no variable names an environment of {consumer}")
    recorded = {name: entry["did"] for name, entry in RECORDED[consumer]["adapters"].items()}
    assert _observed(consumer, made, tmp_path) == recorded


@pytest.mark.parametrize("consumer", HOME)
def test_the_installed_library_loads_what_is_written_for_it(
    consumer: str, made: Mapping[str, Made], tmp_path: Path
) -> None:
    written = {}
    (tmp_path / "written").mkdir()
    for name in FEW:
        if not fix(consumer, made[name], tmp_path / "written" / name):
            written[name] = replace(made[name], adapter=tmp_path / "written" / name)
    assert len(written) >= 6
    did, _ = load(consumer, written, tmp_path / "out", MAX_RANK)
    assert {name: one.outcome for name, one in did.items()} == dict.fromkeys(written, "right")
