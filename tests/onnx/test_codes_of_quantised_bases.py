# SPDX-License-Identifier: Apache-2.0
"""A base of codes goes into a graph of codes as it is, where its grid is one of blocks; else it is rounded again, and that is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import surgery
from surgery.engine.merge.merge_plan import plan_merge
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.binding.bind import bind
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.oracles import recipes
from tests.support import trained
from tests.support.block_codes import decoded, with_values
from tests.support.quantised_folders import FORMATS, KINDS, quantise_folder
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
WIDE = {"hidden_size": 64, "intermediate_size": 96}
FITTING = ("gptq", "awq", "packed")
GGUF = Path(__file__).parents[1] / "containers" / "golden" / "wide.gguf"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", **WIDE)


def values_of(base):
    """``(out, in)`` of every linear weight, as the codecs read it."""
    parameters = open_checkpoint(base).main.parameters
    return {name: read_rows(one.storage) for name, one in parameters.items() if "_proj" in name}


@pytest.mark.parametrize("kind", FITTING)
def test_codes_of_a_fitting_base_are_taken_bit_for_bit(plain, kind, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", kind)
    out = tmp_path / "out"
    result = export_onnx(base, output=out, weights_type="int4")
    found = decoded(out)
    for name, values in values_of(base).items():
        assert np.array_equal(found[name][:, : values.shape[1]], values), name
    errors = {tensor.weight: error for tensor, error in result.ledger.coded}
    assert {error.error for name, error in errors.items() if "_proj" in name} == {0.0}
    assert not [warning for warning in result.warnings if "second time" in warning]
    surgery.verify(out, against=base)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_codes_of_4_bits_stay_so_where_8_are_asked_for(plain, kind, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", kind)
    result = export_onnx(base, output=tmp_path / "out", weights_type="int8")
    whys = {tensor.weight: tensor.why for tensor, _ in result.ledger.coded}
    assert whys["model.layers.0.mlp.up_proj.weight"] == "4 bits, blocks of 32, its own codes"
    assert whys["lm_head.weight"] == "8 bits, blocks of 32"


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - set(FITTING)))
def test_what_no_codes_of_blocks_can_hold_is_rounded_again_and_said(plain, kind, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", kind)
    result = export_onnx(base, output=tmp_path / "out", weights_type="int4")
    said = [warning for warning in result.warnings if "rounded a second time" in warning]
    assert said == [
        f"21 weights of {KINDS[kind]} are rounded a second time: their numbers are on no grid of these codes"
    ]
    found = decoded(tmp_path / "out")
    for name, values in values_of(base).items():
        error = np.linalg.norm(found[name][:, : values.shape[1]] - values) / np.linalg.norm(values)
        assert 0 < error < 0.2
    surgery.verify(tmp_path / "out", against=base)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_what_is_coded_again_is_read_as_the_model_has_it(plain, kind, tmp_path):
    """Whichever way round its format stores it: GPTQ has inputs as rows."""
    checkpoint = open_checkpoint(quantise_folder(plain, tmp_path / "base", kind))
    steps = {tensor.name: tensor.step for tensor in plan_merge(bind([], checkpoint), packed=True).tensors}
    for name, parameter in checkpoint.main.parameters.items():
        if "_proj" in name:
            assert not steps[name].source.transposed
            assert steps[name].source.shape == parameter.sizes


def test_what_fits_of_a_gguf_is_taken_bit_for_bit(tmp_path):
    result = export_onnx(GGUF, output=tmp_path / "out", weights_type="int8", dtype="fp32")
    parameters = open_checkpoint(GGUF).main.parameters
    fits = {"Q5_0", "Q6_K", "Q8_0"}
    for tensor, error in result.ledger.coded:
        assert (error.error == 0) == (parameters[tensor.weight].storage.kind in fits), tensor.weight
        assert ("its own codes" in tensor.why) == (error.error == 0)
    assert "4 weights of Q4_K are rounded a second time" in result.warnings[0]
    surgery.verify(tmp_path / "out", against=GGUF)


def test_a_merge_into_a_fitting_base_is_rounded_once(plain, tmp_path):
    base = quantise_folder(plain, tmp_path / "base", "gptq")
    adapter = trained.train("llama", plain, trained.MERGED["lora q v"], tmp_path / "adapter")
    result = export_onnx(base, [adapter], output=tmp_path / "out", weights_type="int4", rounding="nearest")
    errors = {tensor.weight: error.error for tensor, error in result.ledger.coded}
    assert errors["model.layers.0.self_attn.q_proj.weight"] > 0
    assert errors["model.layers.0.self_attn.k_proj.weight"] == 0


@pytest.mark.parametrize("kind", ["gptq", None])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_adapters_in_slots_over_codes_are_those_of_peft_over_their_values(plain, kind, target, tmp_path):
    """QLoRA served unmerged."""
    base = quantise_folder(plain, tmp_path / "base", kind) if kind else plain
    names = ("lora all-linear", "lora embedding")
    adapters = [
        trained.train("llama", plain, trained.MERGED[name], tmp_path / name.replace(" ", "_")) for name in names
    ]
    out = tmp_path / "out"
    export_onnx(base, output=out, swap=adapters, weights_type="int4", target=target)
    with_values("llama", plain, decoded(out), table=False).save_pretrained(tmp_path / "values")
    for adapter in adapters:
        expected = trained.logits(trained.attached("llama", tmp_path / "values", (adapter, 1.0)), IDS)
        found = swapped(Plain(out / "model.onnx"), out / "adapters" / f"{adapter.name}.onnx_adapter")
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    surgery.verify(out, against=base)


def swapped(plain, file):
    """Logits with an adapter active, the way onnxruntime itself does it."""
    options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    loaded.Load(str(file))
    options.add_active_adapter(loaded)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    return plain.session.run(["logits"], feed, options)[0]
