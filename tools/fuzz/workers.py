# SPDX-License-Identifier: Apache-2.0
"""Many executions in several processes; one that is stuck, or ends its process, is a fault."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .fuzzer import Fault, Fuzzer
from .limits import WAITING, bound_memory

__all__ = ["Outcome", "execute"]

STUCK = 60.0  # seconds after which a worker that does not even hear the alarm is killed


@dataclass
class Outcome:
    """What all executions did.

    Attributes:
        counts: How often each target ended in which way.
        faults: By what they did; equal faults together.
        done: Executions.
        seconds: How long it took.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    done: int = 0
    seconds: float = 0.0

    def add(self, fault: Fault) -> None:
        """A fault."""
        self.faults.setdefault(f"{fault.target}: {fault.what}", []).append(fault)


def execute(fuzzer: Fuzzer, first: int, count: int, workers: int, within: float = float("inf")) -> Outcome:
    """Executions `first` to `first + count`, each worker every `workers`-th of them; none begins after `within` seconds."""
    context = multiprocessing.get_context("fork")
    beats = context.Array("q", 2 * workers, lock=False)  # of each worker: its execution, and how many it has done
    results = context.SimpleQueue()
    started = time.monotonic()
    until = started + within

    def work(number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        bound_memory()
        with fuzzer.working():
            for execution in range(first + number, first + count, workers):
                beats[2 * number] = execution
                if (fault := fuzzer.run(execution)) is not None:
                    results.put(fault)
                beats[2 * number + 1] += 1
                if time.monotonic() > until:
                    break
        results.put(fuzzer.outcomes)

    running = [context.Process(target=work, args=(number,)) for number in range(workers)]
    for worker in running:
        worker.start()
    outcome = _watched(running, beats, results)
    outcome.done, outcome.seconds = sum(beats[1::2]), time.monotonic() - started
    return outcome


def _watched(workers: list[Any], beats: Any, results: Any) -> Outcome:
    outcome = Outcome()
    seen = {number: (-1, time.monotonic()) for number in range(len(workers))}
    said = time.monotonic()
    ended: set[int] = set()
    while len(ended) < len(workers) or not results.empty():
        while not results.empty():
            got = results.get()
            if isinstance(got, Fault):
                outcome.add(got)
            else:
                outcome.counts += got
        now = time.monotonic()
        for number, worker in enumerate(workers):
            if number in ended:
                continue
            if beats[2 * number + 1] != seen[number][0]:
                seen[number] = beats[2 * number + 1], now
            stuck = now - seen[number][1] > STUCK + WAITING
            if stuck:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
            if not worker.is_alive():
                ended.add(number)
                if worker.exitcode:
                    what = "a worker was stuck" if stuck else f"a worker ended with {worker.exitcode}"
                    outcome.add(Fault(beats[2 * number], "", "", what, what))
        if now - said > 30:
            said = now
            print(f"{sum(beats[1::2])} done, {len(outcome.faults)} different faults", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return outcome
