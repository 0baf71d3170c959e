# SPDX-License-Identifier: Apache-2.0
"""Small parameters that swapped adapters hold in full: five classifiers over one graph, each with its labels, as in PEFT."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats.errors import FitError, ProofError
from tests.oracles import peft_oracle, recipes
from tests.support import trained
from tests.support.onnx_files import write_adapter_file
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
LABELS = {"a": 3, "b": 3, "c": 5, "d": 2, "e": 1}
NAMES = {"0": "up", "1": "down", "2": "left", "3": "right", "4": "still"}
TOLERANCE = 1e-4


def classifier(base, folder, labels, seed, **fields):
    """A random LoRA classifier with a head and perhaps biases of its own; its logits by PEFT."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"], **fields)
    with peft_oracle.quiet():
        model = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=labels, ignore_mismatched_sizes=True
        )
        wrapped = peft.get_peft_model(model, config)
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(seed))
        wrapped.save_pretrained(folder)
    with torch.no_grad():
        tokens = torch.from_numpy(IDS)
        return wrapped.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()


@pytest.fixture(scope="module", params=["bert_sequence", "bert_sentence"])
def five(request, tmp_path_factory):
    """A base with a head or without, five classifiers for it, and their logits."""
    folder = tmp_path_factory.mktemp(request.param)
    base = recipes.build(request.param, folder / "base")
    expected = {
        name: classifier(base, folder / name, labels, seed, bias="all" if name == "b" else "none")
        for seed, (name, labels) in enumerate(LABELS.items())
    }
    (folder / "c" / "config.json").write_text(json.dumps({"id2label": NAMES}))
    return base, [folder / name for name in LABELS], expected


def logits(session, file=None):
    options = onnxruntime.RunOptions()
    loaded = onnxruntime.LoraAdapter()
    if file is not None:
        loaded.Load(str(file))
        options.add_active_adapter(loaded)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
    return session.run(["logits"], feed, options)[0]


@pytest.mark.parametrize("target", ["cpu", "portable", "cuda"])
def test_five_classifiers_in_one_session_are_pefts(five, target, tmp_path):
    base, adapters, expected = five
    result = surgery.export_onnx(base, swap=adapters, output=tmp_path / "out", target=target, dtype="fp32")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    before = logits(session)
    for name, wanted in expected.items():
        found = logits(session, tmp_path / "out" / "adapters" / f"{name}.onnx_adapter")
        assert found.shape == wanted.shape == (1, LABELS[name])
        assert np.abs(found - wanted).max() <= TOLERANCE
        assert before.shape != wanted.shape or np.abs(before - wanted).max() > 0.01
    assert np.array_equal(logits(session), before)  # and the base again
    entries = {entry["name"]: entry for entry in result.contract.adapters}
    assert entries["c"]["id2label"] == NAMES
    assert len(entries["d"]["id2label"]) == 2
    assert surgery.verify(tmp_path / "out", against=base).difference <= TOLERANCE


def test_without_an_adapter_the_graph_is_the_base(tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    classifier(base, tmp_path / "a", 2, 1)
    surgery.export_onnx(base, output=tmp_path / "plain", target="cpu")
    surgery.export_onnx(base, swap=tmp_path / "a", output=tmp_path / "out", target="cpu")
    sessions = [
        onnxruntime.InferenceSession(str(tmp_path / name / "model.onnx"), providers=["CPUExecutionProvider"])
        for name in ("plain", "out")
    ]
    assert np.abs(np.subtract(*map(logits, sessions))).max() <= 1e-5  # q, k and v are not packed beside a slot


def test_run_shows_the_labels_of_the_adapter(five, tmp_path):
    base, adapters, expected = five
    surgery.export_onnx(base, swap=adapters, output=tmp_path / "out")
    files = tmp_path / "out" / "adapters"
    found = surgery.run(tmp_path / "out", IDS[0].tolist(), adapters=files / "c.onnx_adapter")
    wanted = np.exp(expected["c"][0]) / np.exp(expected["c"][0]).sum()
    assert found.texts[0].scores[0] == pytest.approx(dict(zip(NAMES.values(), wanted, strict=True)), abs=1e-4)
    assert max(NAMES.values(), key=lambda name: found.texts[0].scores[0][name]) in str(found.summary())
    assert surgery.run(tmp_path / "out", IDS[0].tolist(), adapters="c").texts == found.texts
    single = surgery.run(tmp_path / "out", IDS[0].tolist(), adapters=files / "e.onnx_adapter").texts[0].scores[0]
    assert list(single.values()) == pytest.approx([1 / (1 + np.exp(-expected["e"][0, 0]))], abs=1e-4)
    with pytest.raises(FitError, match="two adapters fill this input"):
        surgery.run(tmp_path / "out", IDS[0].tolist(), adapters=[files / "a.onnx_adapter", files / "d.onnx_adapter"])


def test_a_head_whose_parts_disagree_is_refused(five, tmp_path):
    base, adapters, _ = five
    surgery.export_onnx(base, swap=adapters, output=tmp_path / "out")
    arrays = read_adapter_file(tmp_path / "out" / "adapters" / "c.onnx_adapter")
    write_adapter_file(tmp_path / "x.onnx_adapter", arrays | {"classifier.bias": np.zeros(4, np.float32)})
    with pytest.raises(FitError, match="has the shape"):
        surgery.run(tmp_path / "out", IDS[0].tolist(), adapters=tmp_path / "x.onnx_adapter")
    wide = {"classifier.weight": np.zeros((5, 7), np.float32)}
    write_adapter_file(tmp_path / "y.onnx_adapter", arrays | wide)
    with pytest.raises(FitError, match="has the shape"):
        surgery.run(tmp_path / "out", IDS[0].tolist(), adapters=tmp_path / "y.onnx_adapter")


def test_a_folder_of_a_base_without_a_head_keeps_its_configuration(tmp_path):
    base = recipes.build("bert_sentence", tmp_path / "base")
    classifier(base, tmp_path / "a", 2, 1)
    with pytest.raises(FitError, match="another configuration"):
        surgery.export_onnx(base, swap=tmp_path / "a", output=base)
    assert not (base / "model.onnx").exists()


def test_a_wrong_default_fails_the_proof(tmp_path):
    import onnx

    base = recipes.build("bert_sequence", tmp_path / "base")
    classifier(base, tmp_path / "a", 2, 1)
    surgery.export_onnx(base, swap=tmp_path / "a", output=tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "classifier.bias"]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), bias.name))
    path.write_bytes(model.SerializeToString())
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["layer norms", "lora_bias", "modules_to_save norm"])
@pytest.mark.parametrize("family", ["llama", "gemma"])  # whose norms are 1 + g, in float32
def test_norms_and_biases_are_swapped(family, name, tmp_path):
    base = recipes.build(family, tmp_path / "base")
    adapter = trained.train(family, base, trained.MERGED[name], tmp_path / "a")
    expected = trained.logits(trained.attached(family, base, (adapter, 1.0)), IDS)
    plain = trained.logits(recipes.load(family, base), IDS)
    assert np.abs(plain - expected).max() > 0.01
    for target in ("cpu", "portable", "cuda"):
        out = tmp_path / target
        surgery.export_onnx(base, swap=adapter, output=out, target=target, dtype="fp32")
        runner = Plain(out / "model.onnx")
        options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        loaded.Load(str(out / "adapters" / "a.onnx_adapter"))
        options.add_active_adapter(loaded)
        feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **runner.past}
        assert np.abs(runner.session.run(["logits"], feed, options)[0] - expected).max() <= TOLERANCE
        assert np.abs(runner.session.run(["logits"], feed)[0] - plain).max() <= TOLERANCE
        assert surgery.verify(out).difference <= TOLERANCE


def test_a_classifier_in_an_adapter_file_goes_to_peft_and_back(tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    expected = classifier(base, tmp_path / "a", 5, 1)
    surgery.export_onnx(base, swap=tmp_path / "a", output=tmp_path / "out")
    file = tmp_path / "out" / "adapters" / "a.onnx_adapter"
    surgery.convert(file, "peft", output=tmp_path / "peft")
    with peft_oracle.quiet():
        model = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=5, ignore_mismatched_sizes=True
        )
        attached = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        tokens = torch.from_numpy(IDS)
        found = attached(tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()
    assert np.abs(found - expected).max() <= TOLERANCE
    surgery.convert(
        tmp_path / "a", "onnx-adapter", output=tmp_path / "new.onnx_adapter", graph=tmp_path / "out" / "model.onnx"
    )
    before, after = read_adapter_file(file), read_adapter_file(tmp_path / "new.onnx_adapter")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_modules_in_an_adapter_file_are_named(tmp_path):
    arrays = {"model.layers.0.output_adapters.adapters.up.bias": np.ones(4, np.float32)}
    write_adapter_file(tmp_path / "x.onnx_adapter", arrays)
    with pytest.raises(FitError, match="of a module that is inserted into a graph"):
        surgery.convert(tmp_path / "x.onnx_adapter", "peft", output=tmp_path / "peft")
