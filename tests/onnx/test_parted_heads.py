# SPDX-License-Identifier: Apache-2.0
"""Adapters on one side of a tied embedding, or on both with other values, in every way that a graph gets its weights."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest

import surgery
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
ADAPTERS = {
    "rows of both": {"trainable_token_indices": [3, 17, 42]},
    "rows of the head": {"trainable_token_indices": {"lm_head": [3, 17]}},
    "other rows": {"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [17, 42]}},
    "lora of the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora of the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
}
WAYS = {
    "beside the base": {"weights": "reference"},
    "inside": {"weights": "embed"},
    "whole": {"merge_to": "full"},
    "turned": {"linear": "matmul"},
    "turned inside": {"linear": "matmul", "weights": "embed", "target": "portable"},
    "codes": {"weights_type": "int8"},
    "codes of all": {"weights_type": "int8", "head": "int8", "embeddings": "int8"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied base, an adapter on it, and the logits of both."""
    folder = tmp_path_factory.mktemp("tied")
    base = recipes.build("qwen2", folder / "base", tie_word_embeddings=True)
    plain = trained.logits(recipes.load("qwen2", base), IDS)

    @functools.cache
    def one(kind):
        config = trained._lora(**{"target_modules": ["q_proj"], **ADAPTERS[kind]})
        adapter = trained.train("qwen2", base, config, folder / kind)
        expected = trained.logits(trained.attached("qwen2", base, (adapter, 1.0)), IDS)
        assert np.abs(expected - plain).max() > 1
        return base, adapter, expected

    return one


PAIRS = [(kind, way) for kind in ADAPTERS for way in WAYS if kind == "other rows" or way in ("turned", "codes")]


@pytest.mark.parametrize(("kind", "way"), PAIRS)
def test_a_tied_head_is_parted_where_an_adapter_parts_it(made, kind, way, tmp_path):
    base, adapter, expected = made(kind)
    out = tmp_path / "out"
    if way == "beside the base":
        base = shutil.copytree(base, out)
    surgery.export_onnx(base, adapter, output=out, **WAYS[way])
    found = Plain(out / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= (0.6 if "codes" in way else 1e-4)
    assert surgery.verify(out, against=base, adapters=adapter).difference <= 1e-4
