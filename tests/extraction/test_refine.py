# SPDX-License-Identifier: Apache-2.0
"""The LoRA of a merge is found beyond the rounding of the merge, from the two models alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from tests.oracles.cases import CASES, build
from tests.support.hand_made import write_adapter, write_model

OUT, INPUTS, RANK = 320, 256, 4
NAME = "model.layers.0.self_attn.q_proj"


def pair(folder: Path, dtype: torch.dtype, steps: float) -> tuple[Path, Path, np.ndarray]:
    """A model of one matrix, and its merge with a LoRA of `steps` units in the last place of its typical value."""
    torch.manual_seed(0)
    weight = (torch.randn(OUT, INPUTS) * 0.02).to(dtype)
    unit = float(torch.finfo(dtype).eps) * 2.0**-6
    B, A = torch.randn(OUT, RANK), torch.randn(RANK, INPUTS)
    B *= steps * unit / (B @ A).square().mean().sqrt()
    base = write_model(folder / "base", {f"{NAME}.weight": weight}, model_type="llama")
    tensors = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}
    lora = write_adapter(folder / "lora", tensors, r=RANK, lora_alpha=RANK, target_modules=["q_proj"])
    surgery.merge(base, lora, output=folder / "merged")
    return base, folder / "merged", (B.double() @ A.double()).numpy()


def error(adapter: Path, true: np.ndarray) -> float:
    (chain,) = read_adapter(adapter).updates.values()
    return float(np.linalg.norm(chain[0].delta(DType.F64) - true) / np.linalg.norm(true))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [0.3, 1.0, 8.0])
def test_the_error_is_far_below_that_of_the_plain_factors(dtype: torch.dtype, steps: float, tmp_path: Path) -> None:
    base, merged, true = pair(tmp_path, dtype, steps)
    plain = surgery.extract_lora(base, merged, output=tmp_path / "plain", rank=RANK, dtype="fp32", kind="lora")
    found = surgery.unmerge(base, merged, output=tmp_path / "found", rank=RANK)
    assert isinstance(found, surgery.ExtractResult)
    assert found.reproduced is not None
    assert found.reproduced[1] > max(found.reproduced[0], 0.97)
    assert error(tmp_path / "found", true) < 0.2 * error(tmp_path / "plain", true)
    assert plain.reproduced is None
    surgery.merge(base, tmp_path / "found", output=tmp_path / "again")
    first, again = (
        surgery.open(folder).main.tensors[f"{NAME}.weight"].read() for folder in (merged, tmp_path / "again")
    )
    assert float((first == again).mean()) == pytest.approx(found.reproduced[1], abs=2e-3)


def test_the_rank_is_found(tmp_path: Path) -> None:
    base, merged, true = pair(tmp_path, torch.bfloat16, 2.0)
    found = surgery.unmerge(base, [merged], output=tmp_path / "found")
    assert {row.rank for row in found.rows if row.rank} == {RANK}
    assert error(tmp_path / "found", true) < 0.01
    assert "of the merged values bit for bit" in str(found)


@pytest.mark.parametrize("name", ["gpt2-lora-bf16", "mixtral-experts-bf16"])
def test_whatever_way_the_weights_lie(name: str, tmp_path: Path) -> None:
    built = build(CASES[name], tmp_path)
    surgery.merge(built.base, built.adapters, output=tmp_path / "merged")
    found = surgery.extract_lora(
        built.base, tmp_path / "merged", output=tmp_path / "found", rank=8, beyond_rounding=True, allow_loss=True
    )
    assert found.reproduced is not None
    assert found.reproduced[1] >= found.reproduced[0]


def test_a_merge_in_float32_has_nothing_beyond(tmp_path: Path) -> None:
    base, merged, true = pair(tmp_path, torch.float32, 1000.0)
    surgery.unmerge(base, merged, output=tmp_path / "found", rank=RANK)
    assert error(tmp_path / "found", true) < 1e-3


def test_the_two_forms_do_not_mix(tmp_path: Path) -> None:
    base, merged, _ = pair(tmp_path, torch.bfloat16, 2.0)
    with pytest.raises(UsageError, match="two models were given"):
        surgery.unmerge(base, merged, output=tmp_path / "never", base_rounding=tmp_path / "file")
    with pytest.raises(UsageError, match="an adapter was given"):
        surgery.unmerge(merged, tmp_path / "lora", output=tmp_path / "never", rank=4)
    with pytest.raises(FitError, match="merged LoRA, without calibration"):
        surgery.extract_lora(base, merged, output=tmp_path / "never", beyond_rounding=True, kind="dora")


def test_an_untouched_model_is_no_merge(tmp_path: Path) -> None:
    base, _, _ = pair(tmp_path, torch.bfloat16, 2.0)
    with pytest.raises(surgery.NothingChangedError):
        surgery.unmerge(base, base, output=tmp_path / "never")
