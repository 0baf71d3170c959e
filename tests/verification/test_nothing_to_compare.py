# SPDX-License-Identifier: Apache-2.0
"""Logits that are all 0 prove nothing: a graph of other weights has the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery.onnx.export.adapters import AdapterRoles
from surgery.verification.logit_difference import LogitDifference
from surgery.verification.logit_error import error_on_text
from surgery.verification.session import Session
from surgery_formats.errors import ProofError

EXAMPLES = Path("examples")
FACTOR = 1e11
"""Of the example's adapter: the squares of what a norm gets overflow, and it makes 0 of all."""


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose last norm makes 0 of everything."""
    folder = tmp_path_factory.mktemp("silent") / "base"
    shutil.copytree(EXAMPLES / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.zeros_like(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_merge_that_overflows_is_no_proof(tmp_path: Path) -> None:
    merged = ("examples/lora", FACTOR)
    surgery.export_onnx(EXAMPLES / "base", adapters=merged, output=tmp_path / "out")
    with pytest.raises(ProofError, match="is 0, which gives nothing to compare; its weights are 0, or") as caught:
        surgery.verify(tmp_path / "out", against=EXAMPLES / "base", adapters=merged)
    assert caught.value.exit_code == 5
    assert Path(str(caught.value.file)).parent == tmp_path / "out"
    assert Path(str(caught.value.file)).suffix == ".onnx"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_model_without_logits_is_no_proof(silent: Path, tmp_path: Path, dtype: str) -> None:
    surgery.export_onnx(silent, output=tmp_path / "out", dtype=dtype, target="portable")
    for against in (silent, None):
        with pytest.raises(ProofError, match="prefill of one row: all that the model itself computes is 0"):
            surgery.verify(tmp_path / "out", against=against)


def test_an_error_relative_to_nothing_is_none(silent: Path, tmp_path: Path) -> None:
    surgery.export_onnx(silent, output=tmp_path / "out", weights_type="int4")
    with pytest.raises(ProofError, match="logits on the text: all that the model itself computes is 0"):
        error_on_text(tmp_path / "out" / "model.onnx", surgery.open(silent), AdapterRoles(), "words")


@pytest.mark.parametrize("size", [1e-30, 1e-5, 9e-4])
def test_zeros_are_not_the_logits_of_a_model_that_has_small_ones(size: float) -> None:
    assert not LogitDifference("prefill", size, size).within(1e-4)
    assert LogitDifference("prefill", size / 11, size).within(1e-4)


def test_another_token_is_a_fault_however_near_the_logits_are() -> None:
    assert LogitDifference("decode", 0.0, 1.0).within(1e-4)
    assert not LogitDifference("decode", 0.0, 1.0, wrong_tokens=1).within(1e-4)


@pytest.mark.parametrize(("size", "limit"), [(0.0, 1e-4), (1e-3, 1e-4), (0.5, 1e-4), (1.0, 1e-4), (20.0, 2e-3)])
def test_rounding_is_measured_against_1_where_logits_are_not_tiny(size: float, limit: float) -> None:
    assert LogitDifference("prefill", limit, size).limit(1e-4) == pytest.approx(limit)


def test_a_graph_of_zeros_is_no_proof_for_small_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, norm = tmp_path / "base", "model.norm.weight"
    shutil.copytree(EXAMPLES / "base", base)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, norm: tensors[norm] * 1e-6}, base / "model.safetensors", {"format": "pt"})
    surgery.export_onnx(base, output=tmp_path / "out", dtype="fp32", target="portable")
    checks = surgery.verify(tmp_path / "out", against=base).checks
    assert 0 < max(check.limit for check in checks if check.limit) < 1e-5
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, feed: {name: array * 0 for name, array in run(self, feed).items()})
    with pytest.raises(ProofError, match="prefill of one row: a logit differs by"):
        surgery.verify(tmp_path / "out", against=base)
