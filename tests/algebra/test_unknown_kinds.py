# SPDX-License-Identifier: Apache-2.0
"""Kinds that no module of the product knows work in every verb by what they answer about themselves, or are refused in its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import surgery
from surgery.algebra.projection_rows import cut_rows, join_rows
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.reports.targets import touched
from surgery_formats import read_adapter
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.testing.update import UPDATE_CHECKS, UpdateCase
from surgery_formats.updates import Factor, LoRA, Stacked
from tests.oracles import disk, recipes
from tests.support.toy_kinds import adapter_of, gained_experts, gained_lora, halves, outer_sine
from tests.support.toy_kinds_of_a_weight import lengthened, overwritten, overwritten_by_two, row_gain

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipes.build("llama", tmp_path_factory.mktemp("base") / "llama", hidden_size=32)


def change(base: Path, adapter: Adapter | Path, out: Path) -> torch.Tensor:
    """What merging an adapter changes of q_proj."""
    surgery.merge(base, adapter, output=out, dtype="fp32")
    key = f"{Q}.weight"
    return disk.read_tensors(out)[key].double() - disk.read_tensors(base)[key].double()


# --- of low rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["peft", "mlx"])
def test_a_low_rank_kind_is_converted_as_the_lora_it_is(base: Path, tmp_path: Path, target: str) -> None:
    adapter = adapter_of(gained_lora(tmp_path / "a.safetensors"))
    result = surgery.convert(adapter, target, output=tmp_path / "out", base=base)
    assert [entry.outcome for entry in result.entries] == ["folded"]
    assert result.max_error < 1e-6
    wanted = change(base, adapter, tmp_path / "before")
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(change(base, tmp_path / "out", tmp_path / "after"), wanted, atol=2e-6, rtol=0)


def test_a_low_rank_kind_is_coded_with_the_error_its_writer_states(tmp_path: Path) -> None:
    adapter = adapter_of(gained_lora(tmp_path / "a.safetensors"))
    result = surgery.convert(adapter, "compact", output=tmp_path / "out")
    assert [entry.outcome for entry in result.entries] == ["approximated"]
    assert 0 < result.max_approximation < 0.02


def test_a_low_rank_kind_is_added_to_a_lora(base: Path, tmp_path: Path) -> None:
    toy = adapter_of(gained_lora(tmp_path / "a.safetensors"))
    surgery.convert(adapter_of(gained_lora(tmp_path / "b.safetensors", seed=2)), "peft", output=tmp_path / "lora")
    result = surgery.combine([(toy, 0.5), (tmp_path / "lora", -2.0)], to="peft", output=tmp_path / "sum")
    assert [(module.outcome, module.ranks, module.rank) for module in result.modules] == [("exact", (3, 3), 6)]
    wanted = 0.5 * change(base, toy, tmp_path / "1") - 2.0 * change(base, tmp_path / "lora", tmp_path / "2")
    torch.testing.assert_close(change(base, tmp_path / "sum", tmp_path / "3"), wanted, atol=4e-6, rtol=0)


def test_a_low_rank_kind_is_resized_to_the_best_of_its_rank(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(gained_lora(tmp_path / "a.safetensors"))
    result = surgery.resize(adapter, rank=1, to="peft", output=tmp_path / "out")
    values = torch.linalg.svdvals(change(base, adapter, tmp_path / "1"))
    best = float(values[1:].norm() / values.norm())
    assert result.modules[0].error == pytest.approx(best, rel=1e-4)


def test_a_low_rank_kind_is_compared_with_a_lora_by_their_deltas(tmp_path: Path) -> None:
    toy = gained_lora(tmp_path / "a.safetensors")
    surgery.convert(adapter_of(toy), "peft", output=tmp_path / "lora")
    assert surgery.diff(adapter_of(toy), tmp_path / "lora").equal
    other = surgery.diff(adapter_of(toy), adapter_of(toy.scaled(1.1)))
    assert not other.equal
    assert other.difference == pytest.approx(0.1)


def test_a_low_rank_kind_fills_the_slot_of_a_lora(base: Path, tmp_path: Path) -> None:
    toy = gained_lora(tmp_path / "toy.safetensors")
    surgery.export_onnx(base, swap=[adapter_of(toy)], output=tmp_path / "out", dtype="fp32")
    (file,) = {*(tmp_path / "out" / "adapters").glob("*.onnx_adapter")} - {
        tmp_path / "out" / "adapters" / "none.onnx_adapter"
    }
    arrays = read_adapter_file(file)
    product = arrays[f"{Q}.lora_A.weight"] @ arrays[f"{Q}.lora_B.weight"]
    assert np.abs(product.T - toy.low_rank().delta(DType.F64)).max() < 1e-6


# --- of other forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gained_lora, halves, lengthened, outer_sine, overwritten, row_gain])
def test_the_toys_conform(tmp_path: Path, make) -> None:
    case = UpdateCase(make(tmp_path / "a.safetensors"))
    for check in UPDATE_CHECKS:
        check(case)


def test_what_is_stored_in_full_is_converted_as_the_offset_it_is(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(halves(tmp_path / "a.safetensors"))
    result = surgery.convert(adapter, "compact", output=tmp_path / "out")
    assert [(entry.outcome, entry.detail) for entry in result.entries] == [("folded", "halves as offset")]
    assert surgery.diff(adapter, tmp_path / "out").equal
    wanted = change(base, adapter, tmp_path / "before")
    torch.testing.assert_close(change(base, tmp_path / "out", tmp_path / "after"), wanted, atol=2e-6, rtol=0)


def test_what_is_stored_in_full_is_added_up(base: Path, tmp_path: Path) -> None:
    one, other = (adapter_of(halves(tmp_path / f"{seed}.safetensors", seed)) for seed in (1, 2))
    result = surgery.combine([(one, 0.5), (other, -2.0)], to="compact", output=tmp_path / "sum")
    assert [module.outcome for module in result.modules] == ["exact"]
    wanted = 0.5 * change(base, one, tmp_path / "1") - 2.0 * change(base, other, tmp_path / "2")
    torch.testing.assert_close(change(base, tmp_path / "sum", tmp_path / "3"), wanted, atol=4e-6, rtol=0)


def test_a_stack_of_a_low_rank_kind_is_a_stack_of_loras(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.switch_mlp.up_proj"
    one, other = (gained_experts(tmp_path, seeds) for seeds in ((1, 2, 3), (4, 5, 6)))
    (entry,) = touched(adapter_of(one, module))
    assert (entry.kind, entry.role, entry.experts) == ("gained experts", "expert", 3)
    surgery.convert(adapter_of(one, module), "compact", output=tmp_path / "coded")
    result = surgery.combine(
        [adapter_of(one, module), (adapter_of(other, module), -2.0)], to="mlx", output=tmp_path / "sum"
    )
    assert [(entry.outcome, entry.ranks, entry.rank) for entry in result.modules] == [("exact", (3, 3), 6)]
    ((stack,),) = read_adapter(tmp_path / "sum").updates.values()
    assert isinstance(stack, Stacked)
    for sum_, mine, theirs in zip(stack.experts, one.experts, other.experts, strict=True):
        wanted = mine.low_rank().delta(DType.F64) - 2.0 * theirs.low_rank().delta(DType.F64)
        np.testing.assert_allclose(sum_.delta(DType.F64), wanted, atol=1e-5, rtol=0)


def test_a_whole_parameter_of_any_kind_takes_the_place_of_the_base_s(base: Path, tmp_path: Path) -> None:
    update = overwritten(tmp_path / "a.safetensors")
    adapter = adapter_of(update)
    result = surgery.convert(adapter, "peft", output=tmp_path / "out")
    assert [entry.outcome for entry in result.entries] == ["exact"]
    for number, source in enumerate((adapter, tmp_path / "out")):
        surgery.merge(base, source, output=tmp_path / f"merged{number}")
        assert disk.read_tensors(tmp_path / f"merged{number}")[f"{Q}.weight"].equal(
            torch.from_numpy(update.stored.read())
        )
    (report,) = surgery.report(adapter, base=base).adapters
    assert report.trained == update.stored.numel


def test_a_direction_with_lengths_of_any_kind_is_cut_to_rows_and_joined(tmp_path: Path) -> None:
    update, site = lengthened(tmp_path / "a.safetensors"), Site(f"{Q}.weight")
    heights = (8, 24)
    parts = [cut_rows(update, site, start, stop, tmp_path) for start, stop in ((0, 8), (8, 32))]
    joined = join_rows([(part,) for part in parts], heights, site, tmp_path)
    assert [one.kind for one in (*parts, joined)] == ["lengthened"] * 3
    assert [part.shape for part in parts] == [(8, 32), (24, 32)]
    assert type(joined) is type(update)
    np.testing.assert_array_equal(joined.magnitude.load(DType.F64), update.magnitude.load(DType.F64))
    np.testing.assert_allclose(joined.direction.delta(DType.F64), update.direction.delta(DType.F64), rtol=1e-7)


# --- not of low rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lengthened, outer_sine, row_gain])
@pytest.mark.parametrize("target", ["peft", "mlx", "compact"])
def test_a_format_that_has_no_such_kind_is_named(base: Path, tmp_path: Path, make, target: str) -> None:
    adapter = adapter_of(make(tmp_path / "a.safetensors"))
    with pytest.raises(FitError, match=f"{target} cannot hold 1 of 1 parts.*(has|have) no {adapter.kind}"):
        surgery.convert(adapter, target, output=tmp_path / "out", base=base)


def test_what_depends_on_the_base_is_refused_in_the_words_of_the_verb(tmp_path: Path) -> None:
    one, other = (adapter_of(row_gain(tmp_path / f"{seed}.safetensors", seed)) for seed in (1, 2))
    with pytest.raises(FitError, match="by one of them as row gain: their sum depends on the base") as caught:
        surgery.combine([one, other], to="peft", output=tmp_path / "out")
    assert caught.value.hint == (
        "give the base (`base=`) and a rank (`rank=`), or merge them into the base and extract a LoRA from the result"
    )
    with pytest.raises(FitError, match=r"of which 0\.5 times depends on the base"):
        surgery.combine([(one, 0.5)], to="peft", output=tmp_path / "out")
    with pytest.raises(FitError, match="row gain, whose change depends on the base: its rank cannot change without it"):
        surgery.resize(one, rank=2, to="peft", output=tmp_path / "out")


def test_what_adds_without_low_rank_needs_a_rank_and_no_base(base: Path, tmp_path: Path) -> None:
    one, other = (adapter_of(outer_sine(tmp_path / f"{seed}.safetensors", seed)) for seed in (1, 2))
    with pytest.raises(FitError, match="by one of them as outer sine: their sum has no low rank") as caught:
        surgery.combine([one, other], to="peft", output=tmp_path / "out")
    assert str(caught.value.hint).startswith("give a rank (`rank=`), or merge them")
    surgery.combine([one, other], to="peft", rank=32, output=tmp_path / "sum")
    wanted = change(base, one, tmp_path / "1") + change(base, other, tmp_path / "2")
    torch.testing.assert_close(change(base, tmp_path / "sum", tmp_path / "3"), wanted, atol=4e-6, rtol=0)


def test_with_the_base_and_a_rank_a_change_of_any_kind_is_cut_to_it(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(row_gain(tmp_path / "a.safetensors"))
    result = surgery.resize(adapter, rank=4, base=base, to="peft", output=tmp_path / "out")
    values = torch.linalg.svdvals(change(base, adapter, tmp_path / "1"))
    assert result.modules[0].error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)


@pytest.mark.parametrize("make", [outer_sine, row_gain])
def test_what_a_slot_cannot_hold_is_refused_by_its_kind(base: Path, tmp_path: Path, make) -> None:
    adapter = adapter_of(make(tmp_path / "a.safetensors"))
    with pytest.raises(FitError, match=f"{adapter.kind} for '{Q}.weight': a slot holds a low-rank addition only"):
        surgery.export_onnx(base, swap=[adapter], output=tmp_path / "out")


@pytest.mark.parametrize("make", [outer_sine, row_gain, overwritten_by_two])
def test_factors_are_compared_where_no_delta_is_known(tmp_path: Path, make) -> None:
    one, same, other = (adapter_of(make(tmp_path / f"{n}.safetensors", seed)) for n, seed in enumerate((1, 1, 2)))
    assert surgery.diff(one, same).equal
    result = surgery.diff(one, other)
    assert f"the factors of its {one.kind} differ" in result.modules[0].note


def test_a_direction_is_compared_by_its_delta_and_its_lengths_by_their_norm(tmp_path: Path) -> None:
    update = lengthened(tmp_path / "a.safetensors")
    A, B = (factor.tensors[0] for factor in (update.direction.A, update.direction.B))
    twice, half = Factor((A,), A.shape, lambda t: 2 * t), Factor((B,), B.shape, lambda t: t / 2)
    same = update.rebuilt(LoRA(twice, half, update.scale), update.magnitude)
    assert surgery.diff(adapter_of(update), adapter_of(same)).equal
    longer = Factor(update.magnitude.tensors, update.magnitude.shape, lambda t: 1.5 * t)
    result = surgery.diff(adapter_of(update), adapter_of(update.rebuilt(update.direction, longer)))
    assert result.modules[0].note == "magnitudes differ by 0.5"


def test_a_kind_is_reported_by_its_own_name(base: Path, tmp_path: Path) -> None:
    for update in (gained_lora(tmp_path / "a.safetensors"), row_gain(tmp_path / "b.safetensors")):
        (report,) = surgery.report(adapter_of(update), base=base).adapters
        assert report.trained == sum(tensor.numel for tensor in update.tensors)
        assert isinstance(update.low_rank(), LoRA) == (update.rank == 3)
