# SPDX-License-Identifier: Apache-2.0
"""Commands take time in proportion to the tensors of a model: calls are counted, which a slow machine does not change."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
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
    calls = [counted(lambda at=at: COMMANDS[command](at, tmp_path / at.name)) for at in models]
    assert calls[2] - calls[1] < 4 * SLACK * (calls[1] - calls[0]), calls


def write_base(shape: Shape, folder: Path) -> None:
    """Random values, a shard for each layer."""
    folder.mkdir()
    rng, weight_map = np.random.default_rng(0), {}
    for file, group in shards_of(shape.tensors(), shape.layers).items():
        values = {name: rng.normal(0, 0.02, size).astype(np.float32) for name, size in group}
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    describe(shape, folder, weight_map)


def counted(job: Callable[[], Any]) -> int:
    """Calls of functions, of Python and of C, and resumptions of generators, in all threads."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        job()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls
