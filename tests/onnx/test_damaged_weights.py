# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf among the weights are named by an export, whatever it writes them as."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.crash_inputs import write_inputs

NORM, MATRIX = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "in"
    write_inputs(folder)
    surgery.prompt_convert(folder / "prompt", to="prefix", base=folder / "base", output=folder / "prefix")
    return folder


def damaged(inputs: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(inputs / "base", folder)
    tensors = {key: tensor.copy() for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors[name].flat[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "embed"},
        {"target": "portable", "dtype": "fp16"},
        {"target": "cuda", "dtype": "bf16"},
        {"weights": "link", "verify_copies": True},
        {"weights_type": "int4"},
        {"weights_type": "int8", "embeddings": "int8"},
        {"weights_type": "mixed", "budget": 60_000},
        {"swap": "lora"},
        {"swap": "lora", "weights_type": "int4"},
        {"merge_to": "full", "adapters": "lora"},
        {"prefix": "prefix"},
        {"prefix": "prompt", "prompt_form": "rows"},
        {"inputs_embeds": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "copy",
)
def test_a_weight_that_is_kept_is_named(inputs: Path, tmp_path: Path, options: dict[str, object]) -> None:
    base = damaged(inputs, tmp_path / "base", NORM, np.inf)
    named = {key: inputs / value if key in ("swap", "adapters", "prefix") else value for key, value in options.items()}
    result = surgery.export_onnx(base, output=tmp_path / "out", **named)
    assert [warning for warning in result.warnings if "NaN or Inf" in warning] == [
        f"one weight holds NaN or Inf: {NORM}"
    ]


def test_merged_weights_are_looked_at_too(inputs: Path, tmp_path: Path) -> None:
    base = damaged(inputs, tmp_path / "base", NORM, np.nan)
    result = surgery.export_onnx(base, [inputs / "lora"], output=tmp_path / "out")
    assert f"one weight holds NaN or Inf: {NORM}" in result.warnings


def test_a_weight_that_is_computed_is_refused_by_name(inputs: Path, tmp_path: Path) -> None:
    """Of a graph whose other weights stay where they are and are not read."""
    target = "model.layers.0.self_attn.q_proj.weight"
    base = damaged(inputs, tmp_path / "base", target, np.nan)
    surgery.export_onnx(base, output=tmp_path / "graph", weights="link")
    with pytest.raises(FitError, match=r"NaN|nan") as caught:
        surgery.merge(tmp_path / "graph/model.onnx", inputs / "lora", graph_of=base, output=tmp_path / "out")
    assert caught.value.tensor == target
    assert not (tmp_path / "out").exists()


def test_nothing_is_said_of_weights_that_are_numbers(inputs: Path, tmp_path: Path) -> None:
    assert surgery.export_onnx(inputs / "base", output=tmp_path / "out").warnings == ()


@pytest.mark.parametrize(
    "options", [{"weights_type": "int4"}, {"weights_type": "int8"}, {"weights_type": "mixed", "budget": 60_000}]
)
def test_codes_of_such_a_weight_are_refused(inputs: Path, tmp_path: Path, options: dict[str, object], recwarn) -> None:
    base = damaged(inputs, tmp_path / "base", MATRIX, np.nan)
    with pytest.raises(FitError, match="nan") as caught:
        surgery.export_onnx(base, output=tmp_path / "out", **options)
    assert caught.value.tensor == MATRIX
    assert not (tmp_path / "out").exists()
    assert list(recwarn) == []
