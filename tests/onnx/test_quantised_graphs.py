# SPDX-License-Identifier: Apache-2.0
"""Graphs of codes compute what the codes stand for: as transformers with these weights, and as our reference has it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

import surgery
from surgery.onnx.export.coded_plan import QUANTISED
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError, ProofError, UsageError
from tests.oracles import recipes
from tests.support import trained
from tests.support.block_codes import decoded, with_values
from tests.support.sessions import Plain, feed_encoder, open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODELS = {  # packed and parted; biases; a factor of the table's own type; rows that are inputs; one projection for three; narrow tables
    "llama": WIDE,
    "qwen2": WIDE,
    "gemma2": {"hidden_size": 64},
    "gpt2": {"n_embd": 64},
    "phi3": WIDE,
    "gpt_neox": WIDE,
    "granite": {},
    "opt_350m": {},
}


def kinds(folder, name="model.onnx"):
    graph = onnx.load(folder / name, load_external_data=False).graph
    return [node.op_type for node in graph.node]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_of_codes_is_the_model_of_what_they_stand_for(name, kind, tmp_path):
    base = recipes.build(name, tmp_path / "base", **MODELS[name])
    out = tmp_path / "out"
    symmetric = name in ("llama", "gpt2", "phi3")
    result = export_onnx(base, output=out, weights_type=kind, symmetric=symmetric)
    operators = kinds(out)
    assert "Gemm" not in operators
    assert not list(out.glob("model*.safetensors"))
    values = decoded(out)
    looked_up = "GatherBlockQuantized" in operators or name == "gpt_neox"
    expected = logits(with_values(name, base, values, table=looked_up))
    plain = Plain(out / "model.onnx")
    found = plain.step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    moved = np.abs(expected - logits(recipes.load(name, base))).max()
    assert moved > (0.01 if kind == "int4" else 1e-4)
    errors = {tensor.weight: error for tensor, error in result.ledger.coded}
    assert set(errors) == set(values)
    assert all(0 < error.relative < (0.2 if kind == "int4" else 0.02) for error in errors.values())
    surgery.verify(out, against=base)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_factor_of_the_tables_own_type_is_known_where_the_table_is_codes(kind, tmp_path):
    base = recipes.build(
        "gemma2", tmp_path / "base", hidden_size=96, dtype=torch.bfloat16
    )  # the root of 96 is no bfloat16
    export_onnx(base, output=tmp_path / "out", weights_type=kind)
    assert surgery.verify(tmp_path / "out", against=base).difference < TOLERANCE


@pytest.mark.parametrize("target", ["cuda", "cpu", "portable"])
def test_every_target_has_codes_and_greedy_tokens_are_those_of_the_values(target, tmp_path):
    base = recipes.build("qwen3", tmp_path / "base", hidden_size=64)
    out = tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4", block=64, target=target, dtype="fp32")
    assert kinds(out).count("MatMulNBits") == len(decoded(out)) - 3 * (2 if target == "cuda" else 3)
    assert "GatherBlockQuantized" in kinds(out)
    surgery.verify(out, against=base)
    model, plain, tokens, ids = with_values("qwen3", base, decoded(out)), Plain(out / "model.onnx"), [], IDS
    for _ in range(8):
        length = IDS.shape[1] + len(tokens)
        step = plain.step(ids, np.ones((1, length), np.int64))
        tokens.append(int(step[0, -1].argmax()))
        ids = np.array([[tokens[-1]]])
    expected = IDS[0].tolist()
    for _ in range(8):
        expected.append(int(logits(model, np.array([expected]))[0, -1].argmax()))
    assert tokens == expected[IDS.shape[1] :]


def test_a_tied_head_and_its_table_are_one_range_of_bytes(tmp_path):
    base = recipes.build("qwen3", tmp_path / "base", hidden_size=64)
    export_onnx(base, output=tmp_path / "out", weights_type="int4")
    stored = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    ranges = {one.name: {e.key: e.value for e in one.external_data} for one in stored if one.external_data}
    table = "model.embed_tokens.weight"
    assert ranges[f"{table}.rows"] == ranges[f"{table}.codes"]
    assert [name for name in ranges if name.startswith(table)] == [
        f"{table}.rows",
        f"{table}.scales.f16",
        f"{table}.codes",
    ]


@pytest.mark.parametrize(("embeddings", "head"), [("keep", "int8"), ("keep", "keep"), ("int8", "int8")])
def test_table_and_head_are_chosen_apart(embeddings, head, tmp_path):
    base = recipes.build("qwen3", tmp_path / "base", hidden_size=64, dtype=torch.bfloat16)
    out = tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4", embeddings=embeddings, head=head)
    operators, values = kinds(out), decoded(out)
    assert ("GatherBlockQuantized" in operators) == (embeddings != "keep")
    assert ("Gemm" in operators) == (head == "keep")
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    expected = logits(with_values("qwen3", base, values, table=embeddings != "keep"))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    surgery.verify(out, against=base)


@pytest.mark.parametrize("choice", ["keep", "int8"])
def test_a_factor_in_the_type_of_the_table_is_the_same_for_verify(choice, tmp_path):
    base = recipes.build("gemma3", tmp_path / "base", dtype=torch.bfloat16)
    export_onnx(base, output=tmp_path / "out", weights_type="int4", embeddings=choice, head=choice)
    assert surgery.verify(tmp_path / "out").difference <= TOLERANCE


@pytest.mark.parametrize("name", ["bert_sequence", "roberta_token", "distilbert_sentence"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_an_encoder_of_codes_is_the_model_of_what_they_stand_for(name, target, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    out = tmp_path / "out"
    export_onnx(base, output=out, weights_type="int8", target=target)
    session, _ = open_session(out / "model.onnx")
    mask = np.ones_like(IDS)
    found = feed_encoder(session, IDS, mask)
    model = with_values(name, base, decoded(out))
    more = (
        {"token_type_ids": torch.arange(IDS.size).reshape(IDS.shape) % 2}
        if any(port.name == "token_type_ids" for port in session.get_inputs())
        else {}
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS), attention_mask=torch.from_numpy(mask), **more)
    key = "logits" if "logits" in found else "last_hidden_state"
    assert np.abs(found[key] - getattr(expected, key).numpy()).max() <= TOLERANCE
    surgery.verify(out, against=base)


@pytest.mark.parametrize("name", ["lora all-linear", "dora", "lora_bias"])
def test_adapters_are_merged_before_weights_become_codes(name, tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    adapter = trained.train("llama", base, trained.MERGED[name], tmp_path / "adapter")
    out = tmp_path / "out"
    result = export_onnx(base, [adapter], output=out, weights_type="int8", rounding="nearest")
    expected = trained.logits(trained.attached("llama", base, (adapter, 1.0)), IDS)
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    plain = trained.logits(recipes.load("llama", base), IDS)
    assert np.abs(found - expected).max() < 0.1 * np.abs(plain - expected).max()
    assert result.ledger.classes["updated"]
    surgery.verify(out, against=base, adapters=[adapter])
    with pytest.raises(ProofError, match="its codes are off by"):
        surgery.verify(out, against=base)


def test_the_manifest_says_how_far_every_weight_is_from_the_base(tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    export_onnx(base, output=tmp_path / "out", weights_type="int4", scales="search")
    ledger = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["ledger"]
    row = ledger["tensors"]["model.layers.0.mlp.down_proj.weight.codes"]
    assert row["class"] == "quantised"
    assert row["why"] == "4 bits, blocks of 32"
    assert 0.01 < row["quantised"]["error"] < 0.15
    assert ledger["quantised"]["weights"] == 3 * 7 + 1
    nearest = export_onnx(base, output=tmp_path / "nearest", weights_type="int4").ledger
    assert ledger["quantised"]["error"] < sum((e for _, e in nearest.coded), start=nearest.coded[0][1]).relative


def test_a_damaged_code_is_found_by_verify(tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    out = tmp_path / "out"
    export_onnx(base, output=out, weights_type="int4")
    data = bytearray((out / QUANTISED).read_bytes())
    data[len(data) // 3] ^= 0x77
    (out / QUANTISED).write_bytes(data)
    with pytest.raises(ProofError):
        surgery.verify(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_type": "int5"}, "weights_type is one of"),
        ({"weights_type": "int4", "block": 48}, "32, 64 or 128"),
        ({"weights_type": "int4", "embeddings": "int8", "head": "int4"}, "the token table is the head"),
        ({"weights_type": "int4", "embeddings": "int8", "head": "keep"}, "the token table is the head"),
        ({"weights_type": "int4", "scales": "best"}, "scales is one of"),
    ],
)
def test_what_codes_cannot_be_is_refused(options, message, tmp_path):
    base = recipes.build("qwen3", tmp_path / "base")
    with pytest.raises(FitError, match=message):
        export_onnx(base, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_of_codes_need_codes(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="become codes"):
        export_onnx(base, output=tmp_path / "out", block=64)


def test_codes_do_not_go_into_the_folder_of_the_weights(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    with pytest.raises(FitError, match="a folder of its own"):
        export_onnx(base, output=base, weights_type="int4")


@pytest.mark.parametrize("options", [{"weights_type": "int4"}, {"linear": "matmul"}])
@pytest.mark.parametrize("layout", ["transformers.js", "optimum", "triton"])
def test_layouts_of_other_programs_hold_and_verify_them(layout, options, tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    export_onnx(base, output=tmp_path / "out", layout=layout, **options)
    checks = {check.name for check in surgery.verify(tmp_path / "out", against=base).checks}
    assert ("quantised weights" in checks) == ("weights_type" in options)


@pytest.mark.parametrize("name", ["mixtral", "t5", "modernbert_sequence"])
def test_experts_encoder_decoders_and_new_encoders_have_codes_too(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", weights_type="int4", target="portable")
    checks = [
        check for check in surgery.verify(tmp_path / "out", against=base).checks if check.name == "quantised weights"
    ]
    assert len(checks) == 1


def test_what_is_written_is_not_called_copied_and_cannot_be_linked(tmp_path):
    base = recipes.build("llama", tmp_path / "base", **WIDE)
    adapter = trained.train("llama", base, trained.MERGED["lora q v"], tmp_path / "adapter")
    codes = export_onnx(base, output=tmp_path / "out", weights_type="int8")
    assert "quantised.safetensors: written" in str(codes.summary())
    merged = export_onnx(base, [adapter], output=tmp_path / "merged")
    assert "base.safetensors: copied, delta.safetensors: written" in str(merged.summary())
    for options in ({"weights_type": "int4"}, {"linear": "matmul"}):
        with pytest.raises(FitError, match="written anew, and no file of the base has them") as refused:
            export_onnx(base, output=tmp_path / "linked", weights="link", **options)
        assert "embed" in refused.value.hint
