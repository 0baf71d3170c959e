# SPDX-License-Identifier: Apache-2.0
"""Every decoder family, on every target, computes what transformers computes: prefill, decode steps, greedy tokens, padded batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.onnx.build import Options, build
from surgery.onnx.target import TARGETS, twin
from surgery_formats.checkpoint import open_checkpoint
from surgery_formats.dtypes import DType
from tests.onnx import zoo
from tests.onnx.sessions import Plain

TOLERANCE = 1e-4
PROMPT = np.array([[5, 17, 3, 88, 42, 9, 61]])
SHORT = np.array([[29, 8, 77, 50]])
STEPS = 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models by name, written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = zoo.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def exported(folder, target):
    """The graphs of `folder` for `target`, in float32, beside its weights."""
    built = build(open_checkpoint(folder).main, Options(twin(TARGETS[target]), DType.F32))
    for name, model in built.graphs.items():
        (folder / f"{target}-{name}").write_bytes(model.SerializeToString())
    return folder / f"{target}-model.onnx", folder / f"{target}-prefill.onnx", built


def reference(name, ids):
    """Greedy tokens and the logits they were chosen from, by transformers, one row at a time and without a cache."""
    tokens, logits = torch.from_numpy(ids), []
    with torch.no_grad():
        for _ in range(STEPS + 1):
            logits.append(zoo.load(name)(tokens).logits[0].numpy())
            tokens = torch.cat([tokens, torch.tensor([[int(logits[-1][-1].argmax())]])], 1)
    return tokens[0, ids.shape[1] :].tolist(), logits


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_prefill_and_decode_steps_are_those_of_transformers(saved, name, target):
    tokens, logits = reference(name, PROMPT)
    path, _, built = exported(saved(name), target)
    graph = Plain(path)
    mask = np.ones((1, PROMPT.shape[1]), np.int64)
    found = graph.step(PROMPT, mask)
    assert np.abs(found[0] - logits[0]).max() <= TOLERANCE
    chosen = [int(found[0, -1].argmax())]
    for step in range(STEPS):
        mask = np.ones((1, mask.shape[1] + 1), np.int64)
        found = graph.step(np.array([[tokens[step]]]), mask)
        assert np.abs(found[0, -1] - logits[step + 1][-1]).max() <= TOLERANCE
        chosen.append(int(found[0, -1].argmax()))
    assert chosen == tokens
    assert built.contract.padding == ("any" if target == "portable" else "right")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_rows_of_a_batch_padded_on_the_right_are_what_they_are_alone(saved, name, target):
    """Rows of different lengths, then decode steps where each row's new token stands right behind its own tokens."""
    path, _, _ = exported(saved(name), target)
    _assert_batch(name, Plain(path, 2), "gap" if target == "portable" else "compact")


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_rows_padded_on_the_left_are_what_they_are_alone_where_the_contract_allows_it(saved, name):
    path, _, _ = exported(saved(name), "portable")
    _assert_batch(name, Plain(path, 2), "left")


def _assert_batch(name, graph, style):
    length = PROMPT.shape[1]
    pad = length - SHORT.shape[1]
    ids, mask = np.zeros((2, length), np.int64), np.zeros((2, length), np.int64)
    ids[0], mask[0] = PROMPT[0], 1
    row = slice(pad, None) if style == "left" else slice(0, SHORT.shape[1])
    ids[1, row], mask[1, row] = SHORT[0], 1
    expected = [reference(name, one) for one in (PROMPT, SHORT)]
    found = graph.step(ids, mask)
    assert np.abs(found[0] - expected[0][1][0]).max() <= TOLERANCE
    assert np.abs(found[1, row] - expected[1][1][0]).max() <= TOLERANCE
    for step in range(2):
        new = np.array([[one[0][step]] for one in expected])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
        if style == "compact":  # the operator counts tokens: the mask of a row is its length
            counted = np.arange(mask.shape[1])[None] < mask.sum(1, keepdims=True)
            found = graph.step(new, counted.astype(np.int64))
        else:
            found = graph.step(new, mask)
        for i in range(2):
            assert np.abs(found[i, -1] - expected[i][1][step + 1][-1]).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2"])
def test_several_rows_on_top_of_a_past_go_through_the_prefill_graph(saved, name):
    path, prefill, built = exported(saved(name), "cuda")
    assert built.contract.prefill == "prefill.onnx"
    assert not built.contract.prefill_batch
    assert prefill.exists()
    assert path.exists()
    rows = np.array([[5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50, 1, 2, 90]])
    with torch.no_grad():
        expected = zoo.load(name)(torch.from_numpy(rows)).logits.numpy()
    graph = Plain(prefill, 2)
    graph.step(rows[:, :3], np.ones((2, 3), np.int64))
    found = graph.step(rows[:, 3:], np.ones((2, 7), np.int64))
    assert np.abs(found - expected[:, 3:]).max() <= TOLERANCE
