# SPDX-License-Identifier: Apache-2.0
"""One target, guided by the code that inputs reach (atheris, which is optional: ``pip install atheris``).

Inputs are the first file of a seed; the others stay as they are. Half of the mutations are libFuzzer's own, half ours.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from tempfile import mkdtemp

__all__ = ["run_guided"]

LONGEST = 1 << 16


def run_guided(name: str, executions: int, seed: int) -> int:
    """Run until a fault or so many executions; libFuzzer ends the process, and leaves the input of a fault in the working folder."""
    try:
        import atheris
    except ImportError:
        print("the package atheris is not installed", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["surgery", "surgery_formats"], enable_loader_override=False):
        from .fuzzer import Fuzzer
        from .mutations import mutated
        from .targets import all_targets
    found = [target for target in all_targets(name) if target.name == name]
    if not found:
        print(f"no target is called {name}", file=sys.stderr)
        return 2
    (target,) = found
    fuzzer = Fuzzer(found, seed)
    seeds = list(target.seeds())
    corpus = Path(mkdtemp(prefix="surgery-fuzz-corpus-"))
    for number, one in enumerate(seeds):
        (corpus / str(number)).write_bytes(next(iter(one.files.values()))[:LONGEST])
    count = 0

    def test(data: bytes) -> None:
        nonlocal count
        count += 1
        draw = random.Random(data[:64])
        one = draw.choice(seeds)
        first, *_ = one.files
        fault = fuzzer.execute(count, target, one, {**one.files, first: data}, draw)
        if fault is not None:
            raise AssertionError(fault.shown)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        draw = random.Random(number)
        if draw.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return mutated(draw, {"input": data}, fuzzer.words)["input"][:most]

    with fuzzer.working():
        options = [f"-runs={executions}", f"-seed={seed + 1}", f"-max_len={LONGEST}", "-rss_limit_mb=4096", str(corpus)]
        atheris.Setup([sys.argv[0], *options], test, custom_mutator=mutate)
        atheris.Fuzz()
    return 0
