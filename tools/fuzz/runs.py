# SPDX-License-Identifier: Apache-2.0
"""Runs of all targets, and what is said and kept of them."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy

from .fuzzer import Fault, Fuzzer
from .target import Target
from .targets import all_targets, missing_for
from .workers import Outcome, execute

__all__ = ["run"]

KEPT = 3  # inputs of one fault
LARGEST = 900_000
"""Bytes of all inputs that are kept."""


def run(options: argparse.Namespace) -> int:
    """Run; 0 if there was no fault."""
    warnings.simplefilter("ignore")
    numpy.seterr(all="ignore")
    targets = [target for target in all_targets(options.match) if not missing_for(target)]
    if not targets:
        print(f"no target can be executed whose name contains {options.match!r}")
        return 2
    fuzzer = Fuzzer(targets, options.seed)
    if options.only is not None:
        return _once(fuzzer, options.only, options.keep)
    outcome = execute(fuzzer, options.first, options.executions, options.workers, options.within)
    _say(targets, outcome, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(_counts(targets, outcome), indent=1))
    if options.keep is not None:
        _keep(fuzzer, (fault for some in outcome.faults.values() for fault in some[:KEPT]), options.keep)
    return 1 if outcome.faults else 0


def _counts(targets: Iterable[Target], outcome: Outcome) -> dict[str, object]:
    ends = {
        target.name: {end: count for (name, end), count in sorted(outcome.counts.items()) if name == target.name}
        for target in targets
    }
    faults = [
        {
            "what": what,
            "times": len(some),
            "executions": [fault.number for fault in some[:KEPT]],
            "shown": some[0].shown,
        }
        for what, some in outcome.faults.items()
    ]
    return {"executions": outcome.done, "seconds": round(outcome.seconds), "targets": ends, "faults": faults}


def _say(targets: Iterable[Target], outcome: Outcome, seed: int) -> None:
    for target in targets:
        own = {end: count for (name, end), count in sorted(outcome.counts.items()) if name == target.name}
        print(f"{target.name:28} {sum(own.values()):9}  ", ", ".join(f"{count} {end}" for end, count in own.items()))
    for target in all_targets():
        if missing := missing_for(target):
            print(f"{target.name:28} not executed without {', '.join(missing)}")
    rate = outcome.done / max(outcome.seconds, 1e-9)
    print(f"\n{outcome.done} executions in {outcome.seconds:.0f} s, {rate:.0f} a second")
    print(f"{len(outcome.faults)} different faults")
    for what, some in outcome.faults.items():
        print(f"{len(some):6} {what}\n       {some[0].seed}, --only {some[0].number} --seed {seed}")


def _once(fuzzer: Fuzzer, number: int, keep: Path | None) -> int:
    """One execution in this process."""
    with fuzzer.working(keep):
        fault = fuzzer.run(number)
    _, target, seed, _ = fuzzer.damaged(number)
    print(target.name, seed.name)
    print(fault.shown if fault else f"no fault: {dict(fuzzer.outcomes)}")
    return 1 if fault else 0


def _keep(fuzzer: Fuzzer, faults: Iterable[Fault], folder: Path) -> None:
    """Inputs of faults, with what they did."""
    left = LARGEST
    for fault in faults:
        if not fault.target:
            continue
        _, _, seed, files = fuzzer.damaged(fault.number)
        left -= sum(map(len, files.values()))
        if left < 0:
            return
        for name, raw in files.items():
            path = folder / f"{fault.number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        facts = {
            "what": fault.what,
            "target": fault.target,
            "seed": seed.name,
            "alone": seed.alone,
            "first": next(iter(files)),
            "shown": fault.shown,
        }
        (folder / f"{fault.number}.json").write_text(json.dumps(facts, indent=1))
