# SPDX-License-Identifier: Apache-2.0
"""A prefill computes the logits that are read, and no others."""

from __future__ import annotations

import json

import numpy as np
import pytest

import surgery
from surgery.onnx.run.opening import open_graph
from surgery.onnx.run.prepare import prepare_decoder
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support.kit import spawn
from tests.support.sessions import open_session

NAME = "num_logits_to_keep"
ROWS = [[5, 17, 3, 88, 42, 9, 61], [29, 8, 77], [50]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("gemma2", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("target", ["cpu", "portable", "cuda"])
def test_logits_are_those_of_the_last_positions(base, tmp_path, target):
    surgery.export_onnx(base, output=tmp_path / "out", target=target, dtype="fp32", logits="input")
    session, contract = open_session(tmp_path / "out" / "model.onnx")
    ids = np.array([ROWS[0], ROWS[0][::-1]])
    past = {
        port.name: np.zeros((2, contract.kv_heads, 0, contract.head_dim), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past")
    }
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
    (every,) = session.run(["logits"], feed)
    for number in (0, 1, 3, 7):
        (found,) = session.run(["logits"], {**feed, NAME: np.array(number)})
        assert np.array_equal(found, every[:, -number:])
    assert NAME not in {port.name for port in session.get_inputs()}  # clients that do not know it are not asked for it
    surgery.verify(tmp_path / "out", against=base)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_runner_gets_the_same_with_fewer(base, tmp_path, target):
    """Rows of different length, padded: of each the logits after its own last token."""
    outputs = []
    for logits in ("all", "auto"):
        surgery.export_onnx(base, output=tmp_path / logits, target=target, logits=logits)
        opened = open_graph(tmp_path / logits, device="cpu")
        decoder, _ = prepare_decoder(opened, batch=len(ROWS), max_length=16)
        outputs.append(decoder.prefill(ROWS))
        outputs.append(decoder.step([1, 2, 3]))
        assert (NAME in opened.optional) == (logits == "auto")
    assert np.array_equal(outputs[0], outputs[2])
    assert np.array_equal(outputs[1], outputs[3])


def test_by_default_cuda_graphs_have_no_such_input(base, tmp_path):
    for target in ("cpu", "portable", "cuda"):
        surgery.export_onnx(base, output=tmp_path / target, target=target, dtype="fp32")
        session, _ = open_session(tmp_path / target / "model.onnx")
        assert (NAME in {port.name for port in session.get_overridable_initializers()}) == (target != "cuda")


def test_a_choice_that_is_none_is_refused(base, tmp_path):
    with pytest.raises(FitError, match="auto, all or input"):
        surgery.export_onnx(base, output=tmp_path / "out", logits="some")
    classifier = recipes.build("llama_classifier", tmp_path / "classifier")
    with pytest.raises(FitError, match="generates"):
        surgery.export_onnx(classifier, output=tmp_path / "out", logits="input")


def test_bench_shows_the_memory_that_it_saves(tmp_path):
    base = recipes.build("llama", tmp_path / "base", vocab_size=20_000, max_position_embeddings=512)
    for logits in ("all", "input"):
        surgery.export_onnx(base, output=tmp_path / logits, logits=logits)
    words = ("--prompt-length", "400", "--new-tokens", "1", "--device", "cpu", "--threads", "1", "--json")
    # a process of its own: this one would use memory again that it had before
    done = spawn("bench", tmp_path / "all", "--against", tmp_path / "input", *words)
    every, last = (side["peak_nbytes"] for side in json.loads(done.stdout)["result"]["sides"])
    assert every - last > 400 * 20_000 * 4 * 0.9
