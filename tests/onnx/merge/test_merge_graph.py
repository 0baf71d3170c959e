# SPDX-License-Identifier: Apache-2.0
"""A merge into a graph changes the bytes of located weights, to what a merge of the checkpoint makes, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

import surgery
from surgery.onnx.locate.search import located_weights
from surgery.onnx.locate.wanted import wanted_weights
from surgery.onnx.merge.changes import changes_of, touched_labels
from surgery.onnx.merge.graph_plan import plan_graph
from surgery_formats.binding.bind import bind
from surgery_formats.containers.onnx import open_graph
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import FileRecord
from tests.support.graphs_by_value import base_of, graph_of, initializer, nbits
from tests.support.merged_graphs import PLACES, WEIGHTS, lora, merged_weights, values_in
from tests.support.peft_kinds import Combination, made, sample

LAYOUTS: Mapping[str, Any] = {
    "as it is": lambda w: {"q": w["q"], "k": w["k"]},
    "turned": lambda w: {"q": w["q"].T, "k": w["k"].T},
    "half": lambda w: {"q": w["q"].T.astype("f2"), "k": w["k"].astype("f2")},
    "bfloat16": lambda w: {"q": w["q"].T.astype(ml_dtypes.bfloat16), "k": w["k"].astype(ml_dtypes.bfloat16)},
    "packed": lambda w: {"qkv": np.concatenate([w["q"], w["k"], w["v"]])},
    "packed turned": lambda w: {"qkv": np.concatenate([w["q"], w["k"], w["v"]]).T},
    "sliced": lambda w: {"a": w["q"][:5], "b": w["q"][5:].T, "k": w["k"]},
    "columns": lambda w: {"a": w["q"][:, :10], "b": w["q"][:, 10:].T, "k": w["k"]},
    "reordered": lambda w: {"q": w["q"][np.random.default_rng(3).permutation(32)], "k": w["k"].T[:, ::-1]},
    "twice": lambda w: {"q": w["q"], "again": w["q"].T, "k": w["k"]},
    "heads": lambda w: {"q": w["q"].reshape(4, 8, 24), "k": w["k"].T.reshape(24, 2, 8)},
    "stacks": lambda w: {"kv": np.stack([w["k"].T, w["v"].T]), "q": w["q"]},
}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_the_values_of_the_merged_checkpoint(
    tmp_path: Path, base: Path, layout: str, external: bool
) -> None:
    lay = LAYOUTS[layout]
    before = lay({short: WEIGHTS[name] for short, name in PLACES.items()})
    tensors = [initializer("first", np.arange(9.0)), *(initializer(f"val_{n}", value) for n, value in before.items())]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, external=external)
    adapter = lora(tmp_path / "adapter", "q", "k")
    result = surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out", verify_copies=True)
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")
    after = lay({short: merged[name] for short, name in PLACES.items()})
    found = values_in(tmp_path / "out" / "g.onnx")
    assert not any(np.array_equal(before[name], found[f"val_{name}"]) for name in before)
    for name, value in after.items():
        assert found[f"val_{name}"].tobytes() == np.ascontiguousarray(value).tobytes(), name
    assert result.ledger.survival == pytest.approx(1, abs=0.05)
    same_but_for(path, tmp_path / "out" / "g.onnx", {f"val_{name}" for name in after})


def same_but_for(before: Path, after: Path, changed: set[str]) -> None:
    """Every byte that is no changed tensor's is the same, in all files."""
    one, other = open_graph(before), open_graph(after)
    assert list(one.tensors) == list(other.tensors)
    for old, new in zip(one.files, other.files, strict=True):
        a, b = (np.frombuffer(file.path.read_bytes(), np.uint8).copy() for file in (old, new))
        assert a.size == b.size
        for name in changed & one.tensors.keys():
            tensor = one.tensors[name]
            if tensor.file is old:
                a[tensor.offset : tensor.offset + tensor.nbytes] = b[tensor.offset : tensor.offset + tensor.nbytes] = 0
        assert np.array_equal(a, b)


@pytest.mark.parametrize("external", [False, True])
def test_bytes_between_tensors_are_no_tensor_and_no_parameters(tmp_path: Path, base: Path, external: bool) -> None:
    tensors = [initializer(f"val_{short}", WEIGHTS[name]) for short, name in PLACES.items()]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, external=external)
    adapter = lora(tmp_path / "adapter", "q", "k")
    result = surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    numbers = {short: WEIGHTS[name].size for short, name in PLACES.items()}
    account = result.ledger.as_json()
    assert set(account["tensors"]) == {f"val_{short}" for short in PLACES}
    assert account["classes"] == {"copied": 2, "updated": 2}
    sizes = sum(file.stat().st_size for file in path.parent.iterdir())
    assert account["between_nbytes"] == sizes - 4 * sum(numbers.values()) > 0
    parameters = result.summary().as_json()["sections"][0]["rows"]
    ((_, (changed, _, whole, _)),) = [row for row in parameters if row[0] == "parameters"]
    assert (changed["value"], whole["value"]) == (numbers["q"] + numbers["k"], sum(numbers.values()))
    assert "copied" in str(result).partition("between them")[2].splitlines()[0]


def test_a_scaled_weight_gets_a_scaled_update(tmp_path: Path, base: Path) -> None:
    factor = np.float32(8**-0.5)
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", (WEIGHTS[PLACES["q"]] * factor).T)])
    adapter = lora(tmp_path / "adapter", "q")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")[PLACES["q"]]
    np.testing.assert_allclose(values_in(tmp_path / "out" / "g.onnx")["w"], (merged * factor).T, rtol=3e-7)


def test_rows_with_factors_of_their_own_keep_them(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of rows, here of four, takes its own factors and not those of the first block."""
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", 4 * 24)
    weight = WEIGHTS[PLACES["q"]]
    factors = np.random.default_rng(1).uniform(0.5, 2, (len(weight), 1)).astype("f4")
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", weight * factors)])
    adapter = lora(tmp_path / "adapter", "q")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")[PLACES["q"]]
    np.testing.assert_allclose(values_in(tmp_path / "out" / "g.onnx")["w"], merged * factors, rtol=3e-7)


@pytest.mark.parametrize("plus", [0, 1], ids=["as it is", "plus 1, as Gemma's"])
def test_a_folded_norm_is_folded_into_the_update_too(tmp_path: Path, base: Path, plus: int) -> None:
    norm = WEIGHTS["model.layers.0.input_layernorm.weight"] + np.float32(plus)
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]] * norm)])
    adapter = lora(tmp_path / "adapter", "q")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")[PLACES["q"]]
    np.testing.assert_allclose(values_in(tmp_path / "out" / "g.onnx")["w"], merged * norm, rtol=3e-7)


@pytest.mark.parametrize("combination", [one for one in sample(30) if not one.refused], ids=str)
def test_every_kind_of_update_is_merged(tmp_path: Path, combination: Combination) -> None:
    attached = made(combination, tmp_path / "made")
    base, adapter = attached.folder / "hub", attached.folder / "adapter"
    weights = load_file(base / "model.safetensors")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")

    def name(number: int) -> str:
        """One that tells nothing, but for biases and norms that are not trained yet."""
        own = sorted(weights)[number]
        return own if weights[own].ndim == 1 else f"val_{number}"

    def laid_out(tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        ordered = [tensors[name] for name in sorted(weights)]
        return [value.T if number % 2 and value.ndim == 2 else value for number, value in enumerate(ordered)]

    tensors = [initializer(name(number), value) for number, value in enumerate(laid_out(weights))]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors)
    if merged.keys() != weights.keys():
        with pytest.raises(FitError, match="no place in the graph"):
            surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
        return
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    found = values_in(tmp_path / "out" / "g.onnx")
    for number, value in enumerate(laid_out(merged)):
        assert found[name(number)].tobytes() == np.ascontiguousarray(value).tobytes(), sorted(weights)[number]


def test_several_adapters_with_weights(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer(name, value.T) for name, value in WEIGHTS.items()])
    adapters = {lora(tmp_path / "a", "q", "o"): 0.5, lora(tmp_path / "b", "q", layer=1, seed=2): -2.0}
    surgery.merge(path, adapters, graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, adapters, tmp_path / "checkpoint")
    found = values_in(tmp_path / "out" / "g.onnx")
    assert all(np.array_equal(found[name], value.T) for name, value in merged.items())


def test_a_dry_run_names_what_would_change(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]].T)])
    result = surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, dry_run=True)
    (changed,) = result.ledger.plan.computed()
    assert (changed.name, changed.why) == ("w", f"{PLACES['q']} transposed")
    assert result.output is None
    assert "would write" in result.summary().as_text()


def test_scales_of_activations_are_warned_of(tmp_path: Path, base: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "s"], ["b"]),
        helper.make_node("DequantizeLinear", ["b", "s"], ["y"]),
    ]
    tensors = [initializer("w", WEIGHTS[PLACES["q"]].T), initializer("s", np.float32(0.1))]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, nodes)
    result = surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, dry_run=True)
    (told,) = (text for text in result.warnings if "activations" in text)
    assert "in one place to ranges that were measured without the adapter" in told


def test_files_that_run_the_graph_go_along(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]])], external=True)
    (path.parent / "genai_config.json").write_text("{}")
    (path.parent / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (path.parent / "notes.txt").write_text("mine")
    result = surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "g.onnx", "g.onnx.data", "genai_config.json", "surgery_manifest.json",
    }  # fmt: skip
    told = "".join(str(result.summary()).split())  # transformers finds no weights there
    assert f'next:runitwithonnxruntime:InferenceSession("{tmp_path / "out" / "g.onnx"}")' in told


def test_what_half_precision_cannot_hold_is_refused_with_a_cure_for_graphs(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]].T.astype("f2"))])
    with pytest.raises(FitError, match="does not fit F16") as caught:
        surgery.merge(path, (lora(tmp_path / "adapter", "q"), 1e7), graph_of=base, output=tmp_path / "out")
    assert "a graph has to be exported in one of these" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "size", "dtype"), [(4, 16, "f4"), (4, 8, "f2"), (8, 24, "f4"), (8, 16, "f2")])
def test_codes_hold_the_merge_within_their_step(
    tmp_path: Path, base: Path, bits: int, size: int, dtype: str, zeros: bool
) -> None:
    q, k, v = (WEIGHTS[PLACES[short]] for short in "qkv")
    tensors, node = nbits("a", np.concatenate([q, k, v]), bits, size, zeros=zeros, dtype=dtype)
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, [node])
    adapter = lora(tmp_path / "adapter", "q", "v", size=0.3)
    result = surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")
    before, after = values_in(path), values_in(tmp_path / "out" / "g.onnx")
    assert np.array_equal(before["a_q"][32:48], after["a_q"][32:48])  # k
    from surgery.onnx.locate.coded_nodes import coded_matrices

    (_, (place,)) = next(coded_matrices(open_graph(tmp_path / "out" / "g.onnx")))
    wanted = np.concatenate([merged[PLACES["q"]], k, merged[PLACES["v"]]])
    assert (np.abs(place.block(0, 64) - wanted) <= place.slack(0, 64, wanted)).all()
    ((_, measured, codes),) = result.ledger.requantised
    assert codes.moved > 0
    assert measured.survival == pytest.approx(1, abs=0.2)
    assert surgery.locate(tmp_path / "out", base, adapters=adapter).located.covered[PLACES["q"]] == 1


def test_codes_of_rows_that_no_update_reaches_stay_whoever_chose_them(tmp_path: Path, base: Path) -> None:
    """A value half-way between two codes may have been rounded either way."""
    weight = WEIGHTS[PLACES["q"]].copy()
    tensors, node = nbits("a", weight, 8, 24)
    scales, codes = numpy_helper.to_array(tensors[1]), numpy_helper.to_array(tensors[0]).copy()
    weight[1] = ((codes[1].reshape(-1)[:24].astype("f8") - 128 + 0.5) * scales[1]).astype("f4")  # now half a step above
    base = base_of(tmp_path / "base", {**WEIGHTS, PLACES["q"]: weight})
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("a_q", codes), *tensors[1:]], [node])
    adapter = lora(tmp_path / "adapter", "q", size=0.3)
    factors = load_file(adapter / "adapter_model.safetensors")
    (name,) = (name for name in factors if "lora_B" in name)
    factors[name][1] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    after = values_in(tmp_path / "out" / "g.onnx")["a_q"]
    assert not np.array_equal(after[0], codes[0])
    assert np.array_equal(after[1], codes[1])


def test_a_finished_file_is_taken_up_again_only_if_its_tensors_are_whole(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]].T)], external=True)
    adapter = lora(tmp_path / "adapter", "q")
    result = surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    graph, checkpoint = open_graph(path), surgery.open(base)
    binding = bind([(surgery.open(adapter), 1.0)], checkpoint)
    found = located_weights(graph, wanted_weights(checkpoint), touched=touched_labels(binding))
    planned = plan_graph(graph, changes_of(found, binding), binding)
    data = tmp_path / "out" / "g.onnx.data"
    measured = {label: one.as_record() for label, one in result.ledger.measured.items()}
    record = FileRecord(data.name, data.stat().st_size, {"tensors": measured})
    assert planned.still_good(data, record)
    raw = bytearray(data.read_bytes())
    raw[open_graph(tmp_path / "out" / "g.onnx").tensors["w"].offset + 5] ^= 1
    data.write_bytes(raw)
    assert not planned.still_good(data, record)
    assert not planned.still_good(data, FileRecord(data.name, data.stat().st_size, {}))
