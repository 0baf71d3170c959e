# SPDX-License-Identifier: Apache-2.0
"""What we write acts in the program it is written for: as recorded, and, where the program is at hand, anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loaders.judging import command_of
from tests.loaders.programs import PROGRAMS
from tests.loaders.record_acting import observe, read, wrong

RECORDED = read()


@pytest.mark.parametrize("consumer", PROGRAMS)
def test_all_that_is_written_was_seen_to_act(consumer: str) -> None:
    assert tuple(RECORDED[consumer]["acts"]) == PROGRAMS[consumer].acts
    assert wrong(consumer, RECORDED[consumer]) == {}


@pytest.mark.nightly
@pytest.mark.parametrize("consumer", PROGRAMS)
def test_it_acts(consumer: str, tmp_path: Path) -> None:
    if command_of(consumer) is None:
        pytest.skip(f"no variable names an environment of {consumer}")
    found = observe(consumer, tmp_path)
    assert tuple(found["acts"]) == PROGRAMS[consumer].acts
    assert wrong(consumer, found) == {}


def test_onnxruntime_runs_what_is_written_for_it(tmp_path: Path) -> None:
    assert wrong("onnxruntime", observe("onnxruntime", tmp_path)) == {}
