# SPDX-License-Identifier: Apache-2.0
"""Adapters of colpali-engine name the projection of ColPali and ColQwen2 otherwise than transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.models.checkpoint import open_checkpoint


@pytest.mark.parametrize("model_type", ["colpali", "colqwen2"])
def test_the_published_name_of_the_projection_is_found(model_type: str, tmp_path: Path) -> None:
    save_file({"embedding_proj_layer.weight": np.zeros((4, 8), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (place,) = open_checkpoint(tmp_path).main.names.resolve("custom_text_proj.weight")
    assert place.parameter.name == "embedding_proj_layer.weight"
