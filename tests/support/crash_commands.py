# SPDX-License-Identifier: Apache-2.0
"""The crash and fault matrix of whole commands: forks of one process, killed, interrupted or failed at one call on their output.

As a command: ``crash_commands.py FOLDER [NAME ...]`` writes a line of JSON for each case of `crash_table`; ``--limit N`` takes N
points and N faults of each, spread evenly. Inputs are made in FOLDER, which must not exist.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.crash import POSSIBLE, at_call, spread
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
from tests.support.crash_forks import Place, import_once, run_in_fork
from tests.support.crash_inputs import write_inputs
from tests.support.crash_states import States, tree_digest
from tests.support.crash_table import CASES, Case

__all__ = ["run_case"]

ROOT = Path(__file__).parents[2]
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


def run_case(case: Case, home: Path, limit: int | None = None) -> dict[str, Any]:
    """Every point of one command; `failures` is empty for one that keeps its promise."""
    started = time.monotonic()
    place = Place(home, case)
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
    code, said = run_in_fork(place, place.words, note_modules(home / "modules"))
    if code != 0:
        failures.append(f"the undisturbed run: exit {code}, {said}")
        return report
    import_once((home / "modules").read_text().split())
    wanted = place.states()
    if "absent" in wanted.values():
        failures.append(f"the undisturbed run wrote {wanted}")
    if place.litter():
        failures.append(f"the undisturbed run left {place.litter()}")
    place.fresh()
    run_in_fork(place, place.words, count_calls(home / "calls"))
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
        code, said = run_in_fork(place, place.words, None)
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
    run_in_fork(place, place.words, keep(kept), kept)
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
        code, said = run_in_fork(place, place.words, at_call(number, killed if how == "kill" else torn))
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
        code, said = run_in_fork(place, place.words, at_call(number, fail(getattr(errno, error))))
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
        code, said = run_in_fork(place, place.words, at_call(number, short))
        if code != 0 or place.states() != wanted or place.litter():
            failures.append(f"short {name} at {number}: exit {code}, left {place.litter()}, {said}")
    for number, name in spread(list(enumerate(names, 1)), limit):
        place.fresh()
        report["signals"] += 1
        times = 1 + number // len(SIGNALS) % 2  # the second meets what is being cleaned up
        sent = SIGNALS[number % len(SIGNALS)]
        code, said = run_in_fork(place, place.words, Interrupt(number, sent, times))
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


def _added(place: Place, home: Path) -> bool:
    """Whether a folder that files are added to holds its old files, and whole new ones."""
    out = place.work / place.case.outputs[0]
    source = home / next(path for path, name in place.case.brings if name == place.case.outputs[0])
    return all((out / name).is_file() for name in os.listdir(source))


def _one_message(said: str) -> bool:
    return said.count("error: ") == 1 and "Traceback" not in said and ".surgery-" not in said.split("hint:")[0]


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
        place = Place(home, Case("inputs", words))
        place.fresh()
        code, said = run_in_fork(place, words.split(), None)
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
