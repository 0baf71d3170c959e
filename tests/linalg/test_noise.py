# SPDX-License-Identifier: Apache-2.0
"""Storage rounding: its spacing is exact, its edge is a bound, and a merged LoRA is told apart from a fine-tune."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.extraction.findings import MergedLoRA, Signal
from surgery.extraction.noise import Spectrum, looks_merged, remark
from surgery_formats.dtypes import DType
from surgery_formats.linalg.noise import MANTISSA, NoiseTally, signal_count, survival

STORED = [DType.BF16, DType.F16, DType.F32]


def stored(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    return values.to(dtype.torch).double()


def weight(m: int, n: int, dtype: DType, seed: int = 0) -> torch.Tensor:
    """Columns of different size, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.exp(0.3 * torch.randn(n, generator=generator, dtype=torch.float64))
    return stored(0.02 * torch.randn(m, n, generator=generator, dtype=torch.float64) * columns, dtype)


def low_rank(m: int, n: int, rank: int, rms: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
    made = (U * torch.linspace(1, 0.3, rank, dtype=torch.float64)) @ V.T
    return made * rms / made.square().mean().sqrt()


def spacing(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Distance of each value to its neighbours in `dtype`."""
    bits, smallest = MANTISSA[dtype]
    exponents = (torch.frexp(values.double()).exponent - 1).clamp(min=smallest)
    return torch.exp2(torch.where(values == 0, smallest, exponents).double() - bits)


def variance(*sides: tuple[torch.Tensor, DType]) -> torch.Tensor:
    """Of the rounding error of each element of a difference, one or both of whose sides were rounded."""
    return torch.stack([spacing(values, dtype).square() for values, dtype in sides]).sum(0) / 12


def add(tally: NoiseTally, *sides: tuple[torch.Tensor, DType]) -> None:
    variances = variance(*sides)
    tally.add_sums(variances.sum(1), variances.sum(0))


@given(st.floats(min_value=2.0**-100, max_value=2.0**100), st.sampled_from([DType.BF16, DType.F32]))
def test_spacing_is_the_distance_to_the_next_value(value: float, dtype: DType) -> None:
    exact = torch.tensor([value]).to(dtype.torch)
    above = torch.nextafter(exact, torch.tensor([math.inf], dtype=exact.dtype))
    assert float(spacing(exact, dtype)) == float(above.double() - exact.double())
    assert torch.equal(spacing(-exact.double(), dtype), spacing(exact, dtype))


def test_spacing_of_float16_down_to_its_subnormals() -> None:
    every = torch.arange(1, 0x7BFF, dtype=torch.int16).view(torch.float16)
    following = torch.arange(2, 0x7C00, dtype=torch.int16).view(torch.float16)
    assert torch.equal(spacing(every, DType.F16).double(), following.double() - every.double())
    assert float(spacing(torch.zeros(1), DType.F16)) == 2.0**-24


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rounded", [1, 2])
def test_the_energy_of_noise_is_the_measured_rounding_of_one_side_or_both(dtype: DType, rounded: int) -> None:
    parent = 0.02 * torch.randn(400, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    base = parent if rounded == 2 else stored(parent, dtype)
    tuned = base + low_rank(400, 300, 8, 20 * float(spacing(base, dtype).median()))
    noise = (stored(tuned, dtype) - stored(base, dtype)) - (tuned - base)
    sides = [(stored(tuned, dtype), dtype), (stored(base, dtype), dtype)][:rounded]
    exact = variance(*sides)
    assert float(noise.square().sum()) == pytest.approx(float(exact.sum()), rel=0.03)
    tally = NoiseTally()
    for start in range(0, 400, 64):
        add(tally, *((values[start : start + 64], kind) for values, kind in sides))
    assert tally.energy == pytest.approx(float(exact.sum()), rel=1e-6)
    assert 0.6 * tally.edge < float(torch.linalg.matrix_norm(noise, 2)) < tally.edge
    assert tally.edge == pytest.approx(float(exact.sum(1).max().sqrt() + exact.sum(0).max().sqrt()), rel=1e-6)


@pytest.mark.parametrize("rms", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_survival_is_the_measured_share_kept_by_a_merge(rms: float) -> None:
    base = weight(512, 512, DType.BF16)
    delta = low_rank(512, 512, 16, rms * float(spacing(base, DType.BF16).median()))
    kept = survival(base, delta, DType.BF16)
    merged = (base + delta).bfloat16().double() - base
    assert kept.survival == pytest.approx(float((merged * delta).sum() / delta.square().sum()), rel=1e-9)
    assert kept.rounding == pytest.approx(float((merged - delta).norm() / delta.norm()), rel=1e-9)
    expected = {0.1: (0.0, 0.3), 0.2: (0.2, 0.45), 0.5: (0.6, 0.85), 1.0: (0.88, 0.98), 4.0: (0.995, 1.005)}
    low, high = expected[rms]
    assert low < kept.survival < high


def test_survival_of_a_zero_update_is_nan() -> None:
    assert math.isnan(survival(torch.ones(2, 2), torch.zeros(2, 2), DType.BF16).survival)


def test_directions_below_float32_resolution_are_not_signal() -> None:
    assert signal_count([1.0, 1e-3, 1e-8], 0.0) == 2
    assert signal_count([1.0, 1e-3, 1e-4], 5e-4) == 2
    assert signal_count([], 0.0) == 0


def spectrum(base: torch.Tensor, tuned: torch.Tensor, dtype: DType, known: int | None = None) -> Spectrum:
    values = torch.linalg.svdvals(tuned - base)
    tally = NoiseTally()
    add(tally, (tuned, dtype))
    few = values[:known].tolist()
    rest = float(values[known:].square().sum()) if known is not None else 0.0
    total = float(values.square().sum())
    return Spectrum(few, tuple(base.shape), total, rest, tally.edge, tally.energy, signal_count(few, tally.edge))


SIZES = [(768, 768), (1024, 256), (256, 512)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rms", [1.0, 2.0, 16.0])
@pytest.mark.parametrize("known", [None, 8])
def test_a_merged_lora_is_recognised_from_one_ulp_upwards(dtype: DType, rms: float, known: int | None) -> None:
    found = []
    for m, n in SIZES:
        base = weight(m, n, dtype)
        tuned = stored(base + low_rank(m, n, 8, rms * float(spacing(base, dtype).median())), dtype)
        found.append(spectrum(base, tuned, dtype, known))
    assert [one.signal for one in found] == [8, 8, 8]
    assert looks_merged(found) == MergedLoRA(8, 3, 3)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rms", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("low", [0.0, 0.5, 0.9])
def test_a_full_fine_tune_is_not_taken_for_a_merged_lora(dtype: DType, rms: float, low: float) -> None:
    """A bulk of independent changes with a decaying spectrum on it: what Adam leaves."""
    found = []
    for m, n in SIZES[1:]:
        base = weight(m, n, dtype)
        generator = torch.Generator().manual_seed(7)
        U, _ = torch.linalg.qr(torch.randn(m, 96, generator=generator, dtype=torch.float64))
        V, _ = torch.linalg.qr(torch.randn(n, 96, generator=generator, dtype=torch.float64))
        part = (U * torch.arange(1, 97).double().pow(-0.7)) @ V.T
        part /= part.square().mean().sqrt()
        bulk = torch.randn(m, n, generator=generator, dtype=torch.float64)
        change = (math.sqrt(1 - low) * bulk + math.sqrt(low) * part) * rms * float(spacing(base, dtype).median())
        found += [spectrum(base, stored(base + change, dtype), dtype, known) for known in (None, 4, 16)]
    assert looks_merged(found) is None


def test_a_merged_lora_is_reported_only_if_layers_agree() -> None:
    one = Spectrum([3.0, 2.0, 0.1], (100, 100), 13.01, 0.9, 0.5, 1.0, 2)
    other = Spectrum([3.0, 2.0, 1.0, 0.1], (100, 100), 14.01, 0.9, 0.5, 1.0, 3)
    assert looks_merged([one] * 20) == MergedLoRA(2, 20, 20)
    assert looks_merged([one] * 19 + [other]) == MergedLoRA(2, 19, 20)
    assert looks_merged([one] * 15 + [other] * 5) is None
    assert looks_merged([]) is None


def test_remarks_suggest_a_rank_without_noise() -> None:
    signal = Signal(0.0023, 50, 384, True, 0.93)
    assert remark(64, signal) == "rank 64 asked: 14 directions are rounding noise; suggest <= 50"
    assert remark(51, signal, asked=False) == "rank 51: 1 direction is rounding noise; suggest <= 50"
    assert not remark(50, signal)
    assert not remark(16, Signal(0.0023, 16, 384, False, 0.93))
    assert "no direction" in remark(4, Signal(1.0, 0, 384, True, 0.1))
