# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that no trainer means to write, and formats that hold less: each is right, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.kit import make_base

EMBEDDING, UP, NORM = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def checkpoint(folder: Path, changes: Mapping[str, torch.Tensor]) -> Path:
    """The base of `tests.support.kit` in float32 with some tensors put in place of others."""
    return make_base(folder, torch.float32, **changes)


@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (0,)], ids=str)
def test_a_tensor_without_values_is_unchanged(shape: tuple[int, ...], tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.extra.weight": torch.empty(shape)}
    base = checkpoint(tmp_path / "base", extra)
    tuned = checkpoint(tmp_path / "tuned", extra | {UP: torch.randn(64, 32)})
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out")
    assert result.classes["low-rank"] == 1
    assert next(row for row in result.rows if row.name in extra).kind == "unchanged"


def test_experts_of_none_are_unchanged(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.experts.gate_up_proj": torch.empty(0, 3, 4)}
    base = checkpoint(tmp_path / "base", extra)
    tuned = checkpoint(tmp_path / "tuned", extra | {UP: torch.randn(64, 32)})
    assert surgery.extract_lora(base, tuned, output=tmp_path / "out").classes["low-rank"] == 1


def test_a_row_moved_by_less_than_float32_can_square_is_a_changed_row(tmp_path: Path) -> None:
    before = torch.zeros(64, 32)
    after = before.clone()
    after[3], after[5] = 1e-25, 1.0
    base, tuned = checkpoint(tmp_path / "base", {EMBEDDING: before}), checkpoint(tmp_path / "tuned", {EMBEDDING: after})
    surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4)
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[EMBEDDING], after)


def test_values_whose_squares_overflow_are_refused_by_name(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {})
    for number, (name, shape) in enumerate({NORM: (32,), UP: (64, 32)}.items()):
        tuned = checkpoint(tmp_path / f"tuned{number}", {name: torch.full(shape, 1e25)})
        with pytest.raises(FitError, match="too large") as caught:
            surgery.extract_lora(base, tuned, output=tmp_path / "out")
        assert caught.value.tensor == name


def test_codes_beside_numbers_are_refused_by_name_before_anything_is_read(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {})
    tuned = checkpoint(tmp_path / "tuned", {})
    for folder, dtype in ((base, torch.float32), (tuned, torch.float8_e4m3fn)):
        tensors = load_file(folder / "model.safetensors")
        tensors["codes"] = torch.ones(16, 16).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for one, other in ((base, tuned), (tuned, base)):
        with pytest.raises(FitError, match="cannot be subtracted") as caught:
            surgery.extract_lora(one, other, output=tmp_path / "out")
        assert caught.value.tensor == "codes"
        assert caught.value.file == str(other / "model.safetensors")


def test_equal_codes_are_unchanged_where_they_stand_for_nan(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path / "base", {}), checkpoint(tmp_path / "tuned", {UP: torch.randn(64, 32)})
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)
    for folder in (base, tuned):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"codes": codes}, folder / "model.safetensors", {"format": "pt"})
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4)
    assert next(row for row in result.rows if row.name == "codes").kind == "unchanged"


def test_norms_within_a_sequential_are_kept_and_named_once(tmp_path: Path) -> None:
    """As in the blocks of Stable Diffusion: the module's name is a number, and it is no layer."""
    norm = "model.layers.0.in_layers.0"
    before = {f"{norm}.weight": torch.ones(32), f"{norm}.bias": torch.zeros(32)}
    after = {name: torch.randn(32) for name in before}
    base, tuned = checkpoint(tmp_path / "base", before), checkpoint(tmp_path / "tuned", after)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out")
    names = [row.name for row in result.rows]
    assert sorted(names) == sorted(load_file(base / "model.safetensors"))
    assert {row.kind for row in result.rows if row.name in before} == {"dense"}
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(merged[name], after[name]) for name in after)


@pytest.mark.parametrize("form", ["bias", "norm"])
def test_a_bias_of_a_norm_is_in_one_row_whatever_is_asked_for(form: str, tmp_path: Path) -> None:
    norm = "model.layers.0.in_layers.0"
    base = checkpoint(tmp_path / "base", {f"{norm}.weight": torch.ones(32), f"{norm}.bias": torch.zeros(32)})
    tuned = checkpoint(
        tmp_path / "tuned", {f"{norm}.weight": torch.ones(32), f"{norm}.bias": torch.randn(32), UP: torch.randn(64, 32)}
    )
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", dense=(form,), allow_loss=True)
    assert len({row.name for row in result.rows}) == len(result.rows)


def test_what_a_format_cannot_hold_is_dropped_in_the_ledger_too(tmp_path: Path) -> None:
    """mlx has no place for a norm: the adapter lacks it, so the account must."""
    base = checkpoint(tmp_path / "base", {})
    change = {UP: torch.randn(64, 32), NORM: 1 + torch.randn(32)}
    tuned = checkpoint(tmp_path / "tuned", change)
    surgery.extract_lora(base, tuned, output=tmp_path / "peft", rank=4)
    out = tmp_path / "mlx"
    result = surgery.extract_lora(base, tuned, output=out, rank=4, to="mlx", allow_loss=True)
    surgery.merge(base, out, output=tmp_path / "merged")
    before, after, made = (load_file(tmp_path / one / "model.safetensors") for one in ("base", "tuned", "merged"))
    left, whole = (
        sum(float((after[name] - other[name]).double().square().sum()) for name in after) for other in (made, before)
    )
    assert result.residual == pytest.approx((left / whole) ** 0.5, rel=1e-4)
    row = next(row for row in result.rows if row.name == NORM)
    assert (row.kind, row.residual, row.nbytes) == ("dropped", 1.0, 0)
    assert "mlx" in row.why
    ledger = json.loads((out / "surgery_manifest.json").read_text())["extract"]
    assert ledger["tensors"][NORM]["class"] == "dropped"
    assert ledger["lost"] == pytest.approx(row.share, rel=1e-5)
    assert ledger["adapter_nbytes"] == (out / "adapters.safetensors").stat().st_size


def test_a_format_that_holds_nothing_says_why_and_names_a_file_that_is_there(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path / "base", {}), checkpoint(tmp_path / "tuned", {UP: torch.randn(64, 32)})
    with pytest.raises(FitError, match="diffusion models only") as caught:
        surgery.extract_lora(base, tuned, output=tmp_path / "out.safetensors", to="kohya", allow_loss=True)
    assert caught.value.file == str(tuned)


def test_a_format_that_needs_more_than_the_budget_says_so(tmp_path: Path) -> None:
    """A budget is shared out by what PEFT stores; mlx stores more for the same."""
    base = checkpoint(tmp_path / "base", {})
    change = {name: torch.randn(value.shape) for name, value in load_file(base / "model.safetensors").items()}
    tuned = checkpoint(tmp_path / "tuned", {name: value for name, value in change.items() if value.ndim == 2})
    result = surgery.extract_lora(
        base, tuned, output=tmp_path / "out", rank=surgery.Rank.budget("40KB"), to="mlx", kind="lora"
    )
    assert result.adapter_nbytes == (tmp_path / "out/adapters.safetensors").stat().st_size
    told = [warning for warning in result.warnings if "40,000 bytes" in warning]
    assert result.adapter_nbytes > 40_000
    assert len(told) == 1
    fits = surgery.extract_lora(base, tuned, output=tmp_path / "peft", rank=surgery.Rank.budget("40KB"), kind="lora")
    assert fits.adapter_nbytes <= 40_000
    assert not fits.warnings
