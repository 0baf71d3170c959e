"""Sampling is what it says, and the shortcut for 16-bit floats changes nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.onnx.run.sampling import Sampling, choose, greedy, probabilities
from surgery.onnx.run.tokenizer import TextStream
from surgery_formats.errors import FitError


@given(arrays(np.float32, (3, 17), elements=st.floats(-60000, 60000, width=32)), st.sampled_from([1.0, -1.0]))
def test_greedy_of_16_bit_floats_is_their_argmax(logits, sign):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        for values in (logits, sign * np.abs(logits), logits / 6e4):
            stored = values.astype(dtype)
            wide = stored.astype(np.float32)
            found = greedy(stored)
            assert np.array_equal(np.take_along_axis(wide, found[:, None], -1)[:, 0], wide.max(-1))
            assert np.array_equal(greedy(wide), wide.argmax(-1))


def test_probabilities_match_transformers():
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32) * 3
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 12, 0.6), (1.0, 0, 0.01)):
        steps = [TemperatureLogitsWarper(temperature)]
        steps += [TopKLogitsWarper(top_k)] if top_k else []
        steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        wanted = torch.softmax(LogitsProcessorList(steps)(None, torch.from_numpy(logits).double()), -1).numpy()
        how = Sampling(temperature, top_k, top_p)
        found = np.stack([probabilities(row, how) for row in logits])
        assert np.abs(found - wanted).max() < 1e-9


def test_draws_follow_the_probabilities_and_the_seed():
    logits = np.log(np.array([[0.5, 0.2, 0.0001, 0.3]])).astype(np.float32)
    how = Sampling(temperature=1.0, top_k=3)
    generator = np.random.default_rng(5)
    drawn = np.array([int(choose(logits, how, generator)[0]) for _ in range(4000)])
    assert np.abs(np.bincount(drawn, minlength=4) / 4000 - [0.5, 0.2, 0, 0.3]).max() < 0.03
    assert 2 not in drawn


def test_invalid_sampling_options_are_refused():
    for values in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(FitError):
            Sampling(**values)
    for how in (Sampling(), Sampling(temperature=1.0)):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(FitError, match="not finite"):
                choose(np.array([[0.0, bad]], np.float16), how, np.random.default_rng(0))


@given(st.text(min_size=1, max_size=12), st.integers(1, 3))
def test_streamed_text_is_the_whole_text_and_never_half_a_character(text, width):
    """A tokenizer of bytes, the worst case: every character may be spread over several tokens."""
    raw = text.encode(errors="replace")
    tokens = [raw[at : at + width] for at in range(0, len(raw), width)]

    def decode(ids):
        return b"".join(tokens[one] for one in ids).decode(errors="replace")

    stream = TextStream(decode)
    pieces = [stream.push(number) for number in range(len(tokens))]
    assert "".join(pieces) + stream.close() == raw.decode()
    assert (
        all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in raw.decode()
    )


@given(st.text(st.sampled_from("a \u00e9\u4f60\u597d\U0001f600"), min_size=1, max_size=12), st.integers(0, 3))
def test_streaming_survives_decoders_that_show_a_whole_run_of_bytes_as_broken(text, broken):
    """ByteFallback (Llama 2, Gemma): a run of byte tokens decodes as a whole, or is broken byte by byte."""
    raw = text.encode() + b"\xff" * broken

    def decode(ids):
        run = bytes(raw[one] for one in ids)
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    stream = TextStream(decode)
    pieces = [stream.push(number) for number in range(len(raw))]
    if not broken:
        assert "".join(pieces) + stream.close() == text


def test_streaming_does_not_wait_for_a_character_that_never_comes():
    stream = TextStream(lambda ids: "\N{REPLACEMENT CHARACTER}" * len(ids))
    pieces = [stream.push(number) for number in range(200)]
    assert all(any(pieces[at : at + 5]) for at in range(195))
    assert len("".join(pieces) + stream.close()) == 200
