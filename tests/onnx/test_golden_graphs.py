# SPDX-License-Identifier: Apache-2.0
"""The golden graphs answer as the checkpoints they were made of: else nothing measured with them means anything."""

from __future__ import annotations

import pytest

from tests.support.graph_pairs import PAIRS, answer, difference

BOUNDS = {"float32": 1e-5, "float16": 2e-2, "int8": 0.3, "int4": 2.0}
BUILT_IN = {"genai-llama-slots": "lora"}


@pytest.mark.parametrize("name", PAIRS)
def test_a_golden_graph_answers_as_its_base(name: str) -> None:
    pair = PAIRS[name]
    run = pair.run()
    wanted = pair.expected(BUILT_IN[name])["outputs"] if name in BUILT_IN else run["outputs"]
    assert difference(answer(pair.graph, run), wanted) < BOUNDS[pair.dtype]


def test_there_are_graphs_of_every_kind() -> None:
    assert {pair.base_name for pair in PAIRS.values()} == {"llama", "qwen2", "gpt2", "bert", "vit", "resnet", "unet"}
    assert len({pair.exporter for pair in PAIRS.values()}) >= 10
