# SPDX-License-Identifier: Apache-2.0
"""Whole processes, timed: wall seconds, processor seconds, and the peak of resident memory the kernel saw."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sample:
    """One run: seconds of wall and processor time, peak resident bytes (VmHWM: page cache mapped in would count).

    Of a tree of processes the peak is that of the first one's pages and of those that the others alone have, looked at every 10 ms.
    """

    wall: float
    cpu: float
    peak: int


def environment(tree: Path = ROOT) -> dict[str, str]:
    """As on a clone of `tree` that was not installed; other packages of PYTHONPATH stay."""
    paths = [str(tree / folder) for folder in ("", "formats", "cli")]
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if _is_extra(path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *kept])}


def _is_extra(path: str) -> bool:
    return bool(path) and not any(
        (Path(path) / name).is_dir() for name in ("surgery", "surgery_formats", "surgery_cli")
    )


def add_against(parser: argparse.ArgumentParser) -> None:
    """The option to measure another checkout in the same run."""
    parser.add_argument("--against", type=Path, help="a checkout of an earlier commit to measure in turn with this one")


def trees(options: argparse.Namespace) -> dict[str, Path]:
    """What is measured: this checkout, and the other if there is one; by what the tables add to their names."""
    return {"": ROOT} | ({} if options.against is None else {", before": options.against.resolve()})


def run(
    command: Sequence[str],
    log: Path,
    extra: Mapping[str, str] | None = None,
    tree: Path = ROOT,
    *,
    children: bool = False,
) -> Sample:
    """Run `command` on `tree` to its end; its output goes to `log`, which is shown if it fails.

    With `children` its memory is that of all processes that it starts.
    """
    with open(log, "wb") as out:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(tree) | dict(extra or {})
        )
        sample, child.returncode = _watched(child.pid, started, _together if children else _high_water)
    if child.returncode:
        sys.exit(f"{' '.join(command)} left with {child.returncode}:\n{log.read_text()[-2000:]}")
    return sample


def forked(job: Callable[[], object], log: Path) -> Sample:
    """Run `job` in a fork of this process, which need not import again what this one has; else as `run`."""
    started = time.perf_counter()
    if not (pid := os.fork()):
        with open(log, "wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    sample, code = _watched(pid, started)
    if code:
        sys.exit(f"left with {code}:\n{log.read_text()[-2000:]}")
    return sample


def _watched(pid: int, started: float, memory: Callable[[int], int] | None = None) -> tuple[Sample, int]:
    peak = 0
    while True:
        peak = max(peak, (memory or _high_water)(pid))
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            wall = time.perf_counter() - started
            return Sample(wall, usage.ru_utime + usage.ru_stime, peak), os.waitstatus_to_exitcode(status)
        time.sleep(0.01)


def _high_water(pid: int) -> int:
    """VmHWM of a process and, for a shell's sake, nobody else; rusage would count the memory of the process that started it."""
    try:
        with open(f"/proc/{pid}/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _together(pid: int, kinds: tuple[str, ...] = ("Rss:",)) -> int:
    """Pages of a process, and those of its forks that it does not have, too."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith(kinds))
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                total += sum(_together(int(child), ("Private_",)) for child in children.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def versions(*packages: str) -> str:
    """``Python 3.11.7, Linux 6.18, 2 cores; torch 2.13.0, ...``."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores; {found}"
    )
