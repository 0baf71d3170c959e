# SPDX-License-Identifier: Apache-2.0
"""Graphs whose weights lie in folders of their own: one down they go along, deeper ones are refused with the cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import surgery
from surgery_formats.errors import FitError
from tests.support.graph_pairs import PAIRS

PAIR = PAIRS["script-bert"]
ADAPTER = PAIR.adapter("lora")


def merged(graph: Path, output: Path | None) -> object:
    return surgery.merge(graph, ADAPTER, graph_of=PAIR.base, output=output, dry_run=output is None)


def inserted(graph: Path, output: Path | None) -> object:
    return surgery.insert(graph, ADAPTER, base=PAIR.base, output=output, dry_run=output is None)


def saved(folder: Path, place: str) -> Path:
    """The golden graph with its weights in `place`."""
    path = folder / "model.onnx"
    (path.parent / place).parent.mkdir(parents=True)
    options = {"save_as_external_data": True, "location": place, "size_threshold": 0}
    onnx.save(onnx.load(PAIR.graph), path, **options)
    return path


@pytest.mark.parametrize("write", [merged, inserted])
@pytest.mark.parametrize("dry", [False, True])
def test_weights_two_folders_down_are_refused_with_the_cure(write: Callable[..., object], dry: bool, tmp_path: Path):
    graph = saved(tmp_path / "deep", "weights/fp32/w.bin")
    with pytest.raises(FitError, match=r"model\.onnx: its weights lie in 'weights/fp32/w\.bin'") as caught:
        write(graph, None if dry else tmp_path / "out")
    assert "save_as_external_data" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [merged, inserted])
def test_weights_one_folder_down_go_along(write: Callable[..., object], tmp_path: Path):
    write(saved(tmp_path / "in", "weights/w.bin"), tmp_path / "out")
    assert (tmp_path / "out" / "weights" / "w.bin").is_file()
    adapters = ADAPTER if write is merged else ()
    assert surgery.verify(tmp_path / "out", against=PAIR.base, adapters=adapters).checks
