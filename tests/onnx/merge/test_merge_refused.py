# SPDX-License-Identifier: Apache-2.0
"""A merge into a graph is refused where it could change another weight, or not all that it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from safetensors.numpy import save_file

import surgery
from surgery_formats.errors import FitError, NothingChangedError, UsageError
from tests.support.graphs_by_value import base_of, graph_of, initializer, random_weights
from tests.support.merged_graphs import PLACES, SHAPES, WEIGHTS, lora, values_in


@pytest.mark.parametrize("layout", [lambda w: w, lambda w: w.T, lambda w: np.concatenate([w, WEIGHTS[PLACES["k"]]])])
def test_a_merged_graph_is_refused(tmp_path: Path, base: Path, layout: Any) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", layout(WEIGHTS[PLACES["q"]]))])
    adapter = lora(tmp_path / "adapter", "q")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "once")
    with pytest.raises(FitError, match="merged already"):
        surgery.merge(tmp_path / "once", adapter, graph_of=base, output=tmp_path / "twice")
    with pytest.raises(FitError, match=r"there with other values, up to \d"):
        surgery.merge(tmp_path / "once", lora(tmp_path / "b", "q", seed=4), graph_of=base, output=tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("layout", [lambda w: w, lambda w: w.T, lambda w: np.concatenate([WEIGHTS[PLACES["v"]], w]).T])
def test_one_wrong_element_that_no_sample_has_is_refused(
    tmp_path: Path, base: Path, layout: Any, dry_run: bool
) -> None:
    wrong = WEIGHTS[PLACES["q"]].copy()
    wrong[17, 13] += 1e-6
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", layout(wrong))])
    with pytest.raises(FitError, match="q_proj"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", random_weights(SHAPES, 7)[PLACES["q"]])])
    with pytest.raises(FitError, match=r"1 weights that an adapter changes are not in the graph: .*q_proj"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


def test_a_part_of_a_weight_is_not_enough(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]][:24])])
    with pytest.raises(FitError, match=r"q_proj.*found of them: .*75%"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


def test_weights_that_share_a_tensor_are_refused(tmp_path: Path) -> None:
    equal = {**WEIGHTS, "model.layers.1.self_attn.q_proj.weight": WEIGHTS[PLACES["q"]]}
    base = base_of(tmp_path / "base", equal)
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]])])
    with pytest.raises(FitError, match="weights of equal values"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


def test_what_the_order_alone_tells_is_not_changed(tmp_path: Path) -> None:
    zeros = {f"model.layers.{n}.self_attn.q_proj.bias": np.zeros(32, "f4") for n in range(2)}
    base = base_of(tmp_path / "base", {**WEIGHTS, **zeros})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    trained = {
        f"{q}.lora_A.weight": np.ones((1, 24)),
        f"{q}.lora_B.weight": np.ones((32, 1)),
        f"{q}.base_layer.bias": np.ones(32),
    }
    save_file({name: value.astype("f4") for name, value in trained.items()}, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "bias": "lora_only",
        "layers_to_transform": [0],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    names = [name for name in WEIGHTS if "q_proj" in name]
    tensors = [initializer(f"val_{n}", WEIGHTS[name].T) for n, name in enumerate(names)]
    tensors += [initializer(f"b_{n}", np.zeros(32, "f4")) for n in range(2)]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors)
    with pytest.raises(FitError, match="by the order of the graph alone"):
        surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    nodes = []
    for n in (1, 0):
        nodes.append(helper.make_node("MatMul", ["x", f"val_{n}"], [f"m{n}"]))
        nodes.append(helper.make_node("Add", [f"m{n}", f"b_{1 - n}"], [f"y{n}"]))
    path = graph_of(tmp_path / "in" / "h.onnx", tensors, nodes)
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    found = values_in(tmp_path / "out" / "h.onnx")
    assert (found["b_1"].tolist(), found["b_0"].tolist()) == ([1] * 32, [0] * 32)


def test_an_update_that_changes_nothing_is_refused(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]])])
    with pytest.raises(NothingChangedError):
        surgery.merge(path, lora(tmp_path / "a", "q", size=0), graph_of=base, output=tmp_path / "out")


def test_what_a_graph_has_no_place_for_is_refused(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]])])
    with pytest.raises(UsageError, match="needs the checkpoint"):
        surgery.merge(path, lora(tmp_path / "b", "q"), output=tmp_path / "out")
    with pytest.raises(UsageError, match="keeps its types"):
        surgery.merge(path, lora(tmp_path / "a", "q"), graph_of=base, output=tmp_path / "out", dtype="fp16")
