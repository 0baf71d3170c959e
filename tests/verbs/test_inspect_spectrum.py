# SPDX-License-Identifier: Apache-2.0
"""Norms and spectra of an adapter's updates, against the products of its factors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.page_reader import check_page
from tests.support.small_world import invoke

LORA, SCALE = Path("examples/lora"), 2.0


def test_they_are_those_of_the_products():
    report = surgery.inspect(LORA, spectrum=True)
    stored = load_file(LORA / "adapter_model.safetensors")
    assert len(report.deltas) == len(report.modules) == 42
    for delta in report.deltas:
        name = f"base_model.model.{delta.name.removesuffix('.weight')}"
        values = np.linalg.svd(
            SCALE * stored[f"{name}.lora_B.weight"].astype(np.float64) @ stored[f"{name}.lora_A.weight"],
            compute_uv=False,
        )
        assert delta.values == pytest.approx(values[:8], rel=1e-9)
        assert delta.norm == pytest.approx(np.linalg.norm(values), rel=1e-9)
        assert delta.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
        assert delta.role == ("mlp" if ".mlp." in delta.name else "attention")


def test_nothing_is_read_unasked():
    assert surgery.inspect(LORA).deltas == ()
    assert "deltas" not in surgery.inspect(LORA).as_json()
    assert surgery.inspect(LORA, spectrum=True).as_json()["deltas"][0].keys() == {"name", "role", "norm", "stable_rank"}


def test_a_direction_has_no_delta_without_its_base():
    assert surgery.inspect("examples/dora", spectrum=True).deltas == ()
    assert surgery.inspect("examples/base", spectrum=True) == surgery.inspect("examples/base")


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(tmp_path, odd):
    bad = tmp_path / "lora"
    shutil.copytree(LORA, bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    first = min(name for name in tensors if "lora_B" in name)
    tensors[first][0] = odd
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(FitError, match="holds NaN or Inf"):
        surgery.inspect(bad, spectrum=True)
    assert surgery.inspect(bad).parameters


def test_a_page_has_them(tmp_path, monkeypatch):
    path = str(LORA.resolve())
    monkeypatch.chdir(tmp_path)
    assert invoke("inspect", path, "--html", "a.html").exit_code == 0
    titles = [strong.text for strong in check_page(Path("a.html").read_text()).all("strong")]
    assert titles == ["Norm of the update", "Stable rank of the update", "Spectra of the update by role, medians"]
