# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks, compacters and invertible adapters in graphs: what AdapterHub's library computed, within 1e-5.

`tests/golden/bottlenecks/make.py` made the adapters and the answers with the library itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

import surgery
from surgery.onnx.export.adapters import sort_adapters
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.reference import forward, open_reference
from surgery.verification.inserted import with_adapter_modules
from surgery_formats.errors import FitError, MalformedError, ProofError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT
from tests.support.onnx_files import write_adapter_file

GOLDEN = ROOT / "tests" / "golden" / "bottlenecks"
ANSWERS = load_file(GOLDEN / "answers.safetensors")
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "adapter_config.json").exists())
IDS = np.array([[5, 17, 3, 38, 12], [2, 9, 31, 7, 7]])
TOLERANCE = 1e-5


def base_of(case: str) -> Path:
    return GOLDEN / "base" / json.loads((GOLDEN / case / "adapter_config.json").read_text())["model_name"]


def answer(folder: Path, *files: Path, plain: bool = False) -> np.ndarray:
    """What a graph answers, with adapter files active; several rows are prefilled by the graph made for that."""
    graph = folder / ("prefill.onnx" if (folder / "prefill.onnx").exists() else "model.onnx")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_prepacking", "1")
    if plain:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for port in session.get_inputs():
        if port.name == "token_type_ids":
            feed[port.name] = np.zeros_like(IDS)
        if port.name.startswith("past"):
            feed[port.name] = np.zeros((2, port.shape[1], 0, port.shape[3]), np.float32)
    options, loaded = onnxruntime.RunOptions(), []
    for file in files:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))
        options.add_active_adapter(loaded[-1])
    return session.run([session.get_outputs()[0].name], feed, options)[0]


def error(found: np.ndarray, name: str) -> float:
    return float(np.abs(found - ANSWERS[name]).max() / max(1.0, np.abs(ANSWERS[name]).max()))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_library(case):
    reference = open_reference(open_checkpoint(base_of(case)).main)
    named = sort_adapters([GOLDEN / case]).insert
    assert len(named) == 1
    if named[0].rest.updates:  # a LoRA beside it, or a head
        pytest.importorskip("surgery.engine.merge.merge_plan")
        from surgery.engine.merge.merge_plan import plan_merge
        from surgery_formats.binding.bind import bind

        checkpoint = open_checkpoint(base_of(case))
        reference = open_reference(checkpoint.main, plan_merge(bind([(named[0].rest, 1.0)], checkpoint)))
    found = forward(with_adapter_modules(reference, named), torch.from_numpy(IDS)).logits.numpy()
    assert error(found, case) <= TOLERANCE


@pytest.mark.parametrize("target", ["portable", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_baked_modules_are_the_librarys(case, target, tmp_path):
    result = surgery.export_onnx(base_of(case), GOLDEN / case, output=tmp_path / "out", target=target, dtype="fp32")
    assert error(answer(tmp_path / "out"), case) <= TOLERANCE
    assert [entry["mode"] for entry in result.contract.adapters] == ["inserted"]
    assert "inserted.safetensors" in str(result.summary())
    limit = 1e-4 * max(1.0, np.abs(ANSWERS[case]).max() * 4)
    assert surgery.verify(tmp_path / "out").difference <= limit
    assert surgery.verify(tmp_path / "out", against=base_of(case), adapters=GOLDEN / case).difference <= limit


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_swapped_modules_are_the_librarys_and_nothing_without_an_adapter(case, target, tmp_path):
    base = base_of(case)
    surgery.export_onnx(base, swap=GOLDEN / case, output=tmp_path / "out", target=target)
    (file,) = (tmp_path / "out" / "adapters").iterdir()
    assert error(answer(tmp_path / "out", file), case) <= TOLERANCE
    assert error(answer(tmp_path / "out"), base.name) <= TOLERANCE
    assert surgery.verify(tmp_path / "out", against=base).checks[-1].name.endswith("slots filled")


@pytest.mark.parametrize(
    "case", ["bert-before-own", "bert-nothing-kept", "bert-gated", "llama-invertible", "gpt2-double"]
)
def test_slots_without_an_adapter_are_the_base_to_the_bit(case, tmp_path):
    surgery.export_onnx(base_of(case), output=tmp_path / "base", target="portable")
    surgery.export_onnx(base_of(case), swap=GOLDEN / case, output=tmp_path / "out", target="portable")
    found, expected = (answer(tmp_path / name, plain=True) for name in ("out", "base"))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["bert-seq+norms", "llama-seq+parallel"])
def test_a_stack_is_adapters_one_after_the_other(name, tmp_path):
    kind = name.partition("-")[0]
    parts = [GOLDEN / f"{kind}-{part}" for part in name.partition("-")[2].split("+")]
    surgery.export_onnx(base_of(parts[0].name), parts, output=tmp_path / "out")
    assert error(answer(tmp_path / "out"), name) <= TOLERANCE
    surgery.export_onnx(base_of(parts[0].name), swap=parts, output=tmp_path / "slots")
    files = [tmp_path / "slots" / "adapters" / f"{part.name}.onnx_adapter" for part in parts]
    assert error(answer(tmp_path / "slots", *files), name) <= TOLERANCE
    for part, file in zip(parts, files, strict=True):
        assert error(answer(tmp_path / "slots", file), part.name) <= TOLERANCE
    assert surgery.verify(tmp_path / "slots").checks[-1].name.endswith("slots filled")


def test_adapters_of_one_form_share_inputs(tmp_path):
    adapters = [GOLDEN / "bert-compacter", GOLDEN / "bert-phm-own", GOLDEN / "bert-double"]
    contract = surgery.export_onnx(base_of("bert-double"), swap=adapters, output=tmp_path / "out").contract
    assert len(contract.inserted) == 2 * 4  # gelu and silu, behind two bodies of two layers
    for adapter in adapters:
        file = tmp_path / "out" / "adapters" / f"{adapter.name}.onnx_adapter"
        assert error(answer(tmp_path / "out", file), adapter.name) <= TOLERANCE


@pytest.mark.parametrize("mode", ["embed", "reference"])
def test_every_way_to_place_weights_takes_modules(mode, tmp_path):
    base = shutil.copytree(base_of("bert-seq"), tmp_path / "base")
    out = base if mode == "reference" else tmp_path / "out"
    surgery.export_onnx(base, GOLDEN / "bert-seq", output=out, weights=mode)
    assert error(answer(out), "bert-seq") <= TOLERANCE
    assert (out / "inserted.safetensors").exists() == (mode == "reference")
    assert surgery.verify(out, against=base, adapters=GOLDEN / "bert-seq").difference <= 1e-4


def test_modules_in_a_graph_of_another_type_go_inside(tmp_path):
    warnings = [
        surgery.export_onnx(
            base_of("bert-seq"),
            GOLDEN / "bert-seq",
            output=tmp_path / mode,
            weights=mode,
            target="portable",
            dtype="fp16",
        ).warnings
        for mode in ("copy", "embed")
    ]
    assert warnings[0] == warnings[1]


def test_run_takes_baked_and_swapped_modules(tmp_path):
    ids = IDS[0].tolist()
    surgery.export_onnx(base_of("llama-seq"), GOLDEN / "llama-seq", output=tmp_path / "baked")
    surgery.export_onnx(base_of("llama-seq"), swap=GOLDEN / "llama-seq", output=tmp_path / "slots")
    baked = surgery.run(tmp_path / "baked", ids, max_new=4)
    file = tmp_path / "slots" / "adapters" / "llama-seq.onnx_adapter"
    swapped = surgery.run(tmp_path / "slots", ids, max_new=4, adapters=file)
    assert baked.texts[0].tokens == swapped.texts[0].tokens
    assert baked.texts[0].tokens[0] == ANSWERS["llama-seq"][0, -1].argmax()
    arrays = read_adapter_file(file)
    del arrays["model.layers.1.output_adapters.adapters.up.bias"]
    write_adapter_file(tmp_path / "part.onnx_adapter", arrays)
    with pytest.raises(FitError, match="a part of an inserted module is missing"):
        surgery.run(tmp_path / "slots", ids, max_new=4, adapters=tmp_path / "part.onnx_adapter")


def test_a_changed_module_fails_the_proof(tmp_path):
    surgery.export_onnx(base_of("bert-seq"), GOLDEN / "bert-seq", output=tmp_path / "out")
    file = tmp_path / "out" / "inserted.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x7F
    file.write_bytes(data)
    with pytest.raises(ProofError):
        surgery.verify(tmp_path / "out")


def test_a_form_that_the_graph_does_not_compute_fails_the_proof(tmp_path):
    surgery.export_onnx(base_of("bert-seq"), GOLDEN / "bert-seq", output=tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Tanh"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(tmp_path / "out")


def test_merge_says_why_not_and_names_the_way(tmp_path):
    with pytest.raises(FitError, match="a network of its own behind a layer") as caught:
        surgery.merge(base_of("bert-seq"), GOLDEN / "bert-seq", output=tmp_path / "out")
    assert "`surgery export-onnx BASE ADAPTER` inserts it into a graph" in caught.value.hint
    with pytest.raises(FitError, match="a network of its own"):
        surgery.export_onnx(base_of("bert-seq"), merge=GOLDEN / "bert-seq", output=tmp_path / "out")


CHANGES = {
    "GLOW": ("llama-invertible", {"inv_adapter": "glow"}, FitError, "GLOW, which the library's own forward cannot run"),
    "post_add": ("llama-seq", {"residual_before_ln": "post_add"}, FitError, "its own forward fails"),
    "activation": ("bert-seq", {"non_linearity": "mish"}, FitError, "'non_linearity' is 'mish'"),
    "off": ("bert-seq", {"output_adapter": False}, MalformedError, "no method with 'output_adapter' in layer 0"),
    "scale": ("bert-seq", {"scaling": "much"}, MalformedError, "'scaling' is 'much'"),
    "switch": ("bert-seq", {"ln_after": 1}, MalformedError, "'ln_after' is 1"),
    "kind": ("bert-seq", {"phm_layer": True}, MalformedError, "without its"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_graph_can_hold_is_refused(name, tmp_path):
    case, change, kind, text = CHANGES[name]
    folder = shutil.copytree(GOLDEN / case, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"] |= change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=text.replace("'", ".")):
        surgery.export_onnx(base_of(case), folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_of_another_size_or_family_is_refused(tmp_path):
    with pytest.raises(FitError, match=r"the model's layer is 'model\.layers\.0'"):
        surgery.export_onnx(base_of("llama-seq"), GOLDEN / "bert-seq", output=tmp_path / "out")
    folder = shutil.copytree(GOLDEN / "bert-seq", tmp_path / "adapter")
    tensors = load_file(folder / "adapter.safetensors")
    key = next(key for key in tensors if key.endswith("adapter_up.bias"))
    save_file(tensors | {key: np.zeros(3, np.float32)}, folder / "adapter.safetensors")
    with pytest.raises(MalformedError, match="not"):
        surgery.export_onnx(base_of("bert-seq"), folder, output=tmp_path / "out")


def test_a_prefix_beside_a_bottleneck_is_refused_by_name(tmp_path):
    union = ROOT / "tests" / "golden" / "adapterhub" / "bert-union"
    with pytest.raises(FitError, match="prefix: keys and values"):
        surgery.export_onnx(base_of("bert-seq"), union, output=tmp_path / "out")


FIELDS = {
    "behind": "everything",
    "layer": -1,
    "width": "16",
    "rank": 1 << 40,
    "form": {"activation": "relu", "odd": True},
    "inverted": None,
    "module": 7,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_contract_with_an_odd_module_is_refused(field, tmp_path):
    surgery.export_onnx(base_of("bert-seq"), GOLDEN / "bert-seq", output=tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (prop,) = [prop for prop in model.metadata_props if prop.key == "surgery.contract"]
    contract = json.loads(prop.value)
    contract["inserted"][0][field] = FIELDS[field]
    prop.value = json.dumps(contract)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MalformedError, match="no valid 'inserted'"):
        surgery.run(tmp_path / "out", IDS[0].tolist())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["bert-norms", "llama-gated", "llama-invertible", "bert-with-head"])
def test_graphs_of_16_bits_take_modules(case, dtype, tmp_path):
    base = base_of(case)
    surgery.export_onnx(base, GOLDEN / case, output=tmp_path / "baked", target="cuda", dtype=dtype)
    assert surgery.verify(tmp_path / "baked", against=base, adapters=GOLDEN / case).difference <= 1e-4
    surgery.export_onnx(base, swap=GOLDEN / case, output=tmp_path / "slots", target="cuda", dtype=dtype)
    checks = surgery.verify(tmp_path / "slots", against=base).checks
    assert any(check.name.endswith("slots filled") for check in checks)
