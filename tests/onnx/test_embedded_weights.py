# SPDX-License-Identifier: Apache-2.0
"""One self-contained file of a model with merged adapters: as it is, as codes, or for other quantisers."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain, feed_encoder, open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
WIDE = {"hidden_size": 64, "intermediate_size": 96}
WAYS = {
    "delta": {},
    "full": {"merge_to": "full"},
    "int4": {"weights_type": "int4", "symmetric": False},
    "matmul": {"linear": "matmul"},
}


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("way", WAYS)
def test_merged_adapters_lie_inside_the_graph(way, target, tmp_path):
    base = recipes.build("qwen2", tmp_path / "base", **WIDE)
    adapter = trained.train("qwen2", base, trained.MERGED["lora all-linear"], tmp_path / "adapter")
    beside, out = tmp_path / "beside", tmp_path / "out"
    export_onnx(base, [adapter], output=beside, target=target, **WAYS[way])
    result = export_onnx(base, [adapter], output=out, target=target, weights="embed", **WAYS[way])
    assert not list(out.glob("*.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "beside", "out"]
    moved = tmp_path / "alone.onnx"
    moved.write_bytes((out / "model.onnx").read_bytes())
    found = Plain(moved).step(IDS, np.ones_like(IDS))
    assert np.array_equal(found, Plain(beside / "model.onnx").step(IDS, np.ones_like(IDS)))
    if way != "int4":
        expected = trained.logits(trained.attached("qwen2", base, (adapter, 1.0)), IDS)
        assert np.abs(found - expected).max() <= 1e-4
    assert result.nbytes == sum(size for size in result.files.values()) + sum(
        (out / name).stat().st_size for name in os.listdir(out) if name not in result.files and "manifest" not in name
    )
    surgery.verify(out, against=base, adapters=[adapter])
    ran, expected = (surgery.run(one, IDS[0].tolist(), max_new=2).texts[0].tokens for one in (out, beside))
    assert ran == expected


@pytest.mark.parametrize("way", ["delta", "full"])
def test_what_fp16_cannot_hold_is_told_of_weights_inside(way, tmp_path):
    base = recipes.build("qwen2", tmp_path / "base", **WIDE)
    adapter = trained.train("qwen2", base, trained.MERGED["lora all-linear"], tmp_path / "adapter")
    options = {"target": "portable", "dtype": "fp16", **WAYS[way]}
    beside = export_onnx(base, [(adapter, 1e7)], output=tmp_path / "beside", **options)
    inside = export_onnx(base, [(adapter, 1e7)], output=tmp_path / "out", weights="embed", **options)
    assert inside.warnings == beside.warnings
    assert any("become infinite in fp16" in warning for warning in inside.warnings)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_table_that_its_head_shares_is_inside_once(kind, tmp_path):
    base = recipes.build("qwen3", tmp_path / "base", hidden_size=64)
    out = tmp_path / "out"
    export_onnx(base, output=out, weights_type=kind, weights="embed", target="portable")
    export_onnx(base, output=tmp_path / "beside", weights_type=kind, target="portable")
    graph = onnx.load(out / "model.onnx").graph
    tables = [one for one in graph.initializer if "embed_tokens" in one.name and one.data_type == 2]
    assert len(tables) == 1
    ids, mask = IDS, np.ones_like(IDS)
    assert np.array_equal(
        Plain(out / "model.onnx").step(ids, mask), Plain(tmp_path / "beside" / "model.onnx").step(ids, mask)
    )
    checks = {check.name: check.detail for check in surgery.verify(out, against=base).checks}
    assert "22 weights of" in checks["quantised weights"]


def test_the_usual_next_step_of_a_deployer_works(tmp_path):
    """A merged encoder, one file, int8: case 12 of the deployment reports."""
    base = recipes.build("bert_sequence", tmp_path / "base", **WIDE)
    out = tmp_path / "out"
    adapter = trained.train(
        "bert_sequence",
        base,
        ("LoraConfig", {"r": 4, "target_modules": ["query", "value"]}),
        tmp_path / "adapter",
        task="SEQ_CLS",
    )
    export_onnx(base, [adapter], output=out, weights="embed", linear="matmul")
    quantize_dynamic(out / "model.onnx", out / "int8.onnx", weight_type=QuantType.QInt8)
    assert (out / "int8.onnx").stat().st_size < 0.5 * (out / "model.onnx").stat().st_size
    answers = [
        feed_encoder(open_session(out / name)[0], IDS, np.ones_like(IDS))["logits"]
        for name in ("model.onnx", "int8.onnx")
    ]
    assert np.abs(answers[0] - answers[1]).max() < 0.1 * np.abs(answers[0]).max()


def test_what_exceeds_one_file_is_refused(tmp_path, monkeypatch):
    base = recipes.build("llama", tmp_path / "base")
    monkeypatch.setattr("surgery.onnx.export.embed._PROTOBUF_LIMIT", 20_000)
    with pytest.raises(FitError, match="that one file can hold"):
        export_onnx(base, output=tmp_path / "out", weights="embed", weights_type="int8")
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_a_prompt_over_weights_that_are_inside(tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    adapter = trained.train("llama", base, trained.MERGED["lora q v"], tmp_path / "adapter")
    prompt = trained.train("llama", base, trained.PROMPTS["prompt"], tmp_path / "prompt")
    out = tmp_path / "out"
    with pytest.raises(FitError, match="keys and values of a prompt"):
        export_onnx(base, [adapter, prompt], output=out, weights="embed")
    export_onnx(base, [adapter, prompt], output=out, weights="embed", weights_type="int8")
    export_onnx(base, [adapter, prompt], output=tmp_path / "beside", weights_type="int8")
    checks = [surgery.verify(folder).difference for folder in (out, tmp_path / "beside")]
    assert max(checks) < 1e-3
