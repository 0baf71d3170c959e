# SPDX-License-Identifier: Apache-2.0
"""Slots in onnxruntime-node, which passes required inputs alone.

``SURGERY_ONNXRUNTIME_NODE`` names a folder in which ``npm install onnxruntime-node`` was run.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from tests.onnx.test_inserted_slots import Q_AND_V, of_first_layer, x_of
from tests.support.kit import make_base
from tests.support.small_graphs import answer, weights_in, write_graph

pytestmark = pytest.mark.nightly
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "in_node.cjs"


def in_node(graph: Path, feeds: dict[str, Any], folder: Path) -> tuple[list[str], Any]:
    packed = {name: {"dims": list(one.shape), "data": one.reshape(-1).tolist()} for name, one in feeds.items()}
    (folder / "feeds.json").write_text(json.dumps(packed))
    words = ["node", str(SCRIPT), str(graph), str(folder / "feeds.json")]
    done = subprocess.run(words, cwd=os.environ["SURGERY_ONNXRUNTIME_NODE"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    return said["inputs"], np.float32(said["output"])


def test_optional_slots_are_passed_over_and_required_ones_taken(tmp_path: Path):
    base = make_base(tmp_path / "base", torch.float32)
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    feed = x_of(graph)
    for name, options in (("optional", {}), ("required", {"required": True})):
        surgery.insert(graph, adapter, base=base, output=tmp_path / name, **options)
    factors = read_adapter_file(tmp_path / "optional" / "adapters" / "style.onnx_adapter")
    plain = answer(graph, feed).reshape(-1)
    active = answer(tmp_path / "required" / "model.onnx", {**feed, **factors}).reshape(-1)

    names, ignored = in_node(tmp_path / "optional" / "model.onnx", {**feed, **factors}, tmp_path)
    assert names == ["x"]
    assert np.allclose(ignored, plain, atol=1e-4)  # the factors were given and not taken
    names, taken = in_node(tmp_path / "required" / "model.onnx", {**feed, **factors}, tmp_path)
    assert set(names) == {"x", *factors}
    assert np.allclose(taken, active, atol=1e-4)
    empty = {
        name: np.zeros([0 if size == 4 else size for size in one.shape], np.float32) for name, one in factors.items()
    }
    assert np.allclose(in_node(tmp_path / "required" / "model.onnx", {**feed, **empty}, tmp_path)[1], plain, atol=1e-4)


def test_a_strength_is_taken_if_it_is_required(tmp_path: Path):
    base = make_base(tmp_path / "base", torch.float32)
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    feed, out = x_of(graph), tmp_path / "out" / "model.onnx"
    surgery.insert(graph, adapter, base=base, output=tmp_path / "out", gated=True, required=True)
    for strength in (0.0, 0.5):
        gates = {"strength.style": np.float32([strength])}
        assert np.allclose(
            in_node(out, {**feed, **gates}, tmp_path)[1], answer(out, {**feed, **gates}).reshape(-1), atol=1e-4
        )
