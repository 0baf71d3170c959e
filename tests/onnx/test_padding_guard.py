# SPDX-License-Identifier: Apache-2.0
"""A row padded on the side that a graph cannot take is NaN, never a wrong number; positions as an input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery import export_onnx, run, verify
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support.sessions import Plain, open_session

ROWS = [[5, 17, 33, 9, 61], [8, 7, 12]]
FAMILIES = ["llama", "gpt2", "gemma2", "phi3", "stablelm", "granite"]


def batch(side):
    ids, mask = np.zeros((2, 5), np.int64), np.zeros((2, 5), np.int64)
    for row, tokens in enumerate(ROWS):
        place = slice(5 - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def exported(name, folder, **options):
    wide = {"hidden_size": 64} if name == "llama" else {}
    base = recipes.build(name, folder / "base", **wide)
    return base, export_onnx(base, output=folder / "out", **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_padded_on_the_left_is_nan_and_its_neighbour_right(name, tmp_path):
    base, result = exported(name, tmp_path)
    assert result.contract.padding == "right"
    graph = Plain(tmp_path / "out" / "model.onnx", 2)
    ids, mask = batch("left")
    found = graph.step(ids, mask)
    with torch.no_grad():
        wanted = recipes.load(name, base)(torch.tensor([ROWS[0]])).logits.numpy()
    assert np.abs(found[0] - wanted[0]).max() < 1e-4
    assert np.isnan(found[1]).all()
    found = graph.step(np.array([[7], [7]]), np.concatenate([mask, np.ones((2, 1), np.int64)], 1))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()  # in every later step, too


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "smollm3_windows", "olmo2"])
def test_positions_are_taken_as_they_are_given(name, target, tmp_path):
    base, _ = exported(name, tmp_path, target=target, position_ids=True)
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    assert "position_ids" in {port.name for port in session.get_inputs()}
    ids, shifted = np.array([ROWS[0]]), np.array([[2, 3, 4, 9, 10]])
    for places in (np.arange(5)[None], shifted):
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places}
        feed |= {
            port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
            for port in session.get_inputs()
            if port.name.startswith("past")
        }
        with torch.no_grad():
            model = recipes.load(name, base)
            wanted = model(torch.from_numpy(ids), position_ids=torch.from_numpy(places)).logits.numpy()
        assert np.abs(session.run(["logits"], feed)[0] - wanted).max() < 1e-4


def test_the_runner_and_verify_give_positions(tmp_path):
    base, _ = exported("llama", tmp_path, position_ids=True)
    export_onnx(base, output=tmp_path / "plain")
    given, counted = (run(tmp_path / name, ROWS, max_new=4) for name in ("out", "plain"))
    assert [text.tokens for text in given.texts] == [text.tokens for text in counted.texts]
    assert '"position_ids": "position_ids"' in (tmp_path / "out" / "genai_config.json").read_text()
    assert verify(tmp_path / "out").checks


def test_an_encoder_has_no_positions_to_give(tmp_path):
    base = recipes.build("bert_token", tmp_path)
    with pytest.raises(FitError, match="its positions are counted by the graph"):
        export_onnx(base, output=tmp_path / "out", position_ids=True)
