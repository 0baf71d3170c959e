# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.fuzz``: run, and print how often each target was executed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy

from . import __doc__ as about
from .fuzzer import Fault, Fuzzer
from .target import Target
from .targets import all_targets, missing_for
from .workers import Outcome, execute

KEPT = 3  # inputs of one fault
LARGEST = 900_000
"""Bytes of all inputs that are kept."""


def main() -> int:
    """Run; 0 if there was no fault."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no more are begun")
    parser.add_argument("--match", default="", help="only targets whose name contains this")
    parser.add_argument("--only", type=int, help="run one execution here, and show its traceback")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of faults")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris, of the one target that matches")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    numpy.seterr(all="ignore")
    targets = [target for target in all_targets(options.match) if not missing_for(target)]
    if not targets:
        parser.error(f"no target can be executed whose name contains {options.match!r}")
    if options.guided:
        from .guided import run_guided

        return run_guided(targets, options.executions, options.seed)
    fuzzer = Fuzzer(targets, options.seed)
    if options.only is not None:
        return _once(fuzzer, options.only, options.keep)
    _prepare(targets)
    outcome = execute(fuzzer, options.first, options.executions, options.workers, options.within)
    _say(targets, outcome, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(_counts(targets, outcome), indent=1))
    if options.keep is not None:
        _keep(fuzzer, (fault for some in outcome.faults.values() for fault in some[:KEPT]), options.keep)
    return 1 if outcome.faults else 0


def _prepare(targets: Iterable[Target]) -> None:
    """Import here what workers would import each for itself."""
    for name in dict.fromkeys(name for target in targets for name in target.needs):
        __import__(name)


def _counts(targets: Iterable[Target], outcome: Outcome) -> dict[str, object]:
    ends = {
        target.name: {end: count for (name, end), count in sorted(outcome.counts.items()) if name == target.name}
        for target in targets
    }
    faults = [
        {"what": what, "times": len(some), "executions": [fault.number for fault in some[:KEPT]], "shown": some[0].shown}
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
        facts = {"what": fault.what, "target": fault.target, "seed": seed.name, "alone": seed.alone, "shown": fault.shown}
        (folder / f"{fault.number}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
