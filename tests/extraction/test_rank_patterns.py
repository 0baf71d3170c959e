# SPDX-License-Identifier: Apache-2.0
"""Ranks for some modules by patterns of their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery_formats.errors import FitError
from tests.support.kit import spawn


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("table", [False, True])
def test_some_modules_get_another_rank(kind: Any, table: bool, llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = llama
    patterns = {"layers.0.mlp.*": 7, "mlp.*": 2, "q_proj": 5}
    result = surgery.extract_lora(
        base, tuned, output=tmp_path / "out", rank=surgery.Rank(3, patterns), kind=kind, table=table
    )
    for row in result.rows:
        if row.kind == "low-rank":
            inside = ".mlp." in row.name
            wanted = (7 if ".layers.0." in row.name else 2) if inside else 5 if "q_proj" in row.name else 3
            assert row.rank == wanted, row.name
    plain = surgery.extract_lora(base, tuned, rank=3, dry_run=True, kind=kind)
    by_name = {row.name: row for row in plain.rows}
    worse = {row.rank for row in result.rows if row.residual > by_name[row.name].residual * 1.001}
    assert worse == {2}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 3
    assert sorted(set(config["rank_pattern"].values())) == [2, 5, 7]


def test_a_pattern_without_a_module_or_beside_a_budget_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FitError, match="qproj") as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out", rank=surgery.Rank(patterns={"qproj": 4}))
    assert "q_proj" in str(caught.value.hint)
    with pytest.raises(FitError, match="not with energy"):
        surgery.extract_lora(
            *llama, output=tmp_path / "out", rank=surgery.Rank.energy(0.5) & surgery.Rank(patterns={"q_proj": 4})
        )
    done = spawn("extract-lora", *llama, "-o", tmp_path / "out", "--rank-pattern", "mlp.*=5", "--rank", "2")
    assert done.returncode == 0, done.stderr
    assert surgery.inspect(tmp_path / "out")
    for words in (("q_proj",), ("q_proj=0",), ("q_proj=auto",), ("=4",), ("q_proj=4", "--energy", ".5")):
        done = spawn("extract-lora", *llama, "-o", tmp_path / "no", "--rank-pattern", *words)
        assert done.returncode == 2, words
