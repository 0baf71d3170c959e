# SPDX-License-Identifier: Apache-2.0
"""What a command keeps of a tensor is small: bytes of objects are counted, which neither threads nor a busy machine change.

Memory for values is bounded by itself, and not counted here: `benchmarks/memory.py` has whole processes at sizes of the field.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from benchmarks.shapes import write_adapter
from surgery_formats.files.output.folder import OutputFolder
from tests.engine.test_linear import COMMANDS, SHAPE, write_base

FEW, MANY = 4, 16
"""Layers; each has nine tensors, in a file of its own."""

KB = {
    "merge": 4.2, "unmerge": 3.9, "layers": 2.7, "export": 2.0, "convert": 3.0, "convert with a base": 5.2, "combine": 6.5,
    "resize": 5.5,
}  # fmt: skip
"""What commands that write keep of a tensor more, as measured with Python 3.11, to 1 % each time."""
SLACK = 1.25


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


@pytest.mark.parametrize("command", KB)
def test_a_tensor_more_takes_few_bytes(
    command: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    COMMANDS[command](models[0], tmp_path / "first")  # imports, and whatever is made once
    few, many = (held(lambda at=at: COMMANDS[command](at, tmp_path / at.name), monkeypatch) for at in models)
    each = (many - few) / (9 * (MANY - FEW))
    assert 0 < each < SLACK * 1000 * KB[command]


def held(job: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of objects that are no arrays, when all files are written and the manifest is not."""
    seen: list[int] = []

    def commit(folder: OutputFolder, manifest: Any) -> Path:
        seen.append(objects())
        return whole(folder, manifest)

    whole = OutputFolder.commit
    gc.collect()
    tracemalloc.start()
    try:
        before = objects()
        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "commit", commit)
            job()
        return seen[0] - before
    finally:
        tracemalloc.stop()


def objects() -> int:
    """Bytes that Python has for them."""
    gc.collect()
    arrays = tracemalloc.DomainFilter(inclusive=False, domain=np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
