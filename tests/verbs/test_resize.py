# SPDX-License-Identifier: Apache-2.0
"""A resized adapter is the best of its rank, and what is small enough stays as it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from surgery import Rank, resize
from surgery_formats.errors import NothingChangedError
from tests.support.adapter_files import (
    assert_close,
    draw,
    peft_deltas,
    write_peft,
)
from tests.support.combinations import Q, best


def _decaying(folder: Path, rank: int = 8) -> Path:
    """Directions whose strengths fall, so that thresholds have something to decide."""
    tensors = {
        f"{Q}.lora_A.weight": draw(1, rank, 32),
        f"{Q}.lora_B.weight": draw(2, 24, rank) * 0.5 ** np.arange(rank, dtype=np.float32),
    }
    return write_peft(folder, tensors, r=rank, lora_alpha=4)


@pytest.mark.parametrize("limit", [3, Rank.energy(0.99), Rank.error(0.1), Rank(2) & Rank.energy(0.99)], ids=str)
def test_resize_is_optimal(tmp_path: Path, limit: int | Rank) -> None:
    source = _decaying(tmp_path / "a")
    wanted = peft_deltas(source)["model.layers.0.self_attn.q_proj"]
    result = resize(source, output=tmp_path / "b", rank=limit)
    rank = result.modules[0].rank
    norm = float(np.linalg.norm(wanted))
    apart = np.linalg.norm(peft_deltas(tmp_path / "b")["model.layers.0.self_attn.q_proj"] - wanted)
    assert apart <= 1.0001 * best(wanted, rank) + 1e-6 * norm
    chosen = Rank.of(limit)
    allowed = chosen.most_error or math.sqrt(1 - (chosen.least_energy or 1.0))
    needed = next(r for r in range(1, 9) if best(wanted, r) <= allowed * norm + 1e-6 * norm)
    assert rank == min(chosen.number or 8, needed)
    dry = resize(source, rank=limit, dry_run=True)
    assert dry.error == pytest.approx(result.error, rel=1e-4)


def test_resize_never_pads(tmp_path: Path) -> None:
    source = _decaying(tmp_path / "a")
    with pytest.raises(NothingChangedError, match="the highest is 8") as caught:
        resize(source, output=tmp_path / "b", rank=16)
    assert "zeros" in str(caught.value)


def test_resize_keeps_what_is_small_enough(tmp_path: Path) -> None:
    stem = Q.replace("q_proj", "v_proj")
    tensors = {
        f"{Q}.lora_A.weight": draw(1, 6, 32), f"{Q}.lora_B.weight": draw(2, 24, 6),
        f"{stem}.lora_A.weight": draw(3, 2, 32), f"{stem}.lora_B.weight": draw(4, 24, 2),
    }  # fmt: skip
    source = write_peft(tmp_path / "a", tensors, r=6, rank_pattern={"v_proj": 2})
    result = resize(source, output=tmp_path / "b", rank=4)
    assert [(one.outcome, one.rank) for one in result.modules] == [("approximated", 4), ("kept", 2)]
    assert np.array_equal(
        load_file(tmp_path / "b/adapter_model.safetensors")[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_B.weight"]
    )
    assert_close(
        {n: v for n, v in peft_deltas(tmp_path / "b").items() if "v_proj" in n},
        {n: v for n, v in peft_deltas(source).items() if "v_proj" in n},
    )
