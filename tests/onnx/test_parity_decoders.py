# SPDX-License-Identifier: Apache-2.0
"""Every decoder family, on every target, matches transformers: prefill, decode steps, greedy tokens, padded batches."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS, twin
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes
from tests.support.sessions import Plain

TOLERANCE = 1e-4
PROMPT = np.array([[5, 17, 3, 88, 42, 9, 61]])
SHORT = np.array([[29, 8, 77, 50]])
STEPS = 8
WIDE = {"hidden_size": 64}  # heads of 16, which GroupQueryAttention rotates itself
FIELDS = {
    "llama_dynamic": {"max_position_embeddings": 64},  # a graph does not reach beyond
    "phi3_longrope_long": {"original_max_position_embeddings": 4},  # long from the first token on
}
CASES = {name: (name, FIELDS.get(name, {})) for name in recipes.DECODERS} | {
    f"{name} wide": (name, WIDE)
    for name in (
        *("llama", "llama_llama3", "llama_yarn", "mistral_short_window", "qwen2", "olmo2", "smollm3_windows"),
        *("cohere", "phi"),
    )
}
CASES["glm wide"] = ("glm", {"head_dim": 32})


# Heads of 12 values, biases on the scores, states beside keys, and keys of another layer, which GroupQueryAttention does not take.
STANDARD_ONLY = (
    "llama_mha_tied_biases",
    "falcon_rw",
    "bloom",
    "bloom_six_heads",
    "mpt",
    "mpt_clipped",
    "mpt_six_heads",
    "lfm2",
    "lfm2_wide",
    "gemma3n",
)


class Exported:
    """One tiny model: its folder, transformers' copy of it, and its graphs."""

    def __init__(self, case, folder):
        name, fields = CASES[case]
        self.folder = recipes.build(name, folder, **fields)
        self.model = recipes.load(name, folder)

    @functools.cache  # noqa: B019
    def graph(self, target):
        """The built graphs for `target` in float32, written beside the weights."""
        component = open_checkpoint(self.folder).main
        built = build(component, GraphOptions(twin(TARGETS[target]), DType.F32))
        for name, model in built.graphs.items():
            (self.folder / f"{target}-{name}").write_bytes(model.data)
        return self.folder / f"{target}-model.onnx", built

    @functools.cache  # noqa: B019
    def greedy(self, prompt):
        """Greedy tokens of transformers and their logits, one row at a time and without a cache."""
        tokens, logits = torch.tensor([prompt]), []
        with torch.no_grad():
            for _ in range(STEPS + 1):
                logits.append(self.model(tokens).logits[0].numpy())
                tokens = torch.cat([tokens, torch.tensor([[int(logits[-1][-1].argmax())]])], 1)
        return tokens[0, len(prompt) :].tolist(), logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return functools.cache(lambda case: Exported(case, tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_prefill_decode_steps_and_greedy_tokens_match_transformers(exported, case, target):
    one = exported(case)
    tokens, logits = one.greedy(tuple(PROMPT[0]))
    path, built = one.graph(target)
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
    grouped = target != "portable" and case not in STANDARD_ONLY
    assert (built.contract.padding, built.contract.cache) == (("right", "shared") if grouped else ("any", "growing"))


# LongRoPE depends on the longest row of a batch: a short row beside a long one differs from the row alone, in
# transformers too.
BATCHED = [case for case in CASES if case != "phi3_longrope_long"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", BATCHED)
def test_right_padded_rows_give_the_same_as_alone(exported, case, target):
    """Rows of different lengths, then decode steps where each row's new token stands right behind its own tokens."""
    one = exported(case)
    path, built = one.graph(target)
    _assert_batch(one, Plain(path, 2), built.contract.padding)


@pytest.mark.parametrize("case", BATCHED)
def test_left_padded_rows_give_the_same_as_alone_if_permitted(exported, case):
    one = exported(case)
    _assert_batch(one, Plain(one.graph("portable")[0], 2), "left")


def _assert_batch(one, graph, style):
    length = PROMPT.shape[1]
    pad = length - SHORT.shape[1]
    ids, mask = np.zeros((2, length), np.int64), np.zeros((2, length), np.int64)
    ids[0], mask[0] = PROMPT[0], 1
    row = slice(pad, None) if style == "left" else slice(0, SHORT.shape[1])
    ids[1, row], mask[1, row] = SHORT[0], 1
    expected = [one.greedy(tuple(prompt[0])) for prompt in (PROMPT, SHORT)]
    found = graph.step(ids, mask)
    assert np.abs(found[0] - expected[0][1][0]).max() <= TOLERANCE
    assert np.abs(found[1, row] - expected[1][1][0]).max() <= TOLERANCE
    for step in range(2):
        new = np.array([[tokens[step]] for tokens, _ in expected])
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
        if style == "right":  # the operator counts tokens: the mask of a row is its length
            counted = np.arange(mask.shape[1])[None] < mask.sum(1, keepdims=True)
            found = graph.step(new, counted.astype(np.int64))
        else:
            found = graph.step(new, mask)
        for i, (_, logits) in enumerate(expected):
            assert np.abs(found[i, -1] - logits[step + 1][-1]).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["llama wide", "qwen2", "gpt2", "gemma2"])
def test_several_rows_on_top_of_a_past_go_through_the_prefill_graph(exported, case):
    one = exported(case)
    path, built = one.graph("cuda")
    assert built.contract.prefill == "prefill.onnx"
    assert not built.contract.prefill_batch
    rows = np.array([[5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50, 1, 2, 90]])
    with torch.no_grad():
        expected = one.model(torch.from_numpy(rows)).logits.numpy()
    graph = Plain(path.with_name("cuda-prefill.onnx"), 2)
    graph.step(rows[:, :3], np.ones((2, 3), np.int64))
    found = graph.step(rows[:, 3:], np.ones((2, 7), np.int64))
    assert np.abs(found - expected[:, 3:]).max() <= TOLERANCE
