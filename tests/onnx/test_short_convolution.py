# SPDX-License-Identifier: Apache-2.0
"""Models whose layers keep a state of fixed size instead of keys and values: what a graph says of it, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from surgery.onnx.graph.contract import from_metadata
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError, MalformedError
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import Plain


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("lfm2", tmp_path_factory.mktemp("lfm2") / "base")


def test_the_contract_names_the_layers_and_the_size_of_their_state(base, tmp_path):
    result = export_onnx(base, output=tmp_path / "out")
    assert (result.contract.convolutions, result.contract.state) == ((0, 2), (32, 3))
    assert (result.contract.layers, result.contract.cache, result.contract.padding) == (3, "growing", "any")
    assert from_metadata(result.contract.as_metadata()) == result.contract
    assert not (tmp_path / "out" / "genai_config.json").exists()
    graph = Plain(tmp_path / "out" / "model.onnx")
    assert sorted(graph.past) == ["past_conv.0", "past_conv.2", "past_key_values.1.key", "past_key_values.1.value"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("convolutions", [3]), ("convolutions", ["0"]), ("state", [32]), ("state", [0, 3]), ("state", 3)],
)
def test_a_contract_with_another_state_is_refused(base, tmp_path, field, value):
    found = json.loads(export_onnx(base, output=tmp_path / "out").contract.as_metadata()["surgery.contract"])
    with pytest.raises(MalformedError, match="contract"):
        from_metadata({"surgery.contract": json.dumps({**found, field: value})})


def test_what_was_in_the_state_of_a_padded_row_is_what_a_row_alone_has(base, tmp_path):
    export_onnx(base, output=tmp_path / "out")
    ids, mask = np.array([[5, 17, 3, 88, 42]]), np.ones((1, 5), np.int64)
    alone, right, left = (Plain(tmp_path / "out" / "model.onnx") for _ in range(3))
    alone.step(ids, mask)
    right.step(np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3))))
    left.step(np.pad(ids, ((0, 0), (3, 0))), np.pad(mask, ((0, 0), (3, 0))))
    for padded in (right, left):
        for name in ("past_conv.0", "past_conv.2"):
            assert np.abs(padded.past[name] - alone.past[name]).max() < 1e-5
    assert np.abs(alone.past["past_conv.0"]).min() > 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_refused(base, tmp_path, kind):
    adapter = trained.train("lfm2", base, trained.PROMPTS["prompt"], tmp_path / "adapter")
    if kind == "prefix":
        adapter = trained.train(
            "llama", recipes.build("llama", tmp_path / "llama"), trained.PROMPTS[kind], tmp_path / "prefix"
        )
    with pytest.raises(FitError, match="short convolutions"):
        export_onnx(base, adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
