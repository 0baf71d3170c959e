# SPDX-License-Identifier: Apache-2.0
"""What is done in the place of a call of a command (`tests.support.crash.Action`): it kills, fails, interrupts, or only looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.crash import Action
from tests.support.crash_states import States

__all__ = [
    "KILLED",
    "WRITES",
    "Interrupt",
    "count_calls",
    "fail",
    "keep",
    "killed",
    "note_modules",
    "short",
    "torn",
]

KILLED = 137
WRITES = ("write", "pwrite", "copy_file_range")


def killed(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    os._exit(KILLED)


_pwrite, _write, _copy_file_range = os.pwrite, os.write, os.copy_file_range


def short(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    """Half of what a write was to write; another thread's call may be at this number."""
    if name not in WRITES:
        return real()
    if name == "copy_file_range":
        source, target, count, *offsets = given
        return _copy_file_range(source, target, (count + 1) // 2, *offsets)
    fd, data, *offset = given
    half = memoryview(data).cast("B")[: (len(memoryview(data).cast("B")) + 1) // 2]
    return _pwrite(fd, half, *offset) if name == "pwrite" else _write(fd, half)


def torn(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    short(name, real, given)
    os._exit(KILLED)


def keep(states: States) -> Action:
    """Keep what a kill would leave before each call, and in the middle of each write."""
    number = 0

    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        nonlocal number
        number += 1
        at = number
        states.keep(f"kill {at}")
        if name not in WRITES:
            return real()
        done = short(name, real, given)
        states.keep(f"torn {at}")
        return done + _rest(name, given, done)

    return action


def _rest(name: str, given: tuple[Any, ...], done: int) -> int:
    """Write what a short write left out."""
    if name == "copy_file_range":
        source, target, count, *offsets = given
        return _copy_file_range(source, target, count - done, *(offset + done for offset in offsets))
    fd, data, *offset = given
    rest = memoryview(data).cast("B")[done:]
    return _pwrite(fd, rest, offset[0] + done) if name == "pwrite" else _write(fd, rest)


@dataclass
class Interrupt:
    """A signal at a call, and as often as `times` at those that follow, among them what is cleaned up."""

    number: int
    signal: int
    times: int
    seen: int = 0

    def __call__(self, name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        self.seen += 1
        if self.number <= self.seen < self.number + self.times:
            os.kill(os.getpid(), self.signal)
        return real()


def fail(number: int) -> Action:
    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    return action


def count_calls(log: Path) -> Action:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        _write(fd, name.encode() + b"\n")
        return real()

    return action


def note_modules(log: Path) -> Action:
    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        return real()

    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    action.end = lambda: _write(fd, "\n".join(sys.modules).encode())  # type: ignore[attr-defined]
    return action
