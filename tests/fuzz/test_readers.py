# SPDX-License-Identifier: Apache-2.0
"""Damaged files are read or refused by every reader: what the fuzzer found once, and some executions of it."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.errors import SurgeryError
from tests.support.kit import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import fuzz_readers
from fuzz_readers import Fuzzer
from fuzz_seeds import Seed, readers

CORPUS = Path(__file__).parent / "corpus"
FOUND = json.loads((CORPUS / "readers.json").read_text())
"""Inputs that ended in a traceback when they were found: the reader, and whether it is given the file alone."""


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    made = Fuzzer(seed=12)
    with made.working():
        yield made


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_or_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(CORPUS / name, folder)
    path = next(folder.iterdir()) if FOUND[name]["alone"] else folder
    for number in range(20):  # each reads it in another way
        with suppress(SurgeryError):
            fuzz_readers.read(path, Seed(name, FOUND[name]["reader"], {}, FOUND[name]["alone"]), random.Random(number))


def test_every_reader_has_a_seed(fuzzer: Fuzzer) -> None:
    assert set(readers()) == {seed.reader for seed in fuzzer.found}


def test_nothing_but_an_error_of_ours_comes_of_damage(fuzzer: Fuzzer) -> None:
    faults = [fault for number in range(1000) if (fault := fuzzer.run(number))]
    assert not faults, faults[0].shown
    outcomes = {key.rpartition(" ")[2] for key in fuzzer.outcomes}
    assert {"read", "MalformedError", "FitError", "NotFoundError"} <= outcomes  # it does not only break headers


def test_an_execution_depends_on_its_number_alone(fuzzer: Fuzzer) -> None:
    again = Fuzzer(seed=12)
    assert all(fuzzer.damaged(number)[1:] == again.damaged(number)[1:] for number in range(50))


def test_a_traceback_and_a_hang_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = Fuzzer(seed=0, only="format:kohya")
    monkeypatch.setattr(fuzz_readers, "LIMIT", 0.2)

    def breaks(*_: object) -> None:
        raise KeyError("lora_down")

    def hangs(*_: object) -> None:
        while True:
            pass

    with fuzzer.working():
        for reader, what in ((breaks, "KeyError"), (hangs, "TooSlowError")):
            monkeypatch.setattr(type(KOHYA), "read", reader)
            faults = [fault.what for number in range(20) if (fault := fuzzer.run(number))]
            assert any(what in fault for fault in faults)
