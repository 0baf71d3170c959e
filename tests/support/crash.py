# SPDX-License-Identifier: Apache-2.0
"""Kill a command, or fail it, at every system call that touches its output, and see what is left.

Works on any command; needs strace.

`matrix` is the whole of it. `lint` looks at one good run instead: nothing may be renamed before it is synced,
no entry left unsynced.
"""

from __future__ import annotations

import collections
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from surgery_formats.files.output.manifest import verify_folder

__all__ = ["ERRORS", "Action", "Event", "Report", "at_call", "digest", "lint", "matrix", "spread"]

SYSCALLS = (
    "openat,write,pwrite64,copy_file_range,sendfile,ftruncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,flock"
)
ERRORS = ("ENOSPC", "EIO", "EMFILE", "EACCES")
# Faults a call can meet in real life; the others would only test the injection.
POSSIBLE = {
    "openat": ("EMFILE", "EACCES", "ENOSPC"),
    "pwrite64": ("ENOSPC", "EIO"),
    "write": ("ENOSPC", "EIO"),
    "copy_file_range": ("ENOSPC", "EIO", "EXDEV"),
    "fallocate": ("ENOSPC", "EOPNOTSUPP"),
    "fsync": ("EIO",),
    "rename": ("EIO", "EACCES"),
    "renameat2": ("EIO",),
    "mkdir": ("EACCES", "ENOSPC"),
    "flock": ("EIO",),
}
_T = TypeVar("_T")
Action = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]
"""What is done in the place of a call, of which it gets the name, the call itself and its arguments."""
_WRITES = (
    "pwrite",
    "pwrite64",
    "write",
    "copy_file_range",
    "sendfile",
    "ftruncate",
    "fallocate",
    "posix_fallocate",
)


@dataclass(frozen=True)
class Event:
    """One successful call on the output: what it changed or synced, and the new name of a rename."""

    call: str
    path: str
    other: str = ""


@dataclass
class Report:
    """What `matrix` saw; `failures` and `lint` are empty for a command that keeps its promise."""

    points: int = 0
    absent: int = 0
    complete: int = 0
    injections: int = 0
    seconds: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lint: list[str] = field(default_factory=list)


def digest(folder: Path) -> str:
    """One hash over every name and byte below `folder`."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        state.update(os.fsencode(path.relative_to(folder)) + b"\0")
        if path.is_file():
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def lint(events: Iterable[Event]) -> list[str]:
    """What a power cut could lose although the run said it was done."""
    dirty: set[str] = set()  # files with data, and folders with entries, that no fsync has covered
    issues: list[str] = []

    def below(name: str) -> list[str]:
        return sorted(path for path in dirty if path == name or path.startswith(name + "/"))

    def touch_parent(path: str) -> None:
        dirty.add(os.path.dirname(path))

    for event in events:
        if event.call in _WRITES:
            dirty.add(event.path)
        elif event.call in ("fsync", "fdatasync"):
            dirty.discard(event.path)
        elif event.call in ("create", "mkdir"):
            dirty.add(event.path)
            touch_parent(event.path)
        elif event.call in ("unlink", "rmdir"):
            dirty.discard(event.path)
            touch_parent(event.path)
        elif event.call == "rename":
            issues += [f"{path} was renamed before it was synced" for path in below(event.path)]
            dirty -= set(below(event.path))
            touch_parent(event.path)
            touch_parent(event.other)
    return issues + [f"{path} was never synced" for path in sorted(dirty)]


def _events(log: str, parent: Path) -> list[Event]:
    """The successful calls below `parent` in the log of ``strace -f -y``."""
    open_calls: dict[str, str] = {}
    found: list[Event] = []
    for line in log.splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            open_calls[pid] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            text = open_calls.pop(pid, "") + resumed.group(1)
        match = re.match(r"(\w+)\((.*)\)\s+=\s+(-?\d+)", text)
        if not match or int(match.group(3)) < 0:
            continue
        call, arguments = match.group(1), match.group(2)
        names = re.findall(r'"([^"]*)"', arguments)
        descriptors = re.findall(r"(?:\d+|AT_FDCWD)<([^>]*)>", arguments)
        paths = [
            os.path.join(descriptors[min(i, len(descriptors) - 1)] if descriptors else "", name)
            for i, name in enumerate(names)
        ]
        if call in _WRITES or call in ("fsync", "fdatasync"):
            event = Event(call, descriptors[-1] if call in ("copy_file_range",) else descriptors[0])
        elif call.startswith("rename"):
            event = Event("rename", paths[0], paths[1])
        elif call.startswith("openat") and "O_CREAT" in arguments:
            event = Event("create", paths[0])
        elif call.startswith(("mkdir", "unlink", "rmdir")):
            event = Event(re.sub("at$", "", call), paths[0])
        else:
            continue
        if event.path.startswith(str(parent)):
            found.append(event)
    return found


def matrix(
    command: Sequence[str],
    out: Path,
    env: Mapping[str, str],
    *,
    check: Callable[[Path], None] = verify_folder,
    faults: bool = True,
    limit: int | None = None,
) -> Report:
    """Run `command`, which writes `out`, once for every output system call, killed there; then with faults.

    After a kill the output is absent, or complete; the same command again succeeds with the bytes of an
    undisturbed run and leaves nothing beside it. After a fault there is one message and no traceback, nothing
    is left, and the command works again.

    Args:
        command: With its arguments; `out` must be what it writes. Its inputs may lie beside `out`.
        out: Must not exist; its parent must.
        env: Whole environment of the command.
        check: Raises unless the folder is complete.
        faults: Also inject errors, not only kills.
        limit: At most so many kills and so many faults, spread evenly; None is all of them.
    """
    report = Report()
    started = time.monotonic()
    before = set(os.listdir(out.parent))
    log = out.parent.parent / f"{out.name}.strace"

    def clean() -> None:
        for name in set(os.listdir(out.parent)) - before:
            path = out.parent / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def run(options: Sequence[str]) -> subprocess.CompletedProcess[str]:
        clean()
        tracer = ["strace", "-f", "-y", "-qqq", "-o", str(log), "-e", f"trace={SYSCALLS}", *options] if options else []
        return subprocess.run([*tracer, *command], capture_output=True, text=True, env=dict(env), check=False)

    def again() -> subprocess.CompletedProcess[str]:
        return subprocess.run(list(command), capture_output=True, text=True, env=dict(env), check=False)

    def state() -> str:
        """ "absent", "complete", or what is wrong with the output."""
        if not os.path.lexists(out):
            return "absent"
        try:
            check(out)
        except Exception as error:
            return f"output is wrong: {error}"
        return "complete" if digest(out) == wanted else "output differs from that of an undisturbed run"

    def litter() -> list[str]:
        return sorted(set(os.listdir(out.parent)) - before - {out.name})

    def rerun(point: str) -> None:
        second = again()
        left = litter()
        if second.returncode != 0 or state() != "complete" or left:
            words = second.stderr[-300:]
            report.failures.append(f"{point}: again: exit {second.returncode}, {state()}, left {left}: {words}")

    first = run(["-e", "signal=none"])
    if first.returncode != 0:
        raise AssertionError(f"the undisturbed run failed: {first.stderr[-1000:]}")
    wanted = digest(out)
    report.lint = lint(_events(log.read_text(errors="replace"), out.parent))
    # Only calls on these paths are counted, so that what an interpreter opens for itself does not move the
    # points.
    marks = re.findall(r'[<"](' + re.escape(str(out.parent)) + r'/[^>"]*)[>"]', log.read_text(errors="replace"))
    only = [word for path in sorted({str(out.parent), *(p for p in marks if out.name in p)}) for word in ("-P", path)]
    run(only)
    counted: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in log.read_text(errors="replace").splitlines():
        if found := re.match(r"(\d+)\s+(\w+)\(", line):
            counted[found.group(1), found.group(2)] += 1
    # strace counts per thread, and the first thread to get there is the one that dies
    most: dict[str, int] = {}
    for (_, call), number in counted.items():
        most[call] = max(most.get(call, 0), number)
    report.calls = most
    points = [(call, number + 1) for call in sorted(most) for number in range(most[call])]
    for call, number in spread(points, limit):
        report.points += 1
        run([*only, "-e", f"inject={call}:signal=KILL:when={number}"])
        left = state()
        if left == "absent":
            report.absent += 1
            rerun(f"killed at {call} {number}")
        elif left == "complete" and not litter():
            report.complete += 1
        else:
            report.failures.append(f"killed at {call} {number}: {left}, left {litter()}")
    injections = (
        [(call, number, error) for call, number in points for error in POSSIBLE.get(call, ())] if faults else []
    )
    for call, number, error in spread(injections, limit):
        report.injections += 1
        result = run([*only, "-e", f"inject={call}:error={error}:when={number}"])
        point = f"{error} at {call} {number}"
        if litter():
            report.failures.append(f"{point}: left {litter()}")
        if result.returncode == 0:
            if state() != "complete":
                report.failures.append(f"{point}: exit 0, {state()}")
            continue
        if "Traceback" in result.stderr or not result.stderr.strip():
            report.failures.append(f"{point}: exit {result.returncode} says {result.stderr[-300:]!r}")
        if state() != "absent":
            report.failures.append(f"{point}: exit {result.returncode}, {state()}")
        else:
            rerun(point)
    clean()
    report.seconds = time.monotonic() - started
    return report


def spread(items: Sequence[_T], limit: int | None) -> Sequence[_T]:
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def at_call(number: int, then: Action) -> Action:
    """Calls as they are, but for the one of this number, counted from 1."""
    seen = 0

    def action(name: str, real: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        nonlocal seen
        seen += 1
        return then(name, real, given) if seen == number else real()

    return action
