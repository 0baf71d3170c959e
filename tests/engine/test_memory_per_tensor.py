# SPDX-License-Identifier: Apache-2.0
"""What a command knows of a tensor is small: bytes of Python objects at their peak, counted, which a busy machine does not change.

Memory for the values of weights is bounded by itself (`benchmarks/memory.py` has whole processes at sizes of the field).
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import surgery
from benchmarks.shapes import write_adapter
from tests.engine.test_linear import COMMANDS, SHAPE, write_base

FEW, MANY = 4, 16
"""Layers; each has nine tensors, in a file of its own."""

KB = {
    "inspect": 2.0, "report": 3.2, "merge, dry run": 3.9, "merge": 6.5, "unmerge": 6.3, "verify": 3.0, "fingerprint": 2.7,
    "diff": 2.9, "diff of adapters": 3.8, "extract": 12.7, "layers": 5.2, "export": 4.1, "convert": 6.6,
    "convert with a base": 8.9, "convert to compact": 10.0, "combine": 8.5, "resize": 7.5, "resize to an energy": 7.2,
    "check": 3.8,
}  # fmt: skip
"""What a tensor more takes, as measured with Python 3.11."""
SLACK = 1.4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of each size a model in shards of nine tensors, two adapters for it, and the first merged."""
    found = []
    for layers in (FEW, MANY):
        folder = tmp_path_factory.mktemp(f"layers{layers}")
        shape = replace(SHAPE, layers=layers)
        write_base(shape, folder / "base")
        write_adapter(shape, folder / "lora", rank=1)
        write_adapter(shape, folder / "wide", rank=2)
        surgery.merge(folder / "base", folder / "lora", output=folder / "merged")
        found.append(folder)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tensor_more_takes_few_bytes(command: str, models: list[Path], tmp_path: Path) -> None:
    COMMANDS[command](models[0], tmp_path / "first")  # imports, and whatever is made once
    few, many = (peak(lambda at=at: COMMANDS[command](at, tmp_path / at.name)) for at in models)
    each = (many - few) / (9 * (MANY - FEW))
    assert 0 < each < SLACK * 1000 * KB[command]


def peak(job: Callable[[], Any]) -> int:
    """Most bytes of objects at a time, of all threads."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        job()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
