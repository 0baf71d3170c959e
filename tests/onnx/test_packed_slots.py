# SPDX-License-Identifier: Apache-2.0
"""Slots that weights of one input share: they compute what slots of their own do, with fewer nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import surgery
from surgery.onnx.graph.contract import Contract, Slot, from_metadata
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats.errors import FitError, MalformedError, ProofError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
MORE = {"cpu": 8, "portable": 14, "cuda": 14}
"""Nodes of a layer beyond the base's, at most; slots of their own take 21 or 22."""
KINDS = {
    "all": trained._lora(),
    "some": trained._lora(target_modules=["k_proj", "v_proj", "up_proj"], rank_pattern={"v_proj": 2}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", hidden_size=64)
    return made


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: trained.train("llama", base, config, folder / name, seed)
        for seed, (name, config) in enumerate(KINDS.items())
    }


def nodes(graph: Path) -> int:
    return len(onnx.load(graph, load_external_data=False).graph.node)


def logits(graph: Path, adapter: Path | None) -> np.ndarray[Any, Any]:
    plain = Plain(graph)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    found: np.ndarray[Any, Any] = plain.session.run(["logits"], feed | (read_adapter_file(adapter) if adapter else {}))[
        0
    ]
    return found


@pytest.mark.parametrize("target", ["cpu", "portable", "cuda"])
def test_packed_slots_compute_what_peft_does_with_fewer_nodes(
    base: Path, adapters: dict[str, Path], target: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"target": target, "dtype": "fp32"}
    surgery.export_onnx(base, output=tmp_path / "base", **options)
    result = surgery.export_onnx(base, output=tmp_path / "out", swap=list(adapters.values()), packed=True, **options)
    graph, layers = tmp_path / "out" / "model.onnx", result.contract.layers
    assert nodes(graph) - nodes(tmp_path / "base" / "model.onnx") <= MORE[target] * layers
    assert len(result.contract.slots) == 4 * layers
    assert np.abs(logits(graph, None) - logits(tmp_path / "base" / "model.onnx", None)).max() <= 1e-5
    for name, path in adapters.items():
        expected = trained.logits(trained.attached("llama", base, (path, 1.0)), IDS)
        found = logits(graph, tmp_path / "out" / "adapters" / f"{name}.onnx_adapter")
        assert np.abs(found - expected).max() <= TOLERANCE
    surgery.verify(tmp_path / "out", against=base)


def test_a_layer_for_cuda_has_twelve_nodes_more(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    count = {}
    for name, options in {"base": {}, "out": {"swap": [adapters["all"]], "packed": True}}.items():
        result = surgery.export_onnx(base, output=tmp_path / name, target="cuda", dtype="fp16", **options)
        count[name] = nodes(tmp_path / name / "model.onnx")
    assert count["out"] - count["base"] <= 12 * result.contract.layers
    surgery.verify(tmp_path / "out", against=base)


def test_the_runner_adds_up_packed_adapters(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=list(adapters.values()), packed=True)
    files = [tmp_path / "out" / "adapters" / f"{name}.onnx_adapter" for name in KINDS]
    model = trained.attached("llama", base, *((path, 1.0) for path in adapters.values()))
    found = surgery.run(tmp_path / "out", [IDS[0].tolist()], max_new=8, adapters=files)
    assert list(found.texts[0].tokens) == trained.generated(model, IDS, 8)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi3", "gemma3"])
def test_other_families_have_them_where_weights_share_an_input(kind: str, tmp_path: Path) -> None:
    base = recipes.build(kind, tmp_path / "base")
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else "all-linear"
    path = trained.train(kind, base, trained._lora(target_modules=targets), tmp_path / "lora", 0)
    surgery.export_onnx(base, output=tmp_path / "out", swap=[path], packed=True)
    surgery.verify(tmp_path / "out", against=base)
    expected = trained.logits(trained.attached(kind, base, (path, 1.0)), IDS)
    found = logits(tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "lora.onnx_adapter")
    assert np.abs(found - expected).max() <= TOLERANCE


def test_packed_slots_hold_the_weight_of_an_adapter(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=[(adapters["some"], 0.5)], packed=True)
    expected = trained.logits(trained.attached("llama", base, (adapters["some"], 0.5)), IDS)
    found = logits(tmp_path / "out" / "model.onnx", tmp_path / "out" / "adapters" / "some.onnx_adapter")
    assert np.abs(found - expected).max() <= TOLERANCE


def test_required_slots_are_packed_too(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"packed": True, "required": True, "target": "portable"}
    surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]], **options)
    surgery.verify(tmp_path / "out", against=base)
    stored = {
        one.name for one in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    }
    assert not any("lora_" in name for name in stored)


def test_what_is_not_packed_states_no_parts(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]])
    props = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).metadata_props
    assert not any("parts" in prop.value for prop in props)


def test_there_is_nothing_to_pack_without_slots(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="there are no slots to pack"):
        surgery.export_onnx(base, output=tmp_path / "out", packed=True)


def test_a_packed_slot_of_other_sizes_is_no_proof(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    result = surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]], packed=True)
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    slot = next(one for one in result.contract.slots if len(one.parts) == 3)
    for prop in model.metadata_props:
        if prop.key == "surgery.contract":
            stated = json.loads(prop.value)
            entry = next(one for one in stated["slots"] if one["weight"] == slot.weight)
            entry["parts"] = entry["parts"][::-1]
            prop.value = json.dumps(stated)
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    onnx.save(model, path)
    with pytest.raises(ProofError, match=r"packed slot|logit differs"):
        surgery.verify(tmp_path / "out", against=base)


@pytest.mark.parametrize("parts", [[["w", 0]], [["w", "3"]], [[3, 4]], [["w"]], "w", [["w", True]]])
def test_parts_of_a_slot_are_checked(parts: Any) -> None:
    contract = Contract("encoder", "t", "cpu", "fp32", "any", "none", 0, 0, 0, 0, 8, slots=(Slot("w", "a", "b"),))
    stated = json.loads(contract.as_metadata()["surgery.contract"])
    assert stated["slots"] == [{"weight": "w", "A": "a", "B": "b"}]
    stated["slots"][0]["parts"] = parts
    with pytest.raises(MalformedError):
        from_metadata({"surgery.contract": json.dumps(stated)})


def test_an_adapter_is_converted_for_packed_slots(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=list(adapters.values()), packed=True)
    graph = tmp_path / "out" / "model.onnx"
    for name, path in adapters.items():
        made = tmp_path / f"{name}.onnx_adapter"
        surgery.convert(path, to="onnx-adapter", graph=graph, output=made, base=base)
        exported = read_adapter_file(tmp_path / "out" / "adapters" / f"{name}.onnx_adapter")
        converted = read_adapter_file(made)
        assert converted.keys() == exported.keys()
        assert (
            np.abs(logits(graph, made) - trained.logits(trained.attached("llama", base, (path, 1.0)), IDS)).max()
            <= TOLERANCE
        )


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda slot: slot["parts"].pop(), "not the columns of its factor"),
        (lambda slot: slot["parts"].append(["other.weight", 0]), "not the columns of its factor"),
        (lambda slot: slot["parts"].append([slot["parts"][0][0], 0]), "not the columns of its factor"),
        (lambda slot: slot.update(B=slot["A"]), "not the columns of its factor"),
        (lambda slot: slot.update(parts=[["q_proj.weight"]]), "cannot be read"),
        (lambda slot: slot.update(A="none"), "cannot be read"),
    ],
)
def test_parts_that_are_not_the_columns_of_a_factor_are_refused(
    base: Path, adapters: dict[str, Path], fault: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]], packed=True)
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for prop in model.metadata_props:
        if prop.key == "surgery.contract":
            stated = json.loads(prop.value)
            fault(next(one for one in stated["slots"] if "parts" in one))
            prop.value = json.dumps(stated)
    onnx.save(model, path)
    with pytest.raises(MalformedError, match=words):
        surgery.convert(adapters["all"], to="onnx-adapter", graph=path, output=tmp_path / "a", base=base)


def test_parts_of_a_factor_without_sizes_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]], packed=True)
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    stated = json.loads(next(prop.value for prop in model.metadata_props if prop.key == "surgery.contract"))
    name = next(one["A"] for one in stated["slots"] if "parts" in one)
    shape = next(one.type.tensor_type.shape for one in model.graph.input if one.name == name)
    del shape.dim[:]
    onnx.save(model, path)
    with pytest.raises(MalformedError, match="not the columns of its factor"):
        surgery.convert(adapters["all"], to="onnx-adapter", graph=path, output=tmp_path / "a", base=base)


def test_factors_that_several_weights_share_are_no_ones_adapter(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT would take a folder with a module `q_proj+k_proj+v_proj`, and attach none of it."""
    surgery.export_onnx(base, output=tmp_path / "out", swap=[adapters["all"]], packed=True)
    file = tmp_path / "out" / "adapters" / "all.onnx_adapter"
    assert surgery.inspect(file)
    for write in (
        lambda out: surgery.convert(file, to="peft", output=out),
        lambda out: surgery.convert(file, to="peft", output=out, base=base),
        lambda out: surgery.combine([(file, 0.5), (file, 0.5)], to="peft", output=out),
        lambda out: surgery.merge(base, file, output=out),
    ):
        with pytest.raises(FitError, match="of a packed slot"):
            write(tmp_path / "made")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_packed_slots_are_not_folded(base: Path, adapters: dict[str, Path], target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.export_onnx(base, output=out, swap=[adapters["all"]], packed=True, target=target)
    with pytest.raises(FitError, match=r"is a packed slot, .* cannot be folded"):
        surgery.fold(out, [out / "adapters" / "all.onnx_adapter"], output=tmp_path / "folded")
