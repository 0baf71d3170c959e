# SPDX-License-Identifier: Apache-2.0
"""What cannot be extracted is refused by name, a wrong factor is caught, and the command says what it did."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from surgery.extraction.proof import agrees
from surgery.rank import Budget
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError, ProofError
from tests.oracles import disk, models
from tests.support.extractions import WHOLE, tune
from tests.support.kit import ROOT, spawn


def test_a_rank_above_a_matrix_is_cut_and_said(llama: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.extract_lora(*llama, output=tmp_path / "out", rank=1000)
    row = next(row for row in result.rows if row.name.endswith("0.self_attn.k_proj.weight"))
    assert row.rank == 16
    assert "cut from 1000 to 16" in row.why


def test_a_fine_tune_equal_to_its_base_is_refused(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    with pytest.raises(NothingChangedError):
        surgery.extract_lora(base, tune(base, tmp_path / "tuned", lambda n, v, g: v), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_is_refused_by_name(side: str, value: float, part: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder = dict(zip(("base", "tuned"), llama, strict=True))[side]
    tensors = disk.read_tensors(folder)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name].view(-1)[-1] = value
    disk.write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(FitError, match=r"NaN") as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out")
    assert caught.value.tensor == name
    assert list(tmp_path.iterdir()) == [*llama] or not (tmp_path / "out").exists()


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = disk.read_tensors(folder)
    edit(tensors)
    disk.write_safetensors(folder / "model.safetensors", tensors)


FIT = {
    "a layer more": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(56, 32)}),
        "model.layers.2.mlp.up_proj.weight",
    ),
    "a layer less": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "a wider layer": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(60, 32)}),
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a smaller vocabulary": (lambda t: t.update({"lm_head.weight": torch.ones(90, 32)}), "lm_head.weight"),
}


@pytest.mark.parametrize("fault", FIT)
def test_what_does_not_fit_is_refused_by_name(fault: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    edit, name = FIT[fault]
    edited(llama[1], edit)
    with pytest.raises(FitError) as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out")
    assert caught.value.tensor == name


def test_another_architecture_with_equal_shapes_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((llama[0] / "config.json").read_text())
    (llama[0] / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(FitError, match="mistral"):
        surgery.extract_lora(*llama, output=tmp_path / "out")


def test_a_loss_is_an_error_unless_it_is_allowed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FitError, match="would be lost") as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out", dense=())
    assert "norm" in str(caught.value.tensor)
    result = surgery.extract_lora(*llama, output=tmp_path / "out", dense=(), rank=WHOLE, allow_loss=True)
    assert result.classes["dropped"] == 5
    dropped = [row for row in result.rows if row.kind == "dropped"]
    assert all("norm" in row.name and row.residual == 1 for row in dropped)
    assert result.lost == pytest.approx(sum(row.share for row in dropped))
    assert result.residual == pytest.approx(result.lost**0.5, rel=1e-3)


def test_a_wrong_factor_is_caught(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.extraction.factorise import TargetFactors

    right = TargetFactors.side

    def wrong(self: TargetFactors, which: str, index: int, rank: int, fold: float = 1.0) -> np.ndarray:
        side = right(self, which, index, rank, fold)
        return side * 1.02 if which == "left" and "layers.1.mlp.down_proj" in self.target.path else side

    monkeypatch.setattr(TargetFactors, "side", wrong)
    with pytest.raises(ProofError, match="read back"):
        surgery.extract_lora(*llama, output=tmp_path / "out", rank=WHOLE)
    assert not (tmp_path / "out").exists()


def test_agreement_is_neither_blind_nor_nervous() -> None:
    assert agrees(0.5, 0.5, DType.F32)
    assert agrees(0.0023, 0.0, DType.BF16)
    assert not agrees(0.02, 0.0, DType.F32)
    assert not agrees(0.55, 0.5, DType.BF16)
    assert not agrees(0.4, 0.5, DType.BF16)


def test_an_output_that_exists_is_kept(llama: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputExistsError):
        surgery.extract_lora(*llama, output=tmp_path / "out")
    (tmp_path / "out" / "surgery_manifest.json").write_text("{}")  # an earlier output of this tool
    surgery.extract_lora(*llama, output=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": surgery.Rank(4) & surgery.Rank.energy(0.5)},
        {"rank": surgery.Rank.energy(1.0)},
        {"alpha": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FitError):
        surgery.extract_lora(*llama, output=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("text", "limit", "measure"),
    [
        ("20MB", 20_000_000, "bytes"),
        ("1KiB", 1024, "bytes"),
        ("2M", 2_000_000, "parameters"),
        ("300", 300, "parameters"),
    ],
)
def test_a_budget_counts_bytes_or_parameters(text: str, limit: int, measure: str) -> None:
    found = Budget.parse(text)
    assert (found.limit, found.measure) == (limit, measure)


@pytest.mark.parametrize(
    "words",
    [
        ("--rank", "0"),
        ("--rank", "-3"),
        ("--rank", "4", "--energy", ".5"),
        ("--budget", "x"),
        ("--dense", "all"),
        ("--alpha", "nan"),
    ],
    ids=str,
)
def test_the_command_refuses_what_means_nothing(
    words: tuple[str, ...], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    done = spawn("extract-lora", *llama, "-o", tmp_path / "out", *words)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_tells_and_counts(llama: tuple[Path, Path], tmp_path: Path) -> None:
    done = spawn("extract-lora", *llama, "-o", tmp_path / "out", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "5 dense (in full), 16 low-rank (as factors)" in done.stdout
    again = spawn("extract-lora", *llama, "-o", tmp_path / "json", "--rank", "4", "--json")
    document = json.loads(again.stdout)
    assert document["command"] == "extract-lora"
    assert document["result"]["classes"] == {"dense": 5, "low-rank": 16}
    same = spawn("extract-lora", llama[0], llama[0], "-o", tmp_path / "none")
    assert same.returncode == 4


def _evaluate() -> Any:
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "examples" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_shipped_example_keeps_its_gain(tmp_path: Path) -> None:
    root = ROOT / "examples"
    folders = [root / "base", root / "tuned"]
    for rank in (4, 16):
        surgery.extract_lora(root / "base", root / "tuned", output=tmp_path / f"rank{rank}", rank=rank)
        folders.append(tmp_path / f"rank{rank}")
    evaluate = _evaluate()
    scores = {
        score.model: score for score in evaluate.evaluate(folders, root, evaluate.CONTEXT, evaluate.STRIDE, "cpu")
    }
    assert scores["base"].target > scores["rank4"].target > scores["rank16"].target > scores["tuned"].target
    assert scores["rank4"].recovered > 0.25
    assert scores["rank16"].recovered > 0.6
