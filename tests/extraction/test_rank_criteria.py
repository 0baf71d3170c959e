# SPDX-License-Identifier: Apache-2.0
"""Ranks by energy, error, budget and noise, and what other choices would have cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.rank import Budget
from surgery_formats.errors import FitError
from tests.oracles import models
from tests.support.extractions import everything, low_rank, only, tune
from tests.support.kit import spawn


def test_energy_and_error_are_met(llama: tuple[Path, Path], tmp_path: Path) -> None:
    held = surgery.extract_lora(*llama, output=tmp_path / "energy", rank=surgery.Rank.energy(0.7))
    missing = surgery.extract_lora(*llama, output=tmp_path / "error", rank=surgery.Rank.error(0.6))
    ranks = set()
    for row in held.rows:
        assert row.residual**2 <= 0.3 + 1e-6
    for row in missing.rows:
        assert row.residual <= 0.6 + 1e-6
        ranks.add(row.rank)
    assert len(ranks - {0}) > 1, "ranks differ by matrix"
    assert min(row.residual for row in missing.rows if row.rank) > 0.4, "and no more than needed"


@pytest.mark.parametrize("budget", ["10000", "60kB"])
def test_a_budget_is_kept_and_shared_out(budget: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (
            everything(name, value, generator)
            if "norm" in name
            else low_rank(12 if "layers.0.mlp.up" in name else 2)(name, value, generator)
        )

    tuned = tune(llama[0], tmp_path / "mixed", change)
    result = surgery.extract_lora(llama[0], tuned, output=tmp_path / "out", rank=surgery.Rank.budget(budget))
    limit = Budget.parse(budget)
    spent = result.parameters if limit.measure == "parameters" else result.adapter_nbytes
    assert 0.6 * limit.limit < spent <= limit.limit
    ranks = {row.name: row.rank for row in result.rows if row.rank}
    assert max(ranks, key=lambda name: ranks[name]) == "model.layers.0.mlp.up_proj.weight"
    flat = surgery.extract_lora(llama[0], tuned, output=tmp_path / "flat", rank=3)
    assert flat.parameters <= result.parameters * 1.2
    assert result.residual < flat.residual
    with pytest.raises(FitError, match="budget"):
        surgery.extract_lora(llama[0], tuned, output=tmp_path / "none", rank=surgery.Rank.budget("100"))


def test_auto_takes_what_stands_out_of_rounding(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = tune(base, tmp_path / "tuned", only("mlp", low_rank(5)))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=surgery.Rank.auto)
    assert {row.rank for row in result.rows if row.rank} <= {4, 5}
    few = surgery.extract_lora(
        base, tuned, output=tmp_path / "few", rank=surgery.Rank.auto & surgery.Rank.budget("1500")
    )
    assert few.parameters <= 1500
    assert max(row.rank for row in few.rows) <= 5


def merged_lora(base: Path, folder: Path, rank: int, size: float) -> Path:
    """As `surgery merge` leaves it: `size` times the spacing of the stored values, rounded once."""

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if "proj" not in name:
            return value
        unit = torch.exp2((torch.frexp(value.double()).exponent - 8).double()).median()
        left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator).double())[0] for n in value.shape)
        delta = left @ right.T
        return (value.double() + delta * size * unit / delta.square().mean().sqrt()).to(value.dtype)

    return tune(base, folder, change)


def test_a_merged_lora_is_recognised_and_ranks_beyond_it_are_called_noise(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = merged_lora(base, tmp_path / "tuned", 2, 4.0)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=6)
    assert result.merged is not None
    assert (result.merged.rank, result.merged.layers, result.merged.of) == (2, 14, 14)
    rows = [row for row in result.rows if row.kind == "low-rank"]
    assert len(rows) == 14
    for row in rows:
        assert row.signal is not None
        assert (row.signal.count, row.signal.complete) == (2, True)
        assert "rank 6 asked: 4 directions are rounding noise; suggest <= 2" in row.why
        assert row.signal.survival == pytest.approx(1, abs=0.05)
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["looks_like"] == {"kind": "merged LoRA", "rank": 2, "layers": 14, "of": 14}
    assert manifest["tensors"][rows[0].name]["signal"] == 2
    done = spawn("extract-lora", base, tuned, "-o", tmp_path / "told", "--rank", "6")
    assert "looks like a merged rank-2 LoRA: 2 values above the edge in 14/14 layers" in done.stdout
    assert "model.layers.*.mlp.up_proj" in done.stdout
    assert "layers.1.mlp.up_proj" not in done.stdout
    assert "layers.1.mlp.up_proj" in spawn("-v", "extract-lora", base, tuned, "-o", tmp_path / "all").stdout


@pytest.mark.parametrize("arch", ["llama", "gpt2_bare", "mixtral"])
def test_the_predicted_survival_is_the_one_a_merge_measures(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base", dtype="bfloat16")

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim < 2 or "wte" in name or "embed" in name or "wpe" in name:
            return value
        unit = torch.exp2((torch.frexp(value.float()).exponent - 8).float()).median()
        return (value.float() + unit * torch.randn(value.shape, generator=generator)).to(value.dtype)

    tuned = tune(base, tmp_path / "tuned", change)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=3)
    assert result.merged is None
    measured = surgery.merge(base, tmp_path / "out", output=tmp_path / "merged").ledger
    assert 0.1 < measured.survival < 0.95
    assert result.survival == pytest.approx(measured.survival, abs=0.02)


@pytest.mark.parametrize("options", [{"alpha": 48.0}, {"alpha": 3.0, "rslora": True}], ids=str)
def test_a_scale_changes_no_figure(options: dict[str, Any], tmp_path: Path) -> None:
    """What is asked of the factors after they were made sees them without the scale of their format."""
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim < 2:
            return value
        return (value.float() + 0.004 * torch.randn(value.shape, generator=generator)).to(value.dtype)

    tuned = tune(base, tmp_path / "tuned", change)
    plain = surgery.extract_lora(base, tuned, output=tmp_path / "plain", rank=3)
    scaled = surgery.extract_lora(base, tuned, output=tmp_path / "scaled", rank=3, **options)
    assert scaled.survival == pytest.approx(plain.survival, abs=1e-3)
    assert plain.kind is not None
    assert scaled.kind is not None
    assert scaled.kind.rows == pytest.approx(plain.kind.rows, rel=2e-3)
    assert scaled.residual == pytest.approx(plain.residual, rel=1e-4)


def test_the_table_says_what_other_choices_would_have_been(llama: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.extract_lora(*llama, output=tmp_path / "out", rank=4, table=True)
    plain = surgery.extract_lora(*llama, output=tmp_path / "plain", rank=4)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        tmp_path / "plain" / "adapter_config.json"
    ).read_bytes()
    assert [(c.rank, c.layers) for c in result.table][:4] == [
        (4, "attention"),
        (4, "mlp"),
        (4, "all"),
        (8, "attention"),
    ]
    by_choice = {(c.rank, c.layers): c for c in result.table}
    assert by_choice[4, "all"].residual == pytest.approx(plain.residual, rel=1e-4)
    assert by_choice[4, "all"].parameters == plain.parameters
    eight = surgery.extract_lora(*llama, output=tmp_path / "eight", rank=8)
    assert by_choice[8, "all"].residual == pytest.approx(eight.residual, rel=1e-4)
    assert by_choice[8, "all"].parameters == eight.parameters
    assert by_choice[64, "all"].residual < 1e-6
    missing = 1 - sum(row.share for row in result.rows if "self_attn" in row.name or row.kind == "dense")
    assert by_choice[64, "attention"].residual == pytest.approx(missing**0.5, rel=1e-4)
