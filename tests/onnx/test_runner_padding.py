"""The side of padding is the contract's, and the other one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.onnx.run.opening import open_graph
from surgery.onnx.run.rows import pad, unpad
from surgery_formats.errors import FitError
from tests.support.graphs import HEAD_DIM, KV_HEADS, LAYERS, decoder, plain_logits


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_unpadding_is_the_inverse_of_padding(rows, side):
    assert unpad(*pad(rows, side), side) == rows
    assert unpad(*pad(rows, side), "any") == rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_on_the_wrong_side_is_refused(side):
    other = {"left": "right", "right": "left"}[side]
    ids, mask = pad([[1, 2, 3], [4]], other)
    with pytest.raises(FitError, match=f"padded on the {other}, but this graph takes padding on the {side}"):
        unpad(ids, mask, side)


def test_a_mask_with_holes_or_other_numbers_is_refused():
    ids = np.ones((1, 4), np.int64)
    for mask in ([[1, 0, 1, 1]], [[2, 0, 0, 0]], [[0, 1, 0, 1]]):
        with pytest.raises(FitError, match="not at one end"):
            unpad(ids, np.array(mask), "right")


@pytest.mark.parametrize(("attention", "wrong"), [("grouped", "left"), ("plain", "right")])
def test_the_wrong_padding_side_would_change_logits(tmp_path, attention, wrong):
    """Run against its contract a graph is wrong without a word: this is what the runner stands before."""
    path = decoder(tmp_path, attention)
    session = open_graph(path, device="cpu").session
    rows, token = [[3, 17, 9, 4, 30], [8, 2]], 11
    ids, mask = pad(rows, wrong)
    empty = np.zeros((2, KV_HEADS, 0, HEAD_DIM), np.float32)
    names = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    first = session.run(None, {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(names, empty)})
    past = dict(zip(names, first[1:], strict=True))
    marks = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    second = session.run(["logits"], {"input_ids": np.full((2, 1), token), "attention_mask": marks, **past})[0]
    assert np.abs(second[1, -1] - plain_logits(path, [*rows[1], token])[-1]).max() > 0.05
