# SPDX-License-Identifier: Apache-2.0
"""Bits within a number of bytes: never more of them, the better the more there are, and where they help most."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.onnx.export.bit_budget import Choice, allocated
from surgery.onnx.export.coded_plan import QUANTISED
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.oracles import recipes
from tests.support.block_codes import decoded

WIDE = {"hidden_size": 64, "intermediate_size": 96}
CHOICES = [
    Choice(("a",), ((4, 10, 8.0), (8, 20, 1.0), (16, 40, 0.0))),
    Choice(("b", "c"), ((4, 10, 2.0), (8, 20, 0.5), (16, 40, 0.0))),
    Choice(("d",), ((4, 30, 3.0), (8, 60, 2.9), (16, 120, 0.0))),
]


def cost(found):
    return sum({bits % 16: nbytes for bits, nbytes, _ in each.options}[found[each.names[0]]] for each in CHOICES)


def error(found):
    return sum({bits % 16: wrong for bits, _, wrong in each.options}[found[each.names[0]]] for each in CHOICES)


def test_bits_go_where_they_take_away_most_error_for_a_byte():
    assert allocated(CHOICES, 50) == {"a": 4, "b": 4, "c": 4, "d": 4}
    assert allocated(CHOICES, 60) == {"a": 8, "b": 4, "c": 4, "d": 4}
    assert allocated(CHOICES, 70) == {"a": 8, "b": 8, "c": 8, "d": 4}
    assert allocated(CHOICES, 200) == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert allocated(CHOICES, 199) == {"a": 0, "b": 8, "c": 8, "d": 0}  # 8 bits hardly help d: straight to what is kept
    with pytest.raises(FitError, match="with the fewest bits"):
        allocated(CHOICES, 49)


def test_no_other_choice_within_the_same_bytes_is_better_where_bytes_are_used_up():
    every = [
        dict(zip(("a", "b", "c", "d"), (a, b, b, d), strict=True)) for a, b, d in itertools.product((4, 8, 0), repeat=3)
    ]
    for budget in range(50, 201, 10):
        found = allocated(CHOICES, budget)
        assert cost(found) <= budget
        best = min(error(other) for other in every if cost(other) <= cost(found))
        assert error(found) == pytest.approx(best)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", **WIDE)


def test_the_file_stays_within_the_budget_and_more_bytes_are_less_error(base, tmp_path):
    before = None
    for budget in (100_000, 120_000, 160_000, 220_000):
        out = tmp_path / str(budget)
        ledger = export_onnx(base, output=out, weights_type="mixed", budget=budget).ledger
        assert os.path.getsize(out / QUANTISED) <= budget
        found = sum(error.error for _, error in ledger.coded)
        assert before is None or found < before
        before = found
        surgery.verify(out, against=base)
    with pytest.raises(FitError, match="more than 50 kB"):
        export_onnx(base, output=tmp_path / "out", weights_type="mixed", budget=50_000)


def test_queries_keys_and_values_have_the_same_bits_and_stay_one_product(base, tmp_path):
    ledger = export_onnx(base, output=tmp_path / "out", weights_type="mixed", budget=120_000).ledger
    whys = {tensor.weight: tensor.why for tensor, _ in ledger.coded}
    for layer in range(3):
        at = f"model.layers.{layer}.self_attn"
        assert len({whys.get(f"{at}.{name}_proj.weight") for name in "qkv"}) == 1
    assert len(set(whys.values())) == 2


def test_inputs_of_a_calibration_say_where_bits_help(base, tmp_path):
    """A map gets more bits if its inputs lie where its codes are wrong, and not for its values alone."""
    weight = "model.layers.1.mlp.down_proj.weight"
    export_onnx(base, output=tmp_path / "four", weights_type="int4")
    values = read_rows(open_checkpoint(base).main.parameters[weight].storage)
    wrong = decoded(tmp_path / "four")[weight][:, :96] - values
    worst = np.linalg.eigh(wrong.T @ wrong)[1][:, -4:].T
    rows = np.random.default_rng(0).normal(size=(64, 4)) @ worst
    inputs = tmp_path / "inputs.safetensors"
    save_file({f"{weight.removesuffix('.weight')}.activations": rows.astype(np.float32)}, inputs)
    budget = os.path.getsize(tmp_path / "four" / QUANTISED) + 9000

    def has_more_bits(name, **options):
        ledger = export_onnx(base, output=tmp_path / name, weights_type="mixed", budget=budget, **options).ledger
        whys = {tensor.weight: tensor.why for tensor, _ in ledger.coded}
        return not whys.get(weight, "kept").startswith("4")

    assert not has_more_bits("without")
    assert has_more_bits("with", calibration=inputs)


def test_a_budget_goes_with_mixed_types_alone(base, tmp_path):
    for options in ({"weights_type": "mixed"}, {"weights_type": "int4", "budget": 10**6}):
        with pytest.raises(UsageError, match="mixed types have a budget"):
            export_onnx(base, output=tmp_path / "out", **options)
