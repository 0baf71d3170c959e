# SPDX-License-Identifier: Apache-2.0
"""Kinds x layers x model types: every trained number random, a merge is the attached model and PEFT's own merge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.attached import outcome, quiet
from tests.support.peft_kinds import COMBINATIONS, KINDS, Combination, made, sample

EVERY = 9
"""Of this many combinations one is tried by default; the mark ``slow`` has all."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def _check(combination: Combination, folder: Path) -> None:
    found = outcome(made(combination, folder))
    assert not found.wrong
    if combination.refused:
        assert not found.found
        assert all(re.search(combination.refused, said) for said in found.refused.values()), found.refused
    else:
        assert not found.refused


@pytest.mark.parametrize("combination", sample(EVERY), ids=str)
def test_merged_is_attached_and_pefts(combination: Combination, tmp_path: Path) -> None:
    _check(combination, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_merged_is_attached_and_pefts_for_all(combination: Combination, tmp_path: Path) -> None:
    _check(combination, tmp_path)


def test_there_are_as_many_as_are_promised() -> None:
    right = [one for one in COMBINATIONS if not one.refused]
    assert len(right) >= 200
    assert len({one.kind.name for one in right}) >= 36
    assert len({one.model_type for one in right}) >= 40
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {one.kind.name for one in sample(EVERY)} == {kind.name for kind in KINDS}
