# SPDX-License-Identifier: Apache-2.0
"""The crash and fault matrix without strace: `os` functions replaced in forked children.

As a command: ``crash_inside.py SCENARIO FOLDER``; JSON on stdout. Scenarios: ``fresh``, ``resumed`` (every
run starts from what a killed one left), ``overwrite``, ``two-step`` (overwrite where the system cannot
exchange two names).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery_formats.errors import SurgeryError
from surgery_formats.files.output import stage
from surgery_formats.files.output.manifest import verify_folder
from tests.support.crash import ERRORS, Action, Event, at_call, digest, lint
from tests.support.crash_job import job

CALLS = (
    "open",
    "mkdir",
    "pwrite",
    "fsync",
    "rename",
    "unlink",
    "rmdir",
    "posix_fallocate",
    "copy_file_range",
)
KILLED, UNTYPED = 137, 99

# What happens at a call: given its name, the real function and the call; returns what the call returns.


def main(scenario: str, home: Path) -> dict[str, Any]:
    """Run every point of `scenario` below the empty folder `home`."""
    # A kill loses nothing that the kernel has: waiting for the disk would only make this slow. It still is a
    # point, and `lint` sees it.
    os.fsync = lambda fd: None
    overwrite = scenario in ("overwrite", "two-step")
    if scenario == "two-step":
        setattr(stage, "exchange", lambda one, other: False)  # noqa: B010 - not exported, says mypy
    source = home / "source"
    source.write_bytes(os.urandom(50_000))
    work = home / "work"
    out = work / "out"

    def write(to: Path) -> int:
        return job(source, to, overwrite=overwrite)

    reference = home / "reference"
    write(reference)
    wanted = digest(reference)
    old = home / "old"
    if overwrite:
        shutil.copytree(reference, old)
        (old / "config.json").rename(old / "stale.json")

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if overwrite:
            shutil.copytree(old, out)
        if scenario == "resumed":
            shutil.copytree(left_behind, work, dirs_exist_ok=True)

    def state() -> str:
        if not os.path.lexists(out):
            return "absent"
        found = digest(out)
        if overwrite and found == digest(old):
            return "old"
        try:
            verify_folder(out)
        except SurgeryError as error:
            return f"wrong: {error}"
        return "complete" if found == wanted else "differs"

    def litter() -> list[str]:
        return sorted(set(os.listdir(work)) - {"out"})

    left_behind = home / "left"
    if scenario == "resumed":
        # Killed before the second file gets its name: a finished file, an unfinished one and a journal are
        # there.
        work.mkdir()
        _child(lambda: write(out), _count(home / "calls"))
        renames = [at for at, name in enumerate((home / "calls").read_text().splitlines(), 1) if name == "rename"]
        shutil.rmtree(out)
        _child(lambda: write(out), at_call(renames[1], _kill))
        work.rename(left_behind)

    fresh()
    _, note = _child(lambda: write(out), _count(home / "calls"))
    names = (home / "calls").read_text().splitlines()
    report: dict[str, Any] = {
        "calls": len(names),
        "reused": note,
        "failures": [],
        "kills": {},
        "faults": 0,
        "clean": 0,
        "rerun_reused": [],
    }
    failures = report["failures"]
    locked = names.index("flock") + 1
    fresh()
    _child(lambda: write(out), _record(home / "events"))
    events = [Event(*fields) for fields in json.loads((home / "events").read_text())]
    report["lint"] = lint(event for event in events if event.path.startswith(str(work)))

    def rerun(point: str) -> None:
        code, said = _child(lambda: write(out), None)
        if code == 0:
            report["rerun_reused"].append(int(said))
        if code != 0 or state() != "complete" or litter():
            failures.append(f"{point}: run again: exit {code}, {state()}, left {litter()}, said {said}")

    home_states = ("old",) if overwrite else ("absent",)
    for number in range(1, len(names) + 1):
        for how, action in (("killed", _kill), ("torn", _torn)):
            if how == "torn" and names[number - 1] not in ("pwrite", "copy_file_range"):
                continue
            fresh()
            point = f"{how} at {number} ({names[number - 1]})"
            code, said = _child(lambda: write(out), at_call(number, action))
            left = state()
            report["kills"][left] = report["kills"].get(left, 0) + 1
            allowed = {*home_states, "complete"} | ({"absent"} if scenario == "two-step" else set())
            if code != KILLED or left not in allowed:
                failures.append(f"{point}: exit {code}, {left}, said {said}")
            if overwrite or left != "complete":
                rerun(point)
    for number in range(1, len(names) + 1):
        for error in ERRORS:
            fresh()
            point = f"{error} at {number} ({names[number - 1]})"
            code, said = _child(lambda: write(out), at_call(number, _fail(getattr(errno, error))))
            report["faults"] += 1
            named = "could not be removed" in said
            if code == 0:
                report["clean"] += 1
            elif code == UNTYPED or not said or code not in (2, 3, 5, 7):
                failures.append(f"{point}: exit {code}, said {said}")
            left = state()
            if left not in (("complete",) if code == 0 or named else home_states):
                failures.append(f"{point}: exit {code}, {left}")
            # What an earlier run left may stay while it is not locked: it can still be resumed.
            if litter() and not named and not (code and scenario == "resumed" and number <= locked):
                failures.append(f"{point}: left {litter()}")
            if (overwrite or left != "complete") and error == ERRORS[0]:  # the same state for each error
                rerun(point)
    fresh()
    code, said = _child(lambda: write(out), _every_write_short)
    if code != 0 or state() != "complete":
        failures.append(f"short writes: exit {code}, {state()}, said {said}")
    return report


def _child(work: Callable[[], object], action: Action | None) -> tuple[int, str]:
    """Run `work` in a forked child whose `os` calls go through `action`; its exit code and its words."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, said = UNTYPED, ""
        say, leave = os.write, os._exit
        try:
            if action is not None:
                _replace(action)
            said = str(work())
            code = 0
        except SurgeryError as error:
            code, said = error.exit_code, str(error)
        except BaseException as error:
            said = repr(error)
        finally:
            say(write, said.encode())
            leave(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def _replace(action: Action) -> None:
    for module, name in (*((os, call) for call in CALLS), (fcntl, "flock"), (stage, "exchange")):
        real = getattr(module, name)

        def wrapped(*given: Any, _name: str = name, _real: Callable[..., Any] = real, **more: Any) -> Any:
            return action(_name, lambda: _real(*given, **more), given)

        setattr(module, name, wrapped)


def _kill(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    os._exit(KILLED)


_pwrite, _copy_file_range = os.pwrite, os.copy_file_range


def _half(name: str, given: tuple[Any, ...]) -> int:
    if name == "pwrite":
        fd, data, offset = given
        return _pwrite(fd, data[: (len(data) + 1) // 2], offset)
    source, target, count, *offsets = given
    return _copy_file_range(source, target, (count + 1) // 2, *offsets)


def _torn(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    _half(name, given)
    os._exit(KILLED)


def _every_write_short(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
    return _half(name, given) if name in ("pwrite", "copy_file_range") else real()


def _fail(number: int) -> Action:
    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    return action


def _count(log: Path) -> Action:
    handle = log.open("w", buffering=1)

    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        handle.write(name + "\n")
        return real()

    return action


def _record(log: Path) -> Action:
    """Note what each successful call changed, as the fields of an `Event`."""
    events: list[tuple[str, ...]] = []

    def path(value: Any, folder: int | None = None) -> str:
        if isinstance(value, int):
            return os.readlink(f"/proc/self/fd/{value}")
        return os.path.join(path(folder) if folder is not None else os.getcwd(), os.fsdecode(value))

    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        if name in ("pwrite", "fsync", "posix_fallocate"):
            events.append((name, path(given[0])))
        elif name == "copy_file_range":
            events.append((name, path(given[1])))
        elif name in ("rename", "exchange"):
            events.append(("rename", path(given[0]), path(given[1])))
        elif name == "mkdir" or (name == "open" and given[1] & os.O_CREAT):
            events.append(("create", path(given[0])))
        elif name in ("unlink", "rmdir") and os.path.isabs(given[0]):
            events.append((name, path(given[0])))
        log.write_text(json.dumps(events))
        return real()

    return action


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(json.dumps(found))
