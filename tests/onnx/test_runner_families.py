# SPDX-License-Identifier: Apache-2.0
"""Generations of other families through export and runner, in batches, match transformers; so do encoder scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import surgery
from surgery.onnx.run.opening import open_graph
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import recipes

ROWS = [[5, 17, 3, 88, 42, 9], [29, 8, 77, 50], [7]]
NEW = 10


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen2", {"hidden_size": 64}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("bloom", {}),
        ("lfm2", {}),
        ("qwen2_5_vl", {}),
        ("phi3_longrope_long", {"original_max_position_embeddings": 9}),
    ],
    ids=["qwen2", "gpt2", "gemma2", "bloom", "lfm2", "qwen2_5_vl", "LongRoPE, growing into the long angles"],
)
def test_batches_match_single_rows_in_transformers(tmp_path, name, fields, target):
    folder = recipes.build(name, tmp_path / "base", **fields)
    model = recipes.load(name, folder)
    export_onnx(folder, output=folder, target=target, dtype="fp32")
    longrope = "longrope" in name  # the longest row decides for all of a batch: rows go alone
    for rows in [[row] for row in ROWS] if longrope else [ROWS]:
        found = surgery.run(folder, rows, device="cpu", max_new=NEW, threads=1)
        for row, one in zip(rows, found.texts, strict=True):
            with torch.no_grad():
                wanted = model.generate(
                    torch.tensor([row]),
                    max_new_tokens=NEW,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            assert list(one.tokens) == wanted[0, len(row) :].tolist()[: len(one.tokens)]
            assert len(one.tokens) == NEW or one.reason == "stop"


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["bert_sequence", "roberta_token", "roberta_sentence"])
def test_encoder_scores_match_transformers(tmp_path, name, target):
    folder = recipes.build(name, tmp_path / "base")
    model = recipes.load(name, folder)
    export_onnx(folder, output=folder, target=target, dtype="fp32")
    assert open_graph(folder, device="cpu").contract.kind == "encoder"
    rows = [[5, 17, 9, 88, 42], [29, 8, 77]]
    found = surgery.run(folder, rows, device="cpu", threads=1)
    labels = json.loads((folder / "config.json").read_text()).get("id2label", {})
    for number, row in enumerate(rows):
        with torch.no_grad():
            wanted = model(torch.tensor([row]))
        if "sentence" in name:
            hidden = found.arrays["last_hidden_state"][number, : len(row)]
            assert np.abs(hidden - wanted.last_hidden_state[0].numpy()).max() < 1e-4
            continue
        shares = torch.softmax(wanted.logits.double(), -1).reshape(-1, wanted.logits.shape[-1]).numpy()
        scores = found.texts[number].scores
        assert np.abs(np.array([list(one.values()) for one in scores]) - shares).max() < 1e-5
        assert list(scores[0]) == (list(labels.values()) or [str(n) for n in range(shares.shape[-1])])


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"num_labels": 1}, torch.sigmoid),  # a reranker: a softmax of one is 1 whatever the text
        ({"num_labels": 1, "problem_type": "regression"}, lambda logits: logits),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "single_label_classification"}, lambda logits: logits.softmax(-1)),
    ],
)
def test_scores_follow_the_problem_type(tmp_path, fields, scores):
    base = recipes.build("bert_sequence", tmp_path / "base", **fields)
    export_onnx(base, output=base)
    ids = [5, 17, 3, 88]
    with torch.no_grad():
        expected = scores(recipes.load("bert_sequence", base)(torch.tensor([ids])).logits)[0].tolist()
    assert list(surgery.run(base, [ids], device="cpu").texts[0].scores[0].values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["bert_sequence", "llama"])
@pytest.mark.parametrize("row", [[5, -3], [5, recipes.VOCAB], []])
def test_out_of_range_token_ids_are_refused(tmp_path, name, row):
    """A negative index counts from the end of a table, in silence."""
    base = recipes.build(name, tmp_path / "base")
    export_onnx(base, output=base)
    with pytest.raises(FitError, match="token"):
        surgery.run(base, [[5, 6], row], device="cpu")
