# SPDX-License-Identifier: Apache-2.0
"""Slots in graphs that others made: without an adapter the graph before to the bit, with one as if it were merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats import FitError, NotFoundError
from tests.support.kit import ROOT, make_base, make_lora
from tests.support.small_graphs import FORMS, answer, weights_in, write_graph

Q_AND_V = ("self_attn.q_proj", "self_attn.v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    return make_base(tmp_path_factory.mktemp("base") / "base", torch.float32)


def of_first_layer(folder: Path, strength: float, targets: tuple[str, ...]) -> Path:
    """A LoRA of the first layer alone: the small graphs have no other."""
    from safetensors.torch import load_file, save_file

    make_lora(folder, strength, targets)
    kept = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if ".layers.0." in k}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def x_of(graph: Path) -> dict[str, np.ndarray]:
    shape = [dim.dim_value for dim in onnx.load(graph).graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(5).normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("required", [False, True])
def test_a_slot_adds_what_a_merge_would(form: str, required: bool, base: Path, tmp_path: Path):
    targets = Q_AND_V if form.startswith("packed") else Q_AND_V[:1]
    adapter = of_first_layer(tmp_path / "style", 0.1, targets)
    graph = write_graph(tmp_path / "graph" / "model.onnx", form, weights_in(base))
    surgery.merge(base, adapter, output=tmp_path / "merged")
    merged = write_graph(tmp_path / "as_merged" / "model.onnx", form, weights_in(tmp_path / "merged"))

    result = surgery.insert(graph, adapter, base=base, output=tmp_path / "out", required=required)

    out, file = tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "style.onnx_adapter"
    feed, factors = x_of(graph), read_adapter_file(file)
    assert {slot.A for slot in result.slots} | {slot.B for slot in result.slots} == set(factors)
    empty = {
        name: np.zeros([0 if size == 4 else size for size in one.shape], one.dtype) for name, one in factors.items()
    }
    without = answer(out, {**feed, **empty} if required else feed)
    assert without.tobytes() == answer(graph, feed).tobytes()
    filled = answer(out, {**feed, **factors}) if required else answer(out, feed, file)
    expected = answer(merged, feed)
    within = 1e-3 if form == "half" else 2e-5  # the merged weight is rounded to halves, too
    assert np.abs(filled - expected).max() <= within * np.abs(expected).max()
    assert np.abs(filled - without).max() > 1e-2 * np.abs(expected).max()

    surgery.fold(out, file, output=tmp_path / "folded")
    assert np.abs(answer(tmp_path / "folded" / "model.onnx", feed) - expected).max() <= within * np.abs(expected).max()
    left = onnx.load(tmp_path / "folded" / "model.onnx").graph
    assert [one.name for one in left.input] == ["x"]
    assert not [one.name for one in left.initializer if "lora" in one.name]


@pytest.mark.parametrize("gated", [False, True])
def test_a_graph_of_an_old_ir_takes_adapters(gated: bool, base: Path, tmp_path: Path):
    """In IR 3 all weights are inputs, and no input with a default can be given."""
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    model = onnx.load(graph)
    model.ir_version = 3
    for one in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
    onnx.save(model, graph)
    surgery.insert(graph, adapter, base=base, output=tmp_path / "out", gated=gated)
    out, feed = tmp_path / "out" / "model.onnx", x_of(graph)
    before = answer(graph, feed)
    off = answer(out, {**feed, "strength.style": np.zeros(1, np.float32)}) if gated else answer(out, feed)
    file = None if gated else tmp_path / "out" / "adapters" / "style.onnx_adapter"
    assert off.tobytes() == before.tobytes()
    assert np.abs(answer(out, feed, file) - before).max() > 1e-2 * np.abs(before).max()


def test_several_adapters_share_the_slots_of_all(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "packed", weights_in(base))
    first = of_first_layer(tmp_path / "first", 0.1, Q_AND_V)
    second = of_first_layer(tmp_path / "second", 0.2, Q_AND_V[1:])
    result = surgery.insert(graph, [first, second], base=base, output=tmp_path / "out")
    assert [one["name"] for one in result.adapters] == ["first", "second"]
    alone = tmp_path / "alone"
    surgery.merge(base, second, output=alone)
    merged = write_graph(tmp_path / "as_merged" / "model.onnx", "packed", weights_in(alone))
    feed = x_of(graph)
    got = answer(tmp_path / "out" / "model.onnx", feed, tmp_path / "out" / "adapters" / "second.onnx_adapter")
    assert np.allclose(got, answer(merged, feed), atol=1e-4)


def test_a_graph_of_another_base_is_refused(base: Path, tmp_path: Path):
    other = {name: values + np.float32(1e-3) for name, values in weights_in(base).items()}
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", other)
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    with pytest.raises(FitError, match=r"does not hold the weight 'model.layers.0.self_attn.q_proj.weight'"):
        surgery.insert(graph, adapter, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_where_no_slot_can_be_is_refused_by_its_node(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    model = onnx.load(graph)
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["w"], ["total"], name="sum"))
    onnx.save(model, graph)
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    with pytest.raises(FitError, match=r"'w' is read by the ReduceSum 'sum'"):
        surgery.insert(graph, adapter, base=base, output=tmp_path / "out")


def test_slots_are_not_made_twice(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    surgery.insert(graph, adapter, base=base, output=tmp_path / "out")
    with pytest.raises(FitError, match="has a slot for this already"):
        surgery.insert(tmp_path / "out" / "model.onnx", adapter, base=base, output=tmp_path / "again")


def test_a_folder_with_a_graph_is_the_graph(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    assert surgery.insert(graph.parent, adapter, base=base, output=tmp_path / "out").graph == graph


@pytest.mark.parametrize("gated", [False, True])
def test_an_output_may_lie_beside_the_graph(gated: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph = write_graph(tmp_path / "model.onnx", "matmul", weights_in(base))
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    monkeypatch.chdir(tmp_path)
    surgery.insert(graph.name, adapter.name, base=base, gated=gated, output="out")
    assert Path("out/model.onnx").is_file()
    with pytest.raises(FitError, match="lies in the input style"):
        surgery.insert(graph.name, adapter.name, base=base, gated=gated, output="style/out")


def test_a_graph_needs_its_base(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    with pytest.raises(surgery.UsageError, match="found by those of its base"):
        surgery.insert(graph, of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1]), output=tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_inside_is_off_at_0_and_as_strong_as_asked(form: str, base: Path, tmp_path: Path):
    targets = Q_AND_V if form.startswith("packed") else Q_AND_V[:1]
    first, second = (
        of_first_layer(tmp_path / "first", 0.1, targets),
        of_first_layer(tmp_path / "second", 0.3, targets[:1]),
    )
    graph = write_graph(tmp_path / "graph" / "model.onnx", form, weights_in(base))
    result = surgery.insert(graph, {first: 0.5, second: 0}, base=base, output=tmp_path / "out", gated=True)
    assert [(one["name"], one["strength"], one["weight"]) for one in result.adapters] == [
        ("first", "strength.first", 0.5),
        ("second", "strength.second", 0.0),
    ]
    out, feed = tmp_path / "out" / "model.onnx", x_of(graph)

    def at(one: float, two: float) -> np.ndarray:
        gates = {"strength.first": np.float32([one]), "strength.second": np.float32([two])}
        return answer(out, {**feed, **gates})

    def merged(one: float, two: float) -> np.ndarray:
        weights = {first: one, second: two}
        name = f"{one}-{two}"
        surgery.merge(base, {adapter: weight for adapter, weight in weights.items() if weight}, output=tmp_path / name)
        return answer(write_graph(tmp_path / f"as-{name}" / "model.onnx", form, weights_in(tmp_path / name)), feed)

    assert at(0, 0).tobytes() == answer(graph, feed).tobytes()
    within = 1e-3 if form == "half" else 2e-5
    for strengths in ((1, 0), (0.25, 0), (-0.5, 2)):
        expected = merged(*strengths)
        assert np.abs(at(*strengths) - expected).max() <= within * np.abs(expected).max()
    expected = merged(0.5, 0)
    assert np.abs(answer(out, feed) - expected).max() <= within * np.abs(expected).max()

    surgery.fold(out, [("first", 0.5), ("second", 0.0)], output=tmp_path / "folded")
    folded = tmp_path / "folded" / "model.onnx"
    assert np.abs(answer(folded, feed) - expected).max() <= within * np.abs(expected).max()
    assert [one.name for one in onnx.load(folded).graph.input] == ["x"]


def test_strengths_can_be_inputs_that_every_runtime_passes(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    surgery.insert(graph, adapter, base=base, output=tmp_path / "out", gated=True, required=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("x", [2, 5, 32]), ("strength.style", [1])]


def test_a_weight_is_a_strength_and_no_slot_has_one(base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    with pytest.raises(FitError, match="slots take an adapter as it is"):
        surgery.insert(graph, {adapter: 0.5}, base=base, output=tmp_path / "out")


@pytest.mark.parametrize("gated", [False, True])
def test_an_adapter_that_is_no_file_is_told_by_what_may_be_meant(gated: bool, base: Path, tmp_path: Path):
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    graph = write_graph(tmp_path / "graph" / "model.onnx", next(iter(FORMS)), weights_in(base))
    surgery.insert(graph, adapter, base=base, output=tmp_path / "out", gated=gated)
    with pytest.raises(NotFoundError) as caught:
        surgery.fold(tmp_path / "out", [("styles" if gated else "style", 0.5)], output=tmp_path / "folded")
    assert ("did you mean 'style'?" if gated else "adapters/style.onnx_adapter'?") in str(caught.value.hint)
    with pytest.raises(NotFoundError) as caught:
        surgery.fold(tmp_path / "out", "q", output=tmp_path / "folded")
    assert ("adapters of the graph: style" if gated else "there are ") in str(caught.value.hint)
    with pytest.raises(FitError, match=r"a folder, not an \.onnx_adapter file"):
        surgery.fold(tmp_path / "out", adapter, output=tmp_path / "folded")


@pytest.mark.parametrize("verb", ["insert", "merge"])
def test_of_the_files_beside_a_graph_those_go_along_that_run_it(verb: str, base: Path, tmp_path: Path):
    graph = write_graph(tmp_path / "graph" / "model.onnx", "matmul", weights_in(base))
    for name in (
        "tokenizer.json",
        "genai_config.json",
        "LICENSE.txt",
        "notes.txt",
        "secrets.py",
        "page.html",
        "keys.json",
    ):
        (graph.parent / name).write_text("{}")
    adapter = of_first_layer(tmp_path / "style", 0.1, Q_AND_V[:1])
    if verb == "insert":
        surgery.insert(graph, adapter, base=base, output=tmp_path / "out")
    else:
        surgery.merge(graph, adapter, graph_of=base, output=tmp_path / "out")
    theirs = {"tokenizer.json", "genai_config.json", "LICENSE.txt"}
    ours = {"model.onnx", "README.md", "surgery_manifest.json"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == theirs | ours


def test_a_graph_of_the_base_is_no_graph_of_what_was_named(tmp_path: Path):
    surgery.export_onnx(ROOT / "examples" / "base", output=tmp_path / "out")
    found = surgery.locate(
        tmp_path / "out" / "model.onnx", ROOT / "examples" / "base", adapters=ROOT / "examples" / "lora"
    )
    assert any("or without the adapters that were named" in warning for warning in found.warnings)
