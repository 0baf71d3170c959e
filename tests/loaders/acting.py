# SPDX-License-Identifier: Apache-2.0
"""What we write, run by the program it is written for, beside the dense weights ``W + dW`` in that same program.

Adapters and the dense weights are made by peers, or with torch alone where a release's names are trained; what is called `via` a
format was converted by us before. Of the dense weights, ours are only the names and heights of a release's tensors, which diffusers'
conversion has to read to the last row. `surgery.convert` writes an adapter in the
program's format, `surgery.merge` merges what was written into the base as the program has it. The program runs four things: the
base, the dense weights, the base with what was written, the merged base. Errors are greatest differences from the output of the
dense weights, as shares of the greatest difference that the dense weights make to the output of the base.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.loaders.judging import command_of

__all__ = ["Acted", "Trial", "program_of", "python_of", "run", "start"]


@dataclass(frozen=True)
class Trial:
    """Files of one act, as the program loads them.

    Attributes:
        base: The base.
        dense: The base with the dense weights.
        written: What was written, to be loaded into `base`.
        merged: What the merge of it wrote; None where the program has no such base.
    """

    base: Path
    dense: Path
    written: Path
    merged: Path | None


@dataclass(frozen=True)
class Acted:
    """What came of one act: errors of the adapter and of the merged base."""

    written: float
    merged: float | None


def program_of(consumer: str) -> list[str]:
    """The command that runs its script; an environment has to be named."""
    command = command_of(consumer)
    if command is None:
        raise ValueError(f"no environment for {consumer}")
    return command


def python_of(consumer: str) -> list[str]:
    """The command that stands for ``python`` in its environment."""
    return program_of(consumer)[:-1]


def start(command: Sequence[str]) -> None:
    """Run a script in its own environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # it would put this project's libraries before the program's
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} does not run: {ran.stderr[-3000:]}")


def run(consumer: str, trials: Mapping[str, Trial], folder: Path) -> tuple[dict[str, Acted], dict[str, str]]:
    """What the program computes of every trial, and its versions.

    Raises:
        RuntimeError: the program refuses something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[tuple[Path, str], Path] = {}
    for one in trials.values():
        for base, adapter in ((one.base, "-"), (one.base, str(one.written)), (one.dense, "-"), (one.merged, "-")):
            if base is not None:
                jobs.setdefault((base, adapter), folder / str(len(jobs)))
    ordered = sorted(jobs.items(), key=lambda job: str(job[0][0]))
    start([*program_of(consumer), *(str(part) for (base, adapter), out in ordered for part in (base, adapter, out))])
    versions: dict[str, str] = {}

    def output(base: Path, adapter: str = "-") -> dict[str, np.ndarray]:
        out = jobs[base, adapter]
        said = json.loads(out.with_suffix(".json").read_text())
        if "refused" in said:
            raise RuntimeError(f"{consumer} refuses {adapter}: {said['refused']}")
        versions.update(said["versions"])
        return {name: value.astype(np.float64) for name, value in np.load(out.with_suffix(".npz")).items()}

    acted = {}
    for name, one in trials.items():
        dense, before = output(one.dense), output(one.base)
        if _distance(dense, before) < 0.02 * max(np.abs(value).max() for value in before.values()):
            raise AssertionError(f"{consumer}, {name}: the dense weights change next to nothing")
        change = _distance(dense, before)
        written = _distance(output(one.base, str(one.written)), dense) / change
        acted[name] = Acted(written, None if one.merged is None else _distance(output(one.merged), dense) / change)
    return acted, versions


def _distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The greatest difference of all outputs; no number if one of them is none."""
    assert one.keys() == other.keys()
    return float(np.max([np.abs(value - other[name]).max() for name, value in one.items()]))
