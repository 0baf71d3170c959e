# SPDX-License-Identifier: Apache-2.0
"""Damaged inputs are read or refused by everything that reads: what the fuzzer found once, and some executions of it."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.adapters.registry import formats
from surgery_formats.containers.registry import containers
from surgery_formats.errors import MalformedError, SurgeryError
from tools.fuzz import limits
from tools.fuzz.fuzzer import Fault, Fuzzer
from tools.fuzz.target import Case, Seed, Target
from tools.fuzz.targets import all_targets, missing_for
from tools.fuzz.world import files_below

CORPUS = Path(__file__).parent / "corpus"
FOUND = json.loads((CORPUS / "found.json").read_text())
"""Inputs that ended in a fault when they were found: the target, whether it is given one file alone and which of several, and what is
said now."""
TARGETS = {target.name: target for target in all_targets() if not missing_for(target)}
EXECUTIONS = 2000


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    made = Fuzzer(list(TARGETS.values()), seed=12)
    with made.working():
        yield made


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_or_read(name: str, fuzzer: Fuzzer) -> None:
    known = FOUND[name]
    if known["target"] not in TARGETS:
        pytest.skip(f"{known['target']} needs more packages")
    files = files_below(CORPUS / name)
    if first := known.get("first"):
        files = {first: files.pop(first), **files}
    seed = Seed(name, files, known["alone"])
    messages = set()
    for number in range(20):  # each reads it in another way
        target, told = _telling(TARGETS[known["target"]])
        fault = fuzzer.execute(number, target, seed, files, random.Random(number))
        assert fault is None, fault.shown
        messages |= set(told)
    assert known.get("said", "") in " ".join(messages)


def _telling(target: Target) -> tuple[Target, list[str]]:
    """The target, and a list that gets what it refuses its input with."""
    told: list[str] = []

    def execute(case: Case) -> str:
        try:
            return target.execute(case)
        except SurgeryError as error:
            told.append(str(error))
            raise

    return Target(target.name, execute, target.seeds, target.on_disk), told


def test_every_reader_and_every_target_has_a_seed() -> None:
    readers = [f"format:{name}" for name in formats()] + [f"container:{name}" for name in containers()]
    assert set(readers) <= set(TARGETS)
    assert [name for name, target in TARGETS.items() if not target.seeds()] == []


def test_nothing_but_an_error_of_ours_comes_of_damage(fuzzer: Fuzzer) -> None:
    faults = [fault for number in range(EXECUTIONS) if (fault := fuzzer.run(number))]
    assert not faults, faults[0].shown
    ends = {end for _, end in fuzzer.outcomes}
    assert {"read", "the same", "MalformedError", "FitError", "NotFoundError"} <= ends  # it does not only break headers
    assert {name for name, _ in fuzzer.outcomes} == set(TARGETS)


def test_an_execution_depends_on_its_number_alone(fuzzer: Fuzzer) -> None:
    again = Fuzzer(list(TARGETS.values()), seed=12)
    assert all(fuzzer.damaged(number)[1:] == again.damaged(number)[1:] for number in range(50))


# --- the fuzzer sees what it is there for ---------------------------------------------------------------------------------


def _first_fault(execute: Callable[[Case], Any], folder: Path) -> Fault:
    seed = Seed("a seed", {"a.json": b'{"a": 1}'})
    fuzzer = Fuzzer([Target("test:it", execute, lambda: [seed])], 0)
    with fuzzer.working(folder):
        fault = fuzzer.run(0)
    assert fault is not None
    return fault


def test_a_traceback_and_a_hang_are_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)

    def breaks(*_: object) -> None:
        raise KeyError("lora_down")

    def hangs(*_: object) -> None:
        while True:
            pass

    fuzzer = Fuzzer([TARGETS["format:kohya"]], 0)
    with fuzzer.working():
        for reader, what in ((breaks, "KeyError"), (hangs, "TooSlowError")):
            monkeypatch.setattr(type(KOHYA), "read", reader)
            faults = [fault.what for number in range(20) if (fault := fuzzer.run(number))]
            assert any(what in fault for fault in faults)


def test_what_waits_is_a_fault_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "WAITING", 0.05)
    assert "TooSlowError" in _first_fault(lambda case: time.sleep(60), tmp_path).what


def test_what_does_more_than_reading_is_a_fault_and_does_not_happen(tmp_path: Path) -> None:
    written = tmp_path / "outside"
    assert "ForbiddenError" in _first_fault(lambda case: written.write_text("x"), tmp_path / "a").what
    assert not written.exists()
    assert "os.remove" in _first_fault(lambda case: os.remove(case.path), tmp_path / "b").what
    started = _first_fault(lambda case: subprocess.run(["true"], check=False), tmp_path / "c")
    assert "subprocess.Popen" in started.what
    connected = _first_fault(lambda case: socket.create_connection(("localhost", 9)), tmp_path / "d")
    assert "socket" in connected.what
    assert not (tmp_path / "b").joinpath("none").exists()


def test_a_message_that_acts_on_a_terminal_is_a_fault(tmp_path: Path) -> None:
    def execute(case: Case) -> str:
        raise MalformedError("\x1b[2Jall is well")

    assert "MalformedError" in _first_fault(execute, tmp_path).what
