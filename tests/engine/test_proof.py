# SPDX-License-Identifier: Apache-2.0
"""The proof of a written adapter finds every difference that matters, whatever kinds of updates stand for the same delta."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from surgery.engine.factor_proof import distance, scale_error
from surgery.engine.proof import check_errors, compare, compare_prompt, read_back, restricted
from surgery.engine.weight_error import ProofTarget, weight_error
from surgery_formats.adapters.format import Format
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.tensors.views import rows, whole
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, TokenRows, Update
from tests.support.hand_made import write_adapter, write_model
from tests.support.kit import ROOT
from tests.support.toy_kinds import adapter_of, gained_lora, outer_sine
from tests.support.toy_kinds_of_a_weight import row_gain


def stored(file: Path, **values: np.ndarray) -> dict[str, Factor]:
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, file)
    return {tensor.name: Factor.of(tensor) for tensor in open_safetensors(file).tensors}


def error(source: Update, written: Update) -> float:
    (found,) = compare(adapter_of(source), adapter_of(written), None).values()
    return found


def test_two_kinds_that_add_the_same_are_equal(tmp_path: Path) -> None:
    toy = gained_lora(tmp_path / "toy.safetensors")
    factors = stored(tmp_path / "a.safetensors", delta=toy.low_rank().delta(DType.F64))
    assert error(toy, toy.low_rank()) == 0
    assert error(toy, Offset(factors["delta"])) < 1e-12
    assert error(toy, Offset(factors["delta"], 1.01)) == pytest.approx(0.01)


def test_equal_factors_are_told_apart_by_their_scale(tmp_path: Path) -> None:
    lora = gained_lora(tmp_path / "toy.safetensors").low_rank()
    assert error(lora, replace(lora, scale=lora.scale * 1.5)) == pytest.approx(0.5)
    assert scale_error(lora, lora) == 0
    assert scale_error(lora, LoRA(lora.A, Factor(lora.B.tensors, lora.B.shape, lambda b, gain: b), 1.5)) is None


def test_copied_factors_are_not_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"A": np.ones((2, 6), np.float16), "B": np.full((4, 2), 0.5, np.float16)}
    alpha = np.array(4.0, np.float32)
    mine, theirs = stored(tmp_path / "a.safetensors", **half, alpha=alpha), stored(tmp_path / "b.safetensors", **half)
    noted = LoRA(mine["A"], mine["B"], 2.0, 4.0, noted=mine["alpha"].tensors)
    monkeypatch.setattr(LoRA, "prepare", None)  # which forms the delta
    assert error(noted, LoRA(theirs["A"], theirs["B"], 2.5)) == pytest.approx(0.25)
    for factors in (mine, theirs):
        monkeypatch.setattr(type(factors["A"]), "load", None)  # which widens numbers
    assert error(noted, LoRA(theirs["A"], theirs["B"], 2.0)) == 0


def test_a_change_of_nothing_is_nothing_at_any_scale(tmp_path: Path) -> None:
    factors = stored(tmp_path / "a.safetensors", A=np.ones((2, 6)), B=np.zeros((4, 2)))
    lora = LoRA(factors["A"], factors["B"], 1.0)
    assert error(lora, replace(lora, scale=0.4)) == 0


def test_factors_that_are_transformed_into_each_other_are_equal_by_their_delta(tmp_path: Path) -> None:
    lora = gained_lora(tmp_path / "toy.safetensors").low_rank()
    A, B = lora.A.load(DType.F64), lora.B.load(DType.F64)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    factors = stored(tmp_path / "a.safetensors", A=turn.T @ A, B=B @ turn)
    assert error(lora, LoRA(factors["A"], factors["B"], lora.scale)) < 1e-12


def test_a_difference_in_the_last_row_alone_is_found(tmp_path: Path) -> None:
    a, b = np.eye(2, 6), np.ones((4, 2))
    mine, theirs = (
        stored(tmp_path / f"{last}.safetensors", A=a, B=np.concatenate([b[:-1], [[1.0, last]]])) for last in (1.0, 3.0)
    )
    assert error(LoRA(mine["A"], mine["B"], 1.0), LoRA(theirs["A"], theirs["B"], 1.0)) == pytest.approx(2.0)


@pytest.mark.parametrize(("second", "scale", "wrong"), [("own", 1.0, 0.0), ("own", 2.0, 1.0), ("first", 1.0, 1.0)])
def test_bands_of_rows_are_compared_each_with_its_own(second: str, scale: float, wrong: float, tmp_path: Path) -> None:
    """One LoRA of a fused weight, written as two: the other's second half has another scale, or the first's rows."""
    top, bottom = np.array([[1.0, 0.0]] * 2), np.array([[0.0, 1.0]] * 2)
    a = np.eye(2, 6)
    fused = stored(tmp_path / "fused.safetensors", A=a, B=np.concatenate([top, bottom]))
    parts = [
        stored(tmp_path / f"{name}.safetensors", A=a, B=b)
        for name, b in (("top", top), ("bottom", bottom if second == "own" else top))
    ]
    halves = [LoRA(part["A"], part["B"], 1.0) for part in parts]
    halves[1] = replace(halves[1], scale=scale)
    everything = whole((4, 6))
    expected = ProofTarget((4, 6), ((LoRA(fused["A"], fused["B"], 1.0), everything),))
    actual = ProofTarget((4, 6), ((halves[0], rows(everything, 0, 2)), (halves[1], rows(everything, 2, 4))))
    assert weight_error("fused", expected, actual, adapter_of(halves[0])) == pytest.approx(wrong)


def test_virtual_tokens_are_compared_with_those_that_were_written(tmp_path: Path) -> None:
    adapter = read_adapter(ROOT / "examples/prompt")
    assert adapter.prompt is not None
    assert list(compare_prompt(adapter.prompt, adapter).values()) == [0.0]
    doubled = 2 * adapter.prompt.table.read()
    (table,) = stored(tmp_path / "doubled.safetensors", table=doubled)["table"].tensors
    other = replace(adapter, prompt=replace(adapter.prompt, table=table))
    assert list(compare_prompt(adapter.prompt, other).values()) == pytest.approx([1.0])


def test_what_depends_on_the_base_is_compared_by_its_factors(tmp_path: Path) -> None:
    gain, same, other = (row_gain(tmp_path / f"{n}.safetensors", seed) for n, seed in enumerate((1, 1, 2)))
    assert error(gain, same) == 0
    assert error(gain, other) > 0.1
    assert error(gain, outer_sine(tmp_path / "sine.safetensors")) == math.inf


def test_magnitudes_and_direction_of_a_dora_both_count(tmp_path: Path) -> None:
    lora = gained_lora(tmp_path / "toy.safetensors").low_rank()
    factors = stored(tmp_path / "m.safetensors", m=np.ones(32), other=np.full(32, 1.25))
    dora = DoRA(lora, factors["m"])
    assert error(dora, DoRA(lora, factors["m"])) == 0
    assert error(dora, DoRA(lora, factors["other"])) == pytest.approx(0.25)
    assert error(dora, DoRA(replace(lora, scale=lora.scale * 2), factors["m"])) == pytest.approx(1.0)
    with pytest.raises(ProofError, match="of a different kind than the source's"):
        error(dora, lora)


def test_a_weight_that_is_missing_or_new_is_named(tmp_path: Path) -> None:
    toy = gained_lora(tmp_path / "toy.safetensors")
    here, there = adapter_of(toy), adapter_of(toy, "model.layers.1.self_attn.q_proj")
    with pytest.raises(ProofError, match=r"1 weights are missing \(model.layers.0.*1 are new \(model.layers.1"):
        compare(here, there, None)


def test_a_weight_that_is_only_missing_or_only_new_is_named_too(tmp_path: Path) -> None:
    toy = gained_lora(tmp_path / "toy.safetensors")
    one, both = adapter_of(toy), adapter_of(toy)
    both = replace(both, updates={**both.updates, Site("model.layers.1.self_attn.q_proj.weight"): (toy,)})
    with pytest.raises(ProofError, match=r"1 weights are missing \(model.layers.1.*0 are new"):
        compare(both, one, None)
    with pytest.raises(ProofError, match=r"0 weights are missing .*1 are new \(model.layers.1"):
        compare(one, both, None)


def test_a_tie_that_only_one_of_the_two_parts_is_refused(tmp_path: Path) -> None:
    shared, a, b = torch.randn(16, 8), torch.randn(2, 16), torch.randn(8, 2)
    weights = {"model.embed_tokens.weight": shared}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = open_checkpoint(write_model(tmp_path / "base", weights, **config))
    embedding = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    head = {"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()}
    parting = read_adapter(write_adapter(tmp_path / "one", embedding))
    keeping = read_adapter(write_adapter(tmp_path / "both", embedding | head))
    binding = bind([(parting, 1.0)], base)
    assert binding.untied
    compare(parting, parting, binding)
    with pytest.raises(ProofError, match="only one of source and output parts the head"):
        compare(parting, keeping, binding)


def test_a_written_tensor_that_no_update_uses_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of(gained_lora(tmp_path / "toy.safetensors"))
    (unused,) = stored(tmp_path / "unused.safetensors", unused=np.ones(2, np.float32))["unused"].tensors

    class Sloppy:
        name = "sloppy"

        def read(self, path: Path) -> Adapter:
            return replace(adapter, tensors=(*adapter.tensors, unused))

        def detect(self, path: Path) -> bool:
            return True

    with pytest.raises(ProofError, match="are not used by any update") as refused:
        read_back(cast(Format, Sloppy()), tmp_path)
    assert refused.value.tensor == "unused"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_changes_too_great_for_a_number_are_not_equal(tmp_path: Path) -> None:
    great = {"A": np.full((1, 6), 1e200), "B": np.full((4, 1), 1e200), "twice": np.full((4, 1), 2e200)}
    factors = stored(tmp_path / "a.safetensors", **great)
    found = error(LoRA(factors["A"], factors["B"], 1.0), LoRA(factors["A"], factors["twice"], 1.0))
    with pytest.raises(ProofError, match="1 of 1 weights differ"):
        check_errors({"W": found}, 1e-6, tmp_path)


def test_errors_above_the_tolerance_and_nan_are_refused() -> None:
    check_errors({"a": 1e-7, "b": 0.0}, 1e-6, Path("out"))
    for worst in (1e-5, math.nan, math.inf):
        with pytest.raises(ProofError, match="1 of 2 weights differ, 'b'"):
            check_errors({"a": 1e-7, "b": worst}, 1e-6, Path("out"))


def test_the_distance_of_approximations_is_relative_to_the_change(tmp_path: Path) -> None:
    toy, other = gained_lora(tmp_path / "toy.safetensors"), outer_sine(tmp_path / "sine.safetensors")
    assert distance(toy, toy.scaled(0.9)) == pytest.approx(0.1)
    assert distance(toy, other) == math.inf
    assert distance(other, other) == 0
    assert distance(other, other.scaled(0.9)) == math.inf  # not of low rank: equal or nothing
    rows = stored(tmp_path / "rows.safetensors", value=np.ones((2, 4)))["value"]
    assert distance(TokenRows(rows, (1, 2)), TokenRows(rows, (1, 2))) == 0
    assert distance(TokenRows(rows, (1, 2)), TokenRows(rows, (2, 1))) == math.inf


def test_a_restricted_adapter_has_the_tensors_of_what_it_keeps(tmp_path: Path) -> None:
    first, second = gained_lora(tmp_path / "a.safetensors"), outer_sine(tmp_path / "b.safetensors")
    both = {Site("x.weight"): (first,), Site("y.weight"): (second,)}
    whole = Adapter(tmp_path, "toy", "TOY", both, (*first.tensors, *second.tensors))
    part = restricted(whole, {Site("y.weight"): (second,)})
    assert part.tensors == second.tensors
    assert list(part.updates) == [Site("y.weight")]
