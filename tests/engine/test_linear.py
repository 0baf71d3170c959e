# SPDX-License-Identifier: Apache-2.0
"""Commands take time in proportion to the tensors of a model: calls and lines are counted, which a slow machine does not change."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from benchmarks.shapes import Shape, describe, shards_of, write_adapter

SHAPE = Shape(8, 1, 2, 1, 16, 32)
LAYERS = (3, 12, 48)
"""27, 108 and 432 tensors; each is four times as many as the one before."""
SLACK = 1.25
"""A part that is quadratic and takes a tenth of the time at 108 tensors would add 1.9 of 4."""

MANY = 2000
"""Times that a line runs for the largest model before it is looked at."""
ROOT = str(Path(__file__).parents[2]) + "/"

COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda at, out: surgery.inspect(at / "base"),
    "report": lambda at, out: surgery.report(at / "lora", base=at / "base"),
    "merge, dry run": lambda at, out: surgery.merge(at / "base", at / "lora", dry_run=True),
    "merge": lambda at, out: surgery.merge(at / "base", at / "lora", output=out, workers=1),
    "unmerge": lambda at, out: surgery.unmerge(at / "merged", at / "lora", output=out),
    "verify": lambda at, out: surgery.verify(at / "merged"),
    "fingerprint": lambda at, out: surgery.fingerprint(at / "merged"),
    "diff": lambda at, out: surgery.diff(at / "base", at / "merged"),
    "diff of adapters": lambda at, out: surgery.diff(at / "lora", at / "wide"),
    "extract": lambda at, out: surgery.extract_lora(at / "base", at / "merged", output=out, rank=1),
    "layers": lambda at, out: surgery.layers(at / "base", drop="1", output=out),
    "export": lambda at, out: surgery.export_onnx(at / "base", output=out),
    "convert": lambda at, out: surgery.convert(at / "lora", to="mlx", output=out),
    "convert with a base": lambda at, out: surgery.convert(at / "lora", to="torchtune", base=at / "base", output=out),
    "convert to compact": lambda at, out: surgery.convert(at / "lora", to="compact", output=out),
    "combine": lambda at, out: surgery.combine([(at / "lora", 0.5), (at / "wide", 0.25)], output=out),
    "resize": lambda at, out: surgery.resize(at / "wide", rank=1, output=out),
    "resize to an energy": lambda at, out: surgery.resize(at / "wide", rank=surgery.Rank.energy(0.7), output=out),
    "check": lambda at, out: surgery.check(at / "base", at / "lora"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of each size a model in shards of nine tensors, two adapters for it, and the first merged."""
    found = []
    for layers in LAYERS:
        folder = tmp_path_factory.mktemp(f"layers{layers}")
        shape = replace(SHAPE, layers=layers)
        write_base(shape, folder / "base")
        write_adapter(shape, folder / "lora", rank=1)
        write_adapter(shape, folder / "wide", rank=2)
        surgery.merge(folder / "base", folder / "lora", output=folder / "merged")
        found.append(folder)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_four_times_the_tensors_take_four_times_the_calls(command: str, models: list[Path], tmp_path: Path) -> None:
    COMMANDS[command](models[0], tmp_path / "first")  # imports, and whatever is made once
    calls, lines = zip(
        *(counted(lambda at=at: COMMANDS[command](at, tmp_path / at.name)) for at in models), strict=True
    )
    assert calls[2] - calls[1] < 4 * SLACK * (calls[1] - calls[0]), calls
    assert not quadratic(lines)


def quadratic(lines: Sequence[Counter[str]]) -> dict[str, list[int]]:
    """Lines that run more often than in proportion, however little of the whole they are, with their counts."""
    counts = {line: [few[line] for few in lines] for line, many in lines[-1].items() if many > MANY}
    return {line: found for line, found in counts.items() if found[2] - found[1] > 8 * (found[1] - found[0])}


def write_base(shape: Shape, folder: Path) -> None:
    """Random values, a shard for each layer."""
    folder.mkdir()
    rng, weight_map = np.random.default_rng(0), {}
    for file, group in shards_of(shape.tensors(), shape.layers).items():
        values = {name: rng.normal(0, 0.02, size).astype(np.float32) for name, size in group}
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    describe(shape, folder, weight_map)


def test_a_comprehension_over_all_in_a_loop_over_all_is_seen() -> None:
    """It calls nothing; an adapter for MLX of 77,770 modules took more than six minutes so."""

    def work(size: int) -> list[int]:
        return [number for number in range(size) for other in range(size) if other is number]

    lines = [counted(lambda size=size: work(size))[1] for size in (10, 40, 160)]
    assert len(quadratic(lines)) == 1


def counted(job: Callable[[], Any]) -> tuple[int, Counter[str]]:
    """Calls of functions, of Python and of C, and resumptions of generators, in all threads; and how often each line ran.

    A loop in one line, a comprehension too, counts once for each round.
    """
    calls, lines = 0, Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            lines[f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"] += 1
        return trace

    before = [(room, room.gettrace(), room.getprofile()) for room in (sys, threading)]  # coverage's, where it counts
    for room in (threading, sys):
        room.setprofile(count)
        room.settrace(trace)
    try:
        job()
    finally:
        for room, traced, profiled in before:
            room.settrace(traced)
            room.setprofile(profiled)
    return calls, lines
