# SPDX-License-Identifier: Apache-2.0
"""Intruder directions as their authors define them, by the whole decompositions of both matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.comparison.intruders import ALIKE, LOOKED_AT
from surgery_formats.errors import FitError
from tests.support.page_reader import check_page

SHAPES = {"tall": (64, 24), "wide": (24, 64), "square": (32, 32)}


def by_definition(before: np.ndarray, after: np.ndarray) -> int:
    """With cosines of all pairs of left singular vectors (arXiv:2410.21228, algorithm 1)."""
    own, tuned = (np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0] for matrix in (before, after))
    cosines = abs(tuned[:, :LOOKED_AT].T @ own)
    return int((cosines.max(axis=1) < ALIKE).sum())


def pair_of(tmp_path: Path, change: float) -> tuple[Path, Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    random = np.random.default_rng(5)
    sides: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, shape in SHAPES.items():
        U, _, V = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
        before = (U * np.geomspace(4, 0.5, min(shape))) @ V
        spike = np.outer(random.standard_normal(shape[0]), random.standard_normal(shape[1]))
        sides[f"model.layers.0.{name}.weight"] = before.astype(np.float32), (before + change * spike).astype(np.float32)
    for number, side in enumerate(("a", "b")):
        save_file(
            {name: np.ascontiguousarray(both[number]) for name, both in sides.items()}, tmp_path / f"{side}.safetensors"
        )
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors", sides


@pytest.mark.parametrize("change", [0.01, 0.05, 0.5])
def test_they_are_counted_as_the_definition_counts(tmp_path, change):
    a, b, sides = pair_of(tmp_path, change)
    result = surgery.diff(a, b, intruders=True)
    found = {tensor.name: tensor.values.intruders for tensor in result.tensors}
    assert found == {name: by_definition(*both) for name, both in sides.items()}
    if change == 0.5:
        assert all(count > 0 for count in found.values()), "a strong spike is one"


def test_they_are_shown_and_are_not_there_unasked(tmp_path):
    a, b, _ = pair_of(tmp_path, 0.5)
    plain, asked = surgery.diff(a, b), surgery.diff(a, b, intruders=True)
    assert "intruders" not in str(plain)
    assert "intruders" not in plain.as_json()["tensors"][0]["values"]
    assert "intruders" in str(asked)
    assert "Intruder directions of B" in {entry.text for entry in check_page(asked.summary().as_html()).all("strong")}


def test_numbers_that_are_none_have_none(tmp_path):
    save_file({"w": np.full((4, 4), np.nan, np.float32)}, tmp_path / "n.safetensors")
    save_file({"w": np.eye(4, dtype=np.float32)}, tmp_path / "m.safetensors")
    (tensor,) = surgery.diff(tmp_path / "m.safetensors", tmp_path / "n.safetensors", intruders=True).tensors
    assert tensor.values.intruders is None


def test_adapters_have_none_by_themselves():
    with pytest.raises(FitError, match="two models alone"):
        surgery.diff("examples/lora", "examples/lora", intruders=True)
