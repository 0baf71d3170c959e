# SPDX-License-Identifier: Apache-2.0
"""Leading segments of an adapter's names are read as the base has them, where there is one reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import bind
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.adapter_files import draw, write_base, write_peft

NAMES = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj")


def _edited(
    folder: Path, base: dict[str, tuple[int, int]], adapter: dict[str, tuple[int, int]]
) -> tuple[set[str], str]:
    """Names of the weights that change, and the warnings."""
    tensors = {f"{name}.weight": shape for name, shape in base.items()}
    factors: dict[str, np.ndarray] = {}
    for name, (rows, cols) in adapter.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = draw(2, 2, cols)
        factors[f"base_model.model.{name}.lora_B.weight"] = draw(3, rows, 2)
    checkpoint = open_checkpoint(write_base(folder / "base", tensors, {"model_type": "custom"}))
    peft = write_peft(folder / "adapter", factors, r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    binding = bind([(read_adapter(peft), 1.0)], checkpoint)
    return {name for _, name in binding.edits}, " ".join(binding.warnings)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.language_model", "language_model.model"),
        ("model", "vlm.language_model"),
        ("custom.inner.model", "model"),
        ("thinker.model", "model"),
    ],
)
def test_one_reading_is_taken_and_said(tmp_path: Path, theirs: str, ours: str) -> None:
    base = {f"{ours}.{name}": (4, 6) for name in NAMES}
    edited, warnings = _edited(tmp_path, base, {f"{theirs}.{name}": (4, 6) for name in NAMES})
    assert edited == {f"{name}.weight" for name in base}
    assert not warnings or ours in warnings


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.model.layers.0.mlp.up_proj",
        "model.layers.0._orig_mod.mlp.up_proj",
        "model.layers.0._checkpoint_wrapped_module.mlp.up_proj",
        "model.layers.0._fsdp_wrapped_module.mlp.up_proj",
        "module.model.layers.0.mlp.up_proj",
        "base_model.model.model.layers.0.mlp.up_proj",
    ],
)
def test_segments_of_wrappers_are_removed(tmp_path: Path, wrapped: str) -> None:
    edited, _ = _edited(tmp_path, {"model.layers.0.mlp.up_proj": (4, 6)}, {wrapped: (4, 6)})
    assert edited == {"model.layers.0.mlp.up_proj.weight"}


def test_two_readings_are_refused_with_both(tmp_path: Path) -> None:
    base = {f"{home}.{name}": (4, 6) for home in ("left.model", "right.model") for name in NAMES}
    with pytest.raises(FitError, match=r"left\.model.*right\.model"):
        _edited(tmp_path, base, {f"other.{name}": (4, 6) for name in NAMES})


def test_shapes_tell_two_readings_apart(tmp_path: Path) -> None:
    base = {f"{home}.{name}": shape for home, shape in (("left.one", (4, 6)), ("right.one", (8, 6))) for name in NAMES}
    edited, _ = _edited(tmp_path, base, {f"third.{name}": (8, 6) for name in NAMES})
    assert edited == {f"right.one.{name}.weight" for name in NAMES}


def test_a_layer_that_the_base_lacks_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    base = {f"model.{name}": (4, 6) for name in NAMES} | {"draft.layers.7.mlp.up_proj": (4, 6)}
    with pytest.raises(FitError, match=r"no parameter 'model\.layers\.7\.mlp\.up_proj"):
        _edited(tmp_path, base, {f"model.{name}": (4, 6) for name in (*NAMES, "layers.7.mlp.up_proj")})
