# SPDX-License-Identifier: Apache-2.0
"""The error of a graph's logits on a text is that of onnxruntime's to transformers', computed apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Sum:\n    total = 0\n"


def apart(found, expected):
    """Relative error, agreement and divergence of logits ``(n, V)``, by numpy."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (expected, found))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return error, (found.argmax(-1) == expected.argmax(-1)).mean(), (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_the_error_on_a_text_is_that_of_the_two_models(kind, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    export_onnx("examples/base", output=tmp_path / "out", weights_type=kind)
    told = surgery.verify(tmp_path / "out", against="examples/base", text=str(tmp_path / "text"))
    ids = AutoTokenizer.from_pretrained("examples/base")(TEXT)["input_ids"]
    rows = np.array([ids])
    with torch.no_grad():
        expected = recipes.load("llama", "examples/base")(torch.from_numpy(rows)).logits.numpy()
    found = Plain(tmp_path / "out" / "model.onnx").step(rows, np.ones_like(rows))
    error, agreement, divergence = apart(found[0], expected[0])
    assert told.logits.count == len(ids)
    assert told.logits.error == pytest.approx(error, rel=1e-3)
    assert told.logits.agreement == pytest.approx(agreement)
    assert told.logits.divergence == pytest.approx(divergence, rel=1e-2)
    assert error > 0.02
    assert told.as_json()["logits"]["count"] == len(ids)


def test_a_graph_of_weights_as_they_are_has_none(tmp_path):
    base = recipes.build("llama", tmp_path / "base", hidden_size=64)
    export_onnx(base, output=tmp_path / "out")
    found = surgery.verify(tmp_path / "out", against=base, text="words").logits
    assert found.error < 1e-5
    assert found.agreement == 1.0


def test_a_merge_is_compared_with_the_merged_model(tmp_path):
    base = recipes.build("llama", tmp_path / "base", hidden_size=64)
    adapter = trained.train("llama", base, trained.MERGED["lora q v"], tmp_path / "adapter")
    export_onnx(base, [adapter], output=tmp_path / "out", weights_type="int8")
    found = surgery.verify(tmp_path / "out", against=base, adapters=[adapter], text="words").logits
    ids = np.arange(20)[None]
    merged, plain = (trained.logits(trained.attached("llama", base, (adapter, weight)), ids) for weight in (1.0, 0.0))
    assert 0 < found.error < 0.3 * np.linalg.norm(merged - plain) / np.linalg.norm(merged)


def test_a_classifier_has_logits_for_a_row(tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", weights_type="int8")
    found = surgery.verify(tmp_path / "out", against=base, text="words").logits
    assert 1 < found.count <= 8
    assert 0 < found.error < 0.1


def test_what_has_no_logits_of_a_text_is_refused_before_anything_is_proved(tmp_path, monkeypatch):
    base = recipes.build("t5", tmp_path / "base")
    export_onnx(base, output=tmp_path / "out")
    monkeypatch.setattr("surgery.verification.graph_proof.prove_graphs", None)
    with pytest.raises(FitError, match="of decoders, and of encoders of texts"):
        surgery.verify(tmp_path / "out", against=base, text="words")
    with pytest.raises(FitError, match="a text was named without a base"):
        surgery.verify(tmp_path / "out", text="words")
