# SPDX-License-Identifier: Apache-2.0
"""`surgery.Rank`: one argument for the one choice of how many directions a matrix gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery import Rank
from tests.support.kit import ROOT, make_lora

BASE, TUNED = (ROOT / "examples" / name for name in ("base", "tuned"))


def test_a_rank_shows_the_expression_that_makes_it():
    for rank in (
        Rank(16),
        Rank(16, {"mlp.*": 32}),
        Rank(patterns={"mlp.*": 32}),
        Rank.energy(0.95),
        Rank.auto & Rank.budget("20MB"),
        Rank(3) & Rank.error(0.05) & Rank.energy(0.5),
        Rank(),
    ):
        assert eval(repr(rank), {"Rank": Rank}) == rank


def test_both_orders_of_a_joined_choice_are_the_same():
    assert Rank(3) & Rank.energy(0.9) == Rank.energy(0.9) & Rank(3)
    assert Rank.of(3) == Rank(3)


WRONG: dict[str, tuple[Callable[[], Any], type[surgery.SurgeryError], str]] = {
    "zero": (lambda: Rank(0), surgery.FitError, "the rank is 0; it is at least 1"),
    "zero in a pattern": (lambda: Rank(4, {"q_proj": 0}), surgery.FitError, "the rank is 0"),
    "no energy": (lambda: Rank.energy(0), surgery.FitError, "energy is 0; it lies between 0 and 1"),
    "error above 1": (lambda: Rank.error(1.5), surgery.FitError, "error is 1.5; it lies between 0 and 1"),
    "no size": (lambda: Rank.budget("much"), surgery.FitError, "'much' is no budget; write 20MB"),
    "a name": (lambda: Rank.of("auto"), surgery.UsageError, "rank is a whole number or a Rank, not str; Rank.auto"),
    "a fraction": (lambda: Rank.of(0.5), surgery.UsageError, "not float"),
    "a flag": (lambda: Rank.of(True), surgery.UsageError, "not bool"),
    "a budget of a number": (lambda: Rank.budget(5), surgery.UsageError, "a budget is a text such as '20MB', not int"),
    "twice": (lambda: Rank(1) & Rank(2), surgery.UsageError, r"Rank\(1\) and Rank\(2\) both choose number"),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_rank_is_one_clear_error(make: Callable[[], Any], error: type[surgery.SurgeryError], message: str):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "rank", [4, Rank(4, {"mlp.*": 8}), Rank.energy(0.5), Rank.error(0.8), Rank.budget("1MB"), Rank.auto], ids=str
)
def test_an_extraction_takes_every_choice(rank: int | Rank):
    ranks = {row.rank for row in surgery.extract_lora(BASE, TUNED, rank=rank, dry_run=True).rows} - {0}
    assert ranks == {4} if rank == 4 else ranks


def test_what_an_extraction_and_a_resize_cannot_do_is_refused(tmp_path: Path):
    source = make_lora(tmp_path / "lora")
    with pytest.raises(surgery.FitError, match="found in one way only; given: rank, energy"):
        surgery.extract_lora(BASE, TUNED, rank=Rank(4) & Rank.energy(0.5), dry_run=True)
    for rank in (Rank.auto, Rank.budget("1MB"), Rank(1, {"q_proj": 2})):
        with pytest.raises(surgery.FitError, match="is for extractions"):
            surgery.resize(source, rank=rank, dry_run=True)
        with pytest.raises(surgery.FitError, match="is for extractions"):
            surgery.combine([source, (source, 2)], rank=rank, dry_run=True)
    with pytest.raises(surgery.FitError, match="no size was chosen"):
        surgery.resize(source, rank=Rank(), dry_run=True)
    with pytest.raises(surgery.FitError, match="no size was chosen"):
        surgery.extract_lora(BASE, TUNED, rank=Rank(), dry_run=True)


def test_combine_and_resize_take_an_error(tmp_path: Path):
    source = make_lora(tmp_path / "lora")
    for result in (
        surgery.resize(source, rank=Rank.error(0.6), dry_run=True),
        surgery.combine({source: 0.5}, rank=Rank.error(0.6), dry_run=True),
    ):
        assert {module.rank for module in result.modules} <= {1, 2, 3}
        assert all(module.error <= 0.6 for module in result.modules)
