# SPDX-License-Identifier: Apache-2.0
"""A graph with merged adapters computes what PEFT computes, for every kind; the base's file is unchanged."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file

import surgery
from surgery.onnx.export.merged import DELTA
from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.merge import merge
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError
from tests.oracles import recipes
from tests.support import trained
from tests.support.kit import environment
from tests.support.sessions import Plain, feed_encoder, open_session

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", hidden_size=64)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained.train("llama", base, config, folder / name) for name, config in trained.MERGED.items()}


def found(folder, ids=IDS):
    return Plain(folder / "model.onnx").step(ids, np.ones_like(ids))


def initializers(folder):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {
        one.name: {item.key: item.value for item in one.external_data}
        for one in model.graph.initializer
        if one.external_data
    }


CASES = [(name, "cpu") for name in trained.MERGED] + [
    (name, target)
    for name in ("lora all-linear", "dora", "lora_bias", "lora embedding", "ia3")
    for target in ("cuda", "portable")
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_every_merged_kind_gives_the_logits_of_peft(base, adapters, name, target, tmp_path):
    export_onnx(base, [adapters[name]], output=tmp_path / "out", target=target, dtype="fp32")
    expected = trained.logits(trained.attached("llama", base, (adapters[name], 1.0)), IDS)
    plain = trained.logits(recipes.load("llama", base), IDS)
    assert np.abs(expected - plain).max() > 0.05  # the adapter does something
    assert np.abs(found(tmp_path / "out") - expected).max() <= TOLERANCE
    assert (tmp_path / "out" / "base.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["delta", "full"])
def test_several_weighted_adapters_add_up_as_in_a_merge(base, adapters, layout, tmp_path):
    pair = [(adapters["lora all-linear"], 0.7), (adapters["rslora"], -0.4)]
    result = export_onnx(base, merge=pair, output=tmp_path / "out", merge_to=layout)
    expected = trained.logits(trained.attached("llama", base, *pair), IDS)
    assert np.abs(found(tmp_path / "out") - expected).max() <= TOLERANCE
    merge(base, pair, output=tmp_path / "merged")
    merged, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    written = load_file(tmp_path / "out" / (DELTA if layout == "delta" else "model.safetensors"))
    changed = {name for name, value in merged.items() if not value.equal(before[name])}
    assert set(written) == (changed if layout == "delta" else set(merged))
    assert all(value.equal(merged[name]) for name, value in written.items())  # bit for bit the merge's
    assert result.ledger is not None
    assert [one["weight"] for one in result.contract.adapters] == [0.7, -0.4]


def test_the_ledger_accounts_for_every_tensor_of_the_base(base, adapters, tmp_path):
    result = export_onnx(base, [adapters["lora q v"]], output=tmp_path / "out")
    ledger = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["ledger"]
    assert ledger == json.loads(json.dumps(result.ledger.as_json()))
    stored = set(load_file(base / "model.safetensors"))
    assert set(ledger["tensors"]) | set(ledger["without_output"]) == stored
    assert {one["class"] for one in ledger["tensors"].values()} == {"updated"}
    assert {one["class"] for one in ledger["without_output"].values()} == {"referenced"}


def test_an_export_into_the_base_folder_only_adds_files(base, adapters, tmp_path):
    folder = recipes.build("llama", tmp_path / "base", hidden_size=64)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    result = export_onnx(folder, [adapters["lora q v"]], output=folder)
    assert result.weights == "reference"
    assert {name: ((folder / name).stat().st_ino, (folder / name).read_bytes()) for name in before} == before
    added = {path.name for path in folder.iterdir()} - set(before)
    assert added == {DELTA, "surgery_export.json", "model.onnx", "prefill.onnx", "genai_config.json"}
    assert json.loads((folder / "surgery_export.json").read_text())["ledger"] == json.loads(
        json.dumps(result.ledger.as_json())
    )
    expected = trained.logits(trained.attached("llama", folder, (adapters["lora q v"], 1.0)), IDS)
    assert np.abs(found(folder) - expected).max() <= TOLERANCE
    with pytest.raises(OutputExistsError):
        export_onnx(folder, [adapters["lora q v"]], output=folder)


def test_a_late_failure_leaves_nothing_in_the_base_folder(base, adapters, tmp_path, monkeypatch):
    folder = recipes.build("llama", tmp_path / "base", hidden_size=64)
    before = {path.name for path in folder.iterdir()}

    def broken(*_):
        raise FitError("late")

    monkeypatch.setattr("surgery.onnx.export.assemble.Assembly.files", broken)
    with pytest.raises(FitError, match="late"):
        export_onnx(folder, [adapters["lora q v"]], output=folder)
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("moves", [0, 2, 4])
def test_leftovers_of_a_killed_export_are_completed(base, adapters, tmp_path, moves):
    """The graph is the last file to get its name: until then the same command goes on, and any other is refused."""
    folder = recipes.build("llama", tmp_path / "base", hidden_size=64)
    before = {path.name for path in folder.iterdir()}
    script = f"""
import os
from surgery.onnx.export import place
from surgery.verbs.export_onnx import export_onnx
real, left = place.rename_new, [{moves}]
def killed(*names):
    if not left[0]:
        os._exit(9)
    left[0] -= 1
    real(*names)
place.rename_new = killed
export_onnx({str(folder)!r}, [{str(adapters["lora q v"])!r}], output={str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", script], env=environment(), check=False).returncode == 9
    assert not (folder / "model.onnx").exists()
    if moves > 1:  # the account of another export cannot be this one's
        with pytest.raises(OutputExistsError):
            export_onnx(folder, [adapters["lora all-linear"]], output=folder)
    export_onnx(folder, [adapters["lora q v"]], output=folder)
    left = {path.name for path in folder.iterdir()} - before
    assert left == {DELTA, "surgery_export.json", "model.onnx", "prefill.onnx", "genai_config.json"}
    surgery.verify(folder)


def test_changed_matrices_that_are_read_together_are_adjacent(base, adapters, tmp_path):
    export_onnx(base, [adapters["lora all-linear"]], output=tmp_path / "out")
    joint = {name for name, entry in initializers(tmp_path / "out").items() if entry["location"] == DELTA}
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight" in joint
    assert "model.layers.0.mlp.gate_proj+up_proj.weight" in joint


def test_a_packed_base_stays_packed_if_only_a_part_changes(base, adapters, tmp_path):
    merge(base, adapters["lora all-linear"], output=tmp_path / "packed", layout="packed")
    export_onnx(tmp_path / "packed", [adapters["lora q v"]], output=tmp_path / "out")
    joint = initializers(tmp_path / "out")
    assert joint["model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"]["location"] == DELTA
    assert joint["model.layers.0.mlp.gate_proj+up_proj.weight"]["location"] == "base.safetensors"
    expected = trained.logits(trained.attached("llama", tmp_path / "packed", (adapters["lora q v"], 1.0)), IDS)
    assert np.abs(found(tmp_path / "out") - expected).max() <= TOLERANCE


@pytest.mark.parametrize("layout", ["delta", "full"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_untied_as_in_a_merge(module, layout, tmp_path):
    base = recipes.build("qwen2", tmp_path / "base", tie_word_embeddings=True)
    adapter = trained.train("qwen2", base, trained._lora(target_modules=["q_proj", module]), tmp_path / "adapter")
    export_onnx(base, [adapter], output=tmp_path / "out", merge_to=layout)
    expected = trained.logits(trained.attached("qwen2", base, (adapter, 1.0)), IDS)
    assert np.abs(found(tmp_path / "out") - expected).max() <= TOLERANCE
    if layout == "delta":
        changed = {name for name, entry in initializers(tmp_path / "out").items() if entry["location"] == DELTA}
        other = {"embed_tokens": "lm_head.weight", "lm_head": "model.embed_tokens.weight"}[module]
        assert not any(name.startswith(other) for name in changed)  # the side that stays is the base's bytes
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "gemma2"])
def test_fused_and_transposed_weights_are_merged(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    targets = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj", "gate_up_proj"]}
    adapter = trained.train(
        name, base, trained._lora(target_modules=targets.get(name, trained.ALL)), tmp_path / "adapter"
    )
    export_onnx(base, [adapter], output=tmp_path / "out")
    expected = trained.logits(trained.attached(name, base, (adapter, 1.0)), IDS)
    assert np.abs(found(tmp_path / "out") - expected).max() <= TOLERANCE


def test_an_encoder_gets_the_classifier_that_was_trained_beside_the_adapter(tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    config = ("LoraConfig", {"r": 3, "target_modules": ["query", "value"]})
    adapter = trained.train("bert_sequence", base, config, tmp_path / "adapter", task="SEQ_CLS")
    export_onnx(base, [adapter], output=tmp_path / "out")
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    import torch

    model = trained.attached("bert_sequence", base, (adapter, 1.0))
    types = torch.arange(IDS.size).reshape(IDS.shape) % 2
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(IDS), token_type_ids=types).logits.numpy()
    assert np.abs(feed_encoder(session, IDS, np.ones_like(IDS))["logits"] - expected).max() <= TOLERANCE


def test_a_merge_without_effect_is_refused(base, adapters, tmp_path):
    with pytest.raises(NothingChangedError):
        export_onnx(base, merge=[(adapters["lora all-linear"], 0.0)], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_new_bias_goes_into_a_graph_but_not_into_a_checkpoint(base, adapters, tmp_path):
    pair = [(adapters["lora_bias"], 0.5), (adapters["lora all-linear"], 1.0), (adapters["lora_bias"], 0.25)]
    export_onnx(base, merge=pair, output=tmp_path / "out")
    trained_bias = load_file(adapters["lora_bias"] / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    expected = 0.75 * 6 / 4 * trained_bias[f"base_model.model.{name}.lora_B.bias"]
    assert load_file(tmp_path / "out" / DELTA)[f"{name}.bias"].allclose(expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(FitError, match="but not a checkpoint"):
        export_onnx(base, merge=pair, output=tmp_path / "full", merge_to="full")
    with pytest.raises(FitError, match="no parameter"):
        merge(base, adapters["lora_bias"], output=tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge_to": "full", "weights": "link"}, "writes its weights itself"),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_written(base, adapters, options, words, tmp_path):
    with pytest.raises(FitError, match=words):
        export_onnx(base, [adapters["lora all-linear"]], output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_virtual_tokens_is_no_prefix(base, adapters, tmp_path):
    with pytest.raises(FitError, match="has no virtual tokens"):
        export_onnx(base, prefix=adapters["lora all-linear"], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_another_base_is_refused(base, adapters, tmp_path):
    other = recipes.build("llama", tmp_path / "other", hidden_size=32)
    with pytest.raises(FitError, match="made for a weight"):
        export_onnx(other, [adapters["lora all-linear"]], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
