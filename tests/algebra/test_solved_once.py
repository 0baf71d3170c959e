# SPDX-License-Identifier: Apache-2.0
"""Factors of one weight are written one after the other, so that each is solved for once and none has to be kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import surgery
from surgery.algebra import combination
from surgery.algebra.sums import LowRankSum, Solved
from surgery_formats.adapters.compact import write as compact
from surgery_formats.linalg.solutions import RecentSolutions
from tests.support.combinations import lora

SHAPES = {
    f"{part}.{module}": (24, 32)
    for part, modules in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for module in (f"{name}_proj" for name in modules)
}
FORMATS = {
    "bare": "out.safetensors",
    "loralib": "out.pt",
    "mlx": "out",
    "onnx-adapter": "out.onnx_adapter",
    "peft": "out",
}


@pytest.fixture
def pair(tmp_path: Path) -> list[tuple[Path, float]]:
    return [(lora(tmp_path / "a", 1, 4, SHAPES), 0.5), (lora(tmp_path / "b", 50, 4, SHAPES), 0.25)]


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_combination_solves_once_for_each_weight_and_keeps_one(
    target: str, rank: int | None, pair: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: Counter[LowRankSum] = Counter()
    solve = LowRankSum.solve

    def counted(self: LowRankSum, rank: int) -> Solved:
        solved[self] += 1
        return solve(self, rank)

    monkeypatch.setattr(LowRankSum, "solve", counted)
    monkeypatch.setattr(combination, "new_solutions", lambda: RecentSolutions(lambda _: 1, groups=1))
    surgery.combine(pair, output=tmp_path / FORMATS[target], to=target, rank=rank)
    assert set(solved.values()) == {1}
    assert len(solved) == len(SHAPES)


def test_a_compact_folder_solves_once_for_each_weight_and_keeps_one(
    pair: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: Counter[str] = Counter()

    class Counted(RecentSolutions):
        def of(self, key, solve, group=None):
            return super().of(key, lambda: (solved.update([key]), solve())[1], group)

    monkeypatch.setattr(compact, "RecentSolutions", lambda nbytes: Counted(nbytes, groups=1))
    surgery.convert(pair[0][0], to="compact", output=tmp_path / "out")
    assert set(solved.values()) == {1}
    assert len(solved) == len(SHAPES)
