# SPDX-License-Identifier: Apache-2.0
"""The base of most tests of consumers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapter_files import write_base
from tests.support.decoder import PROJECTIONS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A decoder of two layers, with all projections that programs put together."""
    leaves = {"self_attn.v_proj": (4, 6), "mlp.gate_proj": (8, 6), "mlp.up_proj": (8, 6), **PROJECTIONS}
    layers = {f"model.layers.{i}.{leaf}.weight": shape for i in range(2) for leaf, shape in leaves.items()}
    shapes = {"model.embed_tokens.weight": (11, 6), **layers, "lm_head.weight": (11, 6)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    return write_base(tmp_path / "base", shapes, config)
