# SPDX-License-Identifier: Apache-2.0
"""The crash and fault matrix of whole commands: forks of one process, killed, interrupted or failed at one call on their output.

As a command: ``crash_commands.py FOLDER [NAME ...]`` writes a line of JSON for each case of `crash_table`; ``--limit N`` takes N
points and N faults of each, spread evenly. Inputs are made in FOLDER, which must not exist.

A call counts if it names the folder of the outputs or the one of temporary files, or a descriptor of a file there.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import gc
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery_formats.files.output import kernel_copy
from tests.support.crash import POSSIBLE, Action, at_call, digest, spread
from tests.support.crash_actions import (
    KILLED,
    WRITES,
    Interrupt,
    count_calls,
    fail,
    keep,
    killed,
    note_modules,
    short,
    torn,
)
from tests.support.crash_inputs import write_inputs
from tests.support.crash_states import States, tree_digest
from tests.support.crash_table import CASES, Case

__all__ = ["run_case"]

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds of one run
CALLS = (
    "open",
    "write",
    "pwrite",
    "copy_file_range",
    "sendfile",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "mkdir",
    "rename",
    "replace",
    "link",
    "symlink",
    "unlink",
    "remove",
    "rmdir",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ERRORS = {
    **POSSIBLE,
    "posix_fallocate": POSSIBLE["fallocate"],
    "pwrite": POSSIBLE["pwrite64"],
    "replace": POSSIBLE["rename"],
    "renameat2": ("EIO", "EACCES"),
    "link": ("EACCES", "EMLINK", "ENOSPC"),
    "ftruncate": ("EIO",),
}


class _Place:
    """Where a case runs: ``work`` and ``tmp`` of a home, which is the working folder."""

    def __init__(self, home: Path, case: Case) -> None:
        self.home, self.case = home, case
        self.work, self.tmp = home / "work", home / "tmp"
        self.words = case.words.split()

    def fresh(self) -> None:
        """As before the first run."""
        for folder in (self.work, self.tmp):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for source, name in self.case.brings:
            path = self.home / source
            if path.is_dir():
                # linked, so that identities stay: an output is never written in place
                shutil.copytree(path, self.work / name, copy_function=os.link)
            else:
                shutil.copyfile(path, self.work / name)

    def states(self) -> dict[str, str]:
        """The digest of each output, or "absent"."""
        return {name: _digest(self.work / name) for name in self.case.outputs}

    def litter(self) -> list[str]:
        """What lies beside the outputs, or among temporary files."""
        known = {*self.case.outputs, *(name for _, name in self.case.brings)}
        beside = set(os.listdir(self.work)) - known
        if self.case.adds:
            beside |= {name for name in os.listdir(self.work / self.case.outputs[0]) if name.startswith(".")}
        return sorted(beside | {f"tmp/{name}" for name in os.listdir(self.tmp)})


def _digest(path: Path) -> str:
    if not os.path.lexists(path):
        return "absent"
    return digest(path) if path.is_dir() else str(hash(path.read_bytes()))


def run_case(case: Case, home: Path, limit: int | None = None) -> dict[str, Any]:
    """Every point of one command; `failures` is empty for one that keeps its promise."""
    started = time.monotonic()
    place = _Place(home, case)
    failures: list[str] = []
    report: dict[str, Any] = {
        "case": case.name,
        "kills": 0,
        "faults": 0,
        "short": 0,
        "signals": 0,
        "failures": failures,
    }
    place.fresh()
    before = place.states()
    code, said = _child(place, place.words, note_modules(home / "modules"))
    if code != 0:
        failures.append(f"the undisturbed run: exit {code}, {said}")
        return report
    _import((home / "modules").read_text().split())
    wanted = place.states()
    if "absent" in wanted.values():
        failures.append(f"the undisturbed run wrote {wanted}")
    if place.litter():
        failures.append(f"the undisturbed run left {place.litter()}")
    place.fresh()
    _child(place, place.words, count_calls(home / "calls"))
    names = (home / "calls").read_text().splitlines()
    report["calls"] = len(names)
    if place.states() != wanted:
        failures.append("a second run wrote other bytes")
    replaces = "--overwrite" in place.words

    def partly(states: dict[str, str]) -> bool:
        """Whether each output is as before, or complete."""
        if case.adds:
            return all((place.work / name).is_dir() for name in states) and _added(place, home)
        return all(state in (before[name], wanted[name]) for name, state in states.items())

    def again(point: str) -> None:
        done = place.states() == wanted and not replaces
        code, said = _child(place, place.words, None)
        if done and len(wanted) == 1 and not place.litter():
            if code not in (0, 2):
                failures.append(f"{point}: complete, and again: exit {code}, {said}")
            return
        told = code == 2 and case.adds and "already exists" in said  # all was there but the end of a hidden folder
        if (code != 0 and not told) or place.states() != wanted or place.litter():
            differ = [name for name, state in place.states().items() if state != wanted[name]]
            failures.append(f"{point}: again: exit {code}, wrong {differ}, left {place.litter()}, {said}")

    kept = States(home / "states", (place.work, place.tmp), (home / "in", home / "made"))
    place.fresh()
    _child(place, place.words, keep(kept), kept)
    points = [(number, name, "kill") for number, name in enumerate(names, 1)]
    points += [(number, name, "torn") for number, name in enumerate(names, 1) if name in WRITES]
    kinds = {kept.digest(f"{how} {number}") for number, _, how in points}
    tried: set[str] = set()

    def left(point: str) -> None:
        """What a kill left is as before or complete, and the same command goes on from it."""
        if not partly(place.states()):
            failures.append(f"{point}: {place.states()}")
        again(point)

    for number, name, how in spread(points, 3):
        place.fresh()
        code, said = _child(place, place.words, at_call(number, killed if how == "kill" else torn))
        if code != KILLED:
            failures.append(f"{how} at {number} ({name}): exit {code}, {said}")
        if tree_digest((place.work, place.tmp)) not in kinds:  # another thread was further
            left(f"{how} at {number} ({name}), in earnest")
    for number, name, how in spread(points, limit):
        report["kills"] += 1
        if (state := kept.digest(f"{how} {number}")) in tried:
            continue
        tried.add(state)
        place.fresh()
        kept.restore(f"{how} {number}")
        left(f"{how} at {number} ({name})")
    report["states"] = len(tried)
    faults = [(number, name, error) for number, name in enumerate(names, 1) for error in ERRORS.get(name, ())]
    for number, name, error in spread(faults, limit):
        place.fresh()
        report["faults"] += 1
        code, said = _child(place, place.words, at_call(number, fail(getattr(errno, error))))
        point = f"{error} at {number} ({name})"
        states, litter = place.states(), place.litter()
        if code == 0:
            if states != wanted:
                failures.append(f"{point}: exit 0, {states}")
        elif code not in (2, 3, 4, 5, 7) or not _one_message(said):
            failures.append(f"{point}: exit {code}, {said}")
        named = "could not be removed" in said
        if code and (not partly(states) or (len(states) == 1 and not named and states == wanted)):
            failures.append(f"{point}: exit {code}, {states} {said}")
        if litter and not named:
            failures.append(f"{point}: left {litter}")
        if code and not named and (litter or states != before):  # else this is where the undisturbed run began
            again(point)
    shorts = [(number, name) for number, name in enumerate(names, 1) if name in WRITES]
    for number, name in spread(shorts, limit):
        place.fresh()
        report["short"] += 1
        code, said = _child(place, place.words, at_call(number, short))
        if code != 0 or place.states() != wanted or place.litter():
            failures.append(f"short {name} at {number}: exit {code}, left {place.litter()}, {said}")
    for number, name in spread(list(enumerate(names, 1)), limit):
        place.fresh()
        report["signals"] += 1
        times = 1 + number // len(SIGNALS) % 2  # the second meets what is being cleaned up
        sent = SIGNALS[number % len(SIGNALS)]
        code, said = _child(place, place.words, Interrupt(number, sent, times))
        point = f"{times} {sent.name} at {number} ({name})"
        states_now, litter = place.states(), place.litter()
        done = code == 0 and states_now == wanted and "error" not in said
        stopped = code == 128 + sent and said.endswith("error: interrupted\n") and _one_message(said)
        if not (done or stopped) or litter or not partly(states_now):
            failures.append(f"{point}: exit {code}, {states_now}, left {litter}, {said}")
        elif states_now not in (before, wanted):
            again(point)
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


def _added(place: _Place, home: Path) -> bool:
    """Whether a folder that files are added to holds its old files, and whole new ones."""
    out = place.work / place.case.outputs[0]
    source = home / next(path for path, name in place.case.brings if name == place.case.outputs[0])
    return all((out / name).is_file() for name in os.listdir(source))


def _one_message(said: str) -> bool:
    return said.count("error: ") == 1 and "Traceback" not in said and ".surgery-" not in said.split("hint:")[0]


# --- one run ------------------------------------------------------------------------------------------------------------


def _child(place: _Place, words: Sequence[str], action: Action | None, states: States | None = None) -> tuple[int, str]:
    """The command in a fork; its exit code and what it said. Calls by which `states` are kept do not count."""
    words_file = place.home / "said"
    pid = os.fork()
    if pid == 0:
        leave = os._exit
        code = 99
        try:
            signal.alarm(LIMIT)
            os.dup2(os.open(words_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(place.home)
            os.environ["TMPDIR"] = str(place.tmp)
            import tempfile

            tempfile.tempdir = str(place.tmp)
            from surgery_cli.__main__ import main as run_process
            from surgery_cli.group import surgery

            if action is not None:
                _replace(action, (str(place.work), str(place.tmp)), states)
            if isinstance(action, Interrupt):  # as from a terminal, whatever this was started by
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                sys.argv = ["surgery", "-q", *words]
                run_process()
            surgery.main(["-q", *words], prog_name="surgery")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            sys.stderr.write(f"escaped: {error!r}\n")
        finally:
            if action is not None and hasattr(action, "end"):
                action.end()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            leave(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, words_file.read_text(errors="replace")[-600:]


def _replace(action: Action, roots: tuple[str, ...], states: States | None) -> None:
    """Let calls on files below `roots` go through `action`."""
    real_readlink = os.readlink
    within = threading.local() if states is None else states.within

    def path_of(value: Any, folder: Any = None) -> str:
        if isinstance(value, int):
            try:
                return real_readlink(f"/proc/self/fd/{value}")
            except OSError:
                return ""
        path = os.fsdecode(value)
        if folder is not None and not os.path.isabs(path):
            path = os.path.join(path_of(folder), path)
        return os.path.normpath(os.path.join(os.getcwd(), path))

    def ours(name: str, given: tuple[Any, ...], more: dict[str, Any]) -> bool:
        named = (
            given[:2] if name in ("rename", "replace", "link", "symlink", "renameat2", "copy_file_range") else given[:1]
        )
        folder = more.get("dir_fd")
        return any(path_of(value, folder).startswith(roots) for value in named)

    def wrap(module: Any, attribute: str, name: str) -> None:
        real = getattr(module, attribute)

        def wrapped(*given: Any, **more: Any) -> Any:
            if getattr(within, "now", False) or not given or not ours(name, given, more):
                return real(*given, **more)
            if name == "open" and module is not os:
                mode = given[1] if len(given) > 1 else more.get("mode", "r")
                if not set(mode) & set("wax+"):
                    return real(*given, **more)
            if (
                name == "open"
                and module is os
                and not given[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY)
            ):
                return real(*given, **more)
            return action(name, lambda: real(*given, **more), given)

        setattr(module, attribute, wrapped)

    for call in CALLS:
        wrap(os, call, call)
    wrap(fcntl, "flock", "flock")
    wrap(builtins, "open", "open")
    io.open = builtins.open
    rename_with = kernel_copy._rename_with

    def renameat2(flag: int, old: Any, new: Any) -> bool:
        if not ours("renameat2", (old, new), {}):
            return rename_with(flag, old, new)
        return bool(action("renameat2", lambda: rename_with(flag, old, new), (old, new)))

    kernel_copy._rename_with = renameat2


def _import(names: Sequence[str]) -> None:
    """Import what a command imports, once, so that its forks need not."""
    for name in names:
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


# --- all cases ----------------------------------------------------------------------------------------------------------


def prepare(home: Path, cases: Sequence[Case]) -> None:
    """Make the inputs of `cases`."""
    home.mkdir()
    write_inputs(home / "in")
    (home / "made").mkdir()
    (home / "golden").symlink_to(ROOT / "tests/golden/gguf/llama")
    for words in dict.fromkeys(words for case in cases for words in case.makes):
        if words.startswith("quantise "):
            _quantise(home, words.split()[1])
            continue
        place = _Place(home, Case("inputs", words))
        place.fresh()
        code, said = _child(place, words.split(), None)
        if code != 0:
            raise AssertionError(f"surgery {words}: exit {code}, {said}")


def _quantise(home: Path, format_name: str) -> None:
    """In a process of its own: torch would make the forks slow."""
    code = (
        "import sys, pathlib; from tests.support.quantised_folders import quantise_folder\n"
        "quantise_folder(pathlib.Path('in/base'), pathlib.Path('made', sys.argv[1]), sys.argv[1])"
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "formats", "cli"))
    subprocess.run(
        [sys.executable, "-c", code, format_name], check=True, env={**os.environ, "PYTHONPATH": path}, cwd=home
    )


def main(words: Sequence[str]) -> None:
    """See the module."""
    limit = None
    if "--limit" in words:
        at = words.index("--limit")
        limit = int(words[at + 1])
        words = [*words[:at], *words[at + 2 :]]
    home = Path(words[0]).absolute()
    cases = [case for case in CASES if case.name in words[1:] or not words[1:]]
    prepare(home, cases)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for case in cases:
        if case.recipe:
            (home / "recipe.yaml").write_text(case.recipe)
        sys.stdout.write(json.dumps(run_case(case, home, limit)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # a kill loses nothing that the kernel has: waiting for the disk would only make this slow, and the call still counts
    os.fsync = lambda fd: None
    main(sys.argv[1:])
