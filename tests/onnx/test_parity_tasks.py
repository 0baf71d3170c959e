# SPDX-License-Identifier: Apache-2.0
"""Heads for every task, on every target, compute what transformers computes, and the reference does too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import surgery
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS
from surgery.reference import forward, open_reference
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes
from tests.support.sessions import open_session

LIMIT = 1e-4
LONG, SHORT = [5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50]


def padded(side: str, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the two rows."""
    fill = [pad] * (len(LONG) - len(SHORT))
    row = [*SHORT, *fill] if side == "right" else [*fill, *SHORT]
    ones = [1] * len(SHORT)
    mask = [*ones, *([0] * len(fill))] if side == "right" else [*([0] * len(fill)), *ones]
    return np.array([LONG, row]), np.array([[1] * len(LONG), mask])


def alone(model, row, types):
    """Outputs of transformers for one row without padding."""
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    if types:
        inputs["token_type_ids"] = torch.arange(len(row))[None] % 2
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: value[None] for name, value in inputs.items()}
    with torch.no_grad():
        found = model(**inputs)
    return {name: found[name].numpy() for name in found if name not in ("loss", "past_key_values")}


@pytest.mark.parametrize("name", recipes.HEADS)
def test_outputs_match_transformers_and_the_reference(tmp_path, name):
    folder = recipes.build(name, tmp_path)
    component, model = open_checkpoint(folder).main, recipes.load(name, folder)
    reference, pad = open_reference(component), model.config.pad_token_id or 0
    choices, typed = (
        "choices" in name,
        not name.startswith(("distilbert", "mpnet", "deberta", "modern", "jina")) and reference.model.kind == "encoder",
    )
    wanted = [alone(model, row, typed) for row in (LONG, SHORT)]
    for target in TARGETS:
        built = build(component, GraphOptions(TARGETS[target], DType.F32))
        (folder / "model.onnx").write_bytes(built.graphs["model.onnx"].data)
        session, contract = open_session(folder / "model.onnx")
        assert (contract.kind, contract.cache, list(built.graphs)) == ("encoder", "none", ["model.onnx"])
        sides = ("right", "left") if contract.padding == "any" else (contract.padding,)
        by_mask = reference.model.kind == "decoder" or (
            name.startswith(("roberta", "mpnet", "deberta", "modern", "jina")) and (not choices or "mean" in name)
        )  # how positions are counted
        assert sides == (("right", "left") if by_mask else ("right",))
        for side in sides:
            ids, mask = padded(side, pad)
            feed = {"input_ids": ids, "attention_mask": mask}
            if "token_type_ids" in {port.name for port in session.get_inputs()}:
                feed["token_type_ids"] = np.maximum(mask.cumsum(1) - 1, 0) % 2
            types = torch.from_numpy(feed["token_type_ids"]) if "token_type_ids" in feed else None
            outputs = [port.name for port in session.get_outputs()]
            given = {key: value[None] for key, value in feed.items()} if choices else feed
            found = dict(zip(outputs, session.run(None, given), strict=True))
            ours = forward(reference, torch.from_numpy(ids), real=torch.from_numpy(mask), types=types).outputs
            assert set(found) == set(ours) == set(wanted[0])
            for output, value in found.items():
                rows = value.T if choices else value
                for row, expected in enumerate(wanted):
                    whole = rows[row].ndim == 0 or rows.shape[1] != ids.shape[1]
                    where = slice(None) if whole else mask[row].astype(bool)
                    for one in (rows[row], ours[output][row].numpy()):
                        assert np.abs(one[where] - expected[output][0]).max() <= LIMIT


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("bert_sequence", "logits"),
        ("bert_sentence", "pooler_output"),
        ("roberta_sequence", "logits"),
        ("distilbert_choices", "logits"),
    ],
)
def test_a_row_whose_first_token_is_padding_has_no_first_token(tmp_path, name, output):
    folder = recipes.build(name, tmp_path)
    (ids, mask), (left, left_mask) = padded("right", 0), padded("left", 0)
    for target in TARGETS:
        built = build(open_checkpoint(folder).main, GraphOptions(TARGETS[target], DType.F32))
        (folder / "model.onnx").write_bytes(built.graphs["model.onnx"].data)
        session, _ = open_session(folder / "model.onnx")

        def run(tokens, ones, session=session):
            feed = {"input_ids": tokens, "attention_mask": ones, "token_type_ids": np.zeros_like(tokens)}
            feed = {port.name: feed[port.name] for port in session.get_inputs()}
            if "choices" in name:
                return session.run([output], {key: value[None] for key, value in feed.items()})[0].T
            return session.run([output], feed)[0]

        right, wrong = run(ids, mask), run(left, left_mask)
        assert np.isfinite(right).all()
        assert np.isnan(wrong[1]).all()
        assert np.abs(wrong[0] - right[0]).max() <= LIMIT


def test_without_a_padding_token_a_classifier_takes_one_row(tmp_path):
    folder = recipes.build("llama_classifier", tmp_path, pad_token_id=None)
    component, model = open_checkpoint(folder).main, recipes.load("llama_classifier", folder)
    built = build(component, GraphOptions(TARGETS["cpu"], DType.F32))
    (folder / "model.onnx").write_bytes(built.graphs["model.onnx"].data)
    session, _ = open_session(folder / "model.onnx")
    (found,) = session.run(None, {"input_ids": np.array([LONG]), "attention_mask": np.ones((1, len(LONG)), np.int64)})
    assert np.abs(found - alone(model, LONG, False)["logits"]).max() <= LIMIT
    ids, mask = padded("right", 0)
    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        session.run(None, {"input_ids": ids, "attention_mask": mask})


def test_the_runner_takes_rows_without_a_padding_token_one_by_one(tmp_path):
    folder = recipes.build("gpt2_classifier", tmp_path, pad_token_id=None)
    surgery.export_onnx(folder, output=folder)
    model = recipes.load("gpt2_classifier", folder)
    found = surgery.run(folder, [LONG, SHORT], device="cpu").arrays["logits"]
    for row, logits in zip((LONG, SHORT), found, strict=True):
        assert np.abs(logits - alone(model, row, False)["logits"][0]).max() <= LIMIT
