# SPDX-License-Identifier: Apache-2.0
"""Graphs of fp8 compute what the codes stand for, in sets of operators that old runtimes have, and take a base's own fp8 as it is."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.float8_codes import Float8Codes
from tests.oracles import recipes
from tests.support import trained
from tests.support.block_codes import decoded, with_values
from tests.support.quantised_folders import FORMATS, compressed, quantise_folder
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELS = {"llama": WIDE, "qwen3": {"hidden_size": 64}, "gpt2": {"n_embd": 64}}  # apart, tied, rows that are inputs
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", **WIDE)


def rows_of_fp8(name, weight):
    """compressed-tensors' FP8 with a scale for each output."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


ROWS = (rows_of_fp8, compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel"))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def swapped(plain, file):
    """Logits with an adapter active, the way onnxruntime itself does it."""
    options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    loaded.Load(str(file))
    options.add_active_adapter(loaded)
    return plain.session.run(
        ["logits"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}, options
    )[0]


def versions(out):
    model = onnx.load(out / "model.onnx", load_external_data=False)
    return model.ir_version, next(one.version for one in model.opset_import if one.domain == "")


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_of_fp8_is_the_model_of_what_the_codes_stand_for(name, tmp_path):
    base = recipes.build(name, tmp_path / "base", **MODELS[name])
    out = tmp_path / "out"
    result = export_onnx(base, output=out, weights_type="fp8")
    assert versions(out)[0] < 10
    expected = logits(with_values(name, base, decoded(out)))
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert all(0.01 < error.relative < 0.04 for _, error in result.ledger.coded)
    assert surgery.verify(out, against=base).difference < 1e-4
    assert f"{len(decoded(out))} in fp8: error 0.0" in str(result.summary())


@pytest.mark.parametrize(("target", "dtype"), [("portable", "fp16"), ("cuda", "bf16")])
def test_graphs_of_16_bits_and_with_the_weights_inside_are_proved(plain, target, dtype, tmp_path):
    export_onnx(plain, output=tmp_path / "out", weights_type="fp8", target=target, dtype=dtype, weights="embed")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    result = surgery.verify(tmp_path / "out", against=plain)
    assert result.difference is not None
    assert (
        0 < result.difference < (0.02 if dtype == "fp16" else 0.1)
    )  # not bit for bit, and of the size of the type's steps


@pytest.mark.parametrize("kind", ["fp8", "fp8 tensor", "fp8 rows"])
def test_a_base_of_fp8_is_taken_bit_for_bit(plain, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "fp8 rows", ROWS)
    base, out = quantise_folder(plain, tmp_path / "base", kind), tmp_path / "out"
    result = export_onnx(base, output=out, weights_type="fp8")
    found = decoded(out)
    parameters = open_checkpoint(base).main.parameters
    for name in (name for name in parameters if "_proj" in name):
        assert np.array_equal(found[name], read_rows(parameters[name].storage)), name
    assert not [warning for warning in result.warnings if "second time" in warning]
    whys = {tensor.weight: tensor.why for tensor, _ in result.ledger.coded}
    assert whys[Q] == ("fp8, blocks of 32" if kind == "fp8" else "fp8, a scale for each output") + ", its own codes"
    assert versions(out) == ((10, 21) if kind == "fp8" else (9, 19))
    surgery.verify(out, against=base)


def test_what_is_no_fp8_of_this_type_is_rounded_again_and_said(plain, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", "gptq")
    (warning,) = [
        one for one in export_onnx(base, output=tmp_path / "out", weights_type="fp8").warnings if "second" in one
    ]
    assert "21 weights of GPTQ4 are rounded a second time" in warning


def test_a_merge_into_a_base_of_fp8_rounds_what_it_changes_once(plain, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", "fp8")
    adapter = trained.train("llama", plain, trained.MERGED["lora q v"], tmp_path / "adapter")
    result = export_onnx(base, [adapter], output=tmp_path / "out", weights_type="fp8")
    errors = {tensor.weight: error.error for tensor, error in result.ledger.coded}
    assert errors[Q] > 0
    assert errors[Q.replace("q_proj", "k_proj")] == 0
    surgery.verify(tmp_path / "out", adapters=[adapter], against=base)


def test_adapters_in_slots_over_fp8_are_those_of_peft_over_its_values(plain, tmp_path):
    adapter, out = trained.train("llama", plain, trained.MERGED["lora all-linear"], tmp_path / "lora"), tmp_path / "out"
    export_onnx(plain, output=out, swap=[adapter], weights_type="fp8")
    with_values("llama", plain, decoded(out)).save_pretrained(tmp_path / "values")
    expected = trained.logits(trained.attached("llama", tmp_path / "values", (adapter, 1.0)), IDS)
    found = swapped(Plain(out / "model.onnx"), out / "adapters" / "lora.onnx_adapter")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_rows_that_are_no_fp8_are_rounded_by_themselves():
    values = np.array([[0.5, 448.0, -3.0], [0.0, 0.0, 0.0], [1e-42, 3e-43, 0.0]], np.float32)
    encoding, rounded = (
        Float8Codes((3, 3), BlockFormat(8, 0, scale_type=DType.F32, floats=True)),
        np.empty((3, 3), np.float32),
    )
    codes, scales = encoding.put(0, values, rounded)
    assert np.array_equal(rounded, [[0.5, 448, -3], [0, 0, 0], [0, 0, 0]])
    assert np.frombuffer(scales.data, np.float32).tolist() == [1, 1, 2**-126]
    assert len(codes.data) == 9


def test_a_session_of_genai_is_told_to_make_numbers_of_them_at_load(plain, tmp_path):
    export_onnx(plain, output=tmp_path / "out", weights_type="fp8")
    text = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert text["model"]["decoder"]["session_options"]["session.disable_quant_qdq"] == "1"


REFUSED = {
    "blocks": ({"block": 64}, UsageError, "block is about integers"),
    "zero points": ({"symmetric": False}, UsageError, "asymmetric rounding is about integers"),
    "scales": ({"scales": "search"}, UsageError, "scales is about integers"),
    "feedback": ({"rounding": "feedback"}, UsageError, "rounds to nearest"),
    "budget": ({"budget": 10**6}, UsageError, "mixed types have a budget"),
    "old operators": ({"opset": 17}, FitError, "DequantizeLinear needs opset 19"),
    "names": ({"layout": "transformers.js"}, FitError, "no name for a graph of fp8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fp8_has_not_is_refused_by_name(plain, case, tmp_path):
    options, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        export_onnx(plain, output=tmp_path / "out", weights_type="fp8", **options)
    assert not (tmp_path / "out").exists()


def test_head_and_table_may_be_integers_beside_fp8(plain, tmp_path):
    result = export_onnx(plain, output=tmp_path / "out", weights_type="fp8", head="int8", embeddings="int4")
    assert "21 in fp8, 1 in int4, 1 in int8" in str(result.summary())
    surgery.verify(tmp_path / "out", against=plain)
