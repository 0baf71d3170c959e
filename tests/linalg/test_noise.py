# SPDX-License-Identifier: Apache-2.0
"""Storage rounding: its spacing is exact, its edge is a bound, and a merged LoRA is told apart from a fine-tune."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest

from surgery.extraction.findings import MergedLoRA, Signal
from surgery.extraction.noise import Spectrum, looks_merged, remark
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.linalg.noise import NoiseTally, signal_count, survival
from tests.support.libraries import each_library
from tests.support.spectra import norm

Of = Callable[[numpy.ndarray], Array]
STORED = [DType.BF16, DType.F16, DType.F32]


def stored(values: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    return values.astype(dtype.numpy).astype(numpy.float64)


def weight(m: int, n: int, dtype: DType, seed: int = 0) -> numpy.ndarray:
    """Columns of different size, as trained ones have."""
    random = numpy.random.default_rng(seed)
    columns = numpy.exp(0.3 * random.standard_normal(n))
    return stored(0.02 * random.standard_normal((m, n)) * columns, dtype)


def low_rank(m: int, n: int, rank: int, rms: float, seed: int = 1) -> numpy.ndarray:
    random = numpy.random.default_rng(seed)
    U, V = (numpy.linalg.qr(random.standard_normal((side, rank)))[0] for side in (m, n))
    made = (U * numpy.linspace(1, 0.3, rank)) @ V.T
    return made * (rms / numpy.sqrt(numpy.mean(made**2)))


def spacing(values: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    return numpy.spacing(numpy.abs(values).astype(dtype.numpy)).astype(numpy.float64)


def middle(base: numpy.ndarray, dtype: DType) -> float:
    return float(numpy.median(spacing(base, dtype)))


def add(tally: NoiseTally, variances: numpy.ndarray, of: Of) -> None:
    tally.add_sums(of(variances.sum(1)), of(variances.sum(0)))


@each_library
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rounded", [1, 2])
def test_the_energy_of_noise_is_the_measured_rounding_of_one_side_or_both(dtype: DType, rounded: int, of: Of) -> None:
    parent = 0.02 * numpy.random.default_rng(3).standard_normal((400, 300))
    base = parent if rounded == 2 else stored(parent, dtype)
    tuned = base + low_rank(400, 300, 8, 20 * middle(base, dtype))
    noise = (stored(tuned, dtype) - stored(base, dtype)) - (tuned - base)
    tally = NoiseTally()
    variances = sum(spacing(side, dtype) ** 2 for side in (tuned, base)[:rounded]) / 12
    for start in range(0, 400, 64):
        add(tally, variances[start : start + 64], of)
    assert tally.energy == pytest.approx(float(variances.sum()), rel=1e-6)
    assert tally.energy == pytest.approx(float((noise**2).sum()), rel=0.03)
    edges = [float(variances.sum(axis).max()) ** 0.5 for axis in (0, 1)]
    assert tally.edge == pytest.approx(sum(edges), rel=1e-6)
    assert 0.6 * tally.edge < float(numpy.linalg.norm(noise, 2)) < tally.edge


@each_library
@pytest.mark.parametrize("rms", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_survival_is_the_measured_share_kept_by_a_merge(rms: float, of: Of) -> None:
    base = weight(512, 512, DType.BF16)
    delta = low_rank(512, 512, 16, rms * middle(base, DType.BF16))
    kept = survival(of(base), of(delta), DType.BF16)
    merged = stored(base + delta, DType.BF16) - base
    assert kept.survival == pytest.approx(float((merged * delta).sum() / (delta**2).sum()), rel=1e-9)
    assert kept.rounding == pytest.approx(norm(merged - delta) / norm(delta), rel=1e-9)
    expected = {0.1: (0.0, 0.3), 0.2: (0.2, 0.45), 0.5: (0.6, 0.85), 1.0: (0.88, 0.98), 4.0: (0.995, 1.005)}
    low, high = expected[rms]
    assert low < kept.survival < high


def test_survival_of_a_zero_update_is_nan() -> None:
    assert math.isnan(survival(numpy.ones((2, 2)), numpy.zeros((2, 2)), DType.BF16).survival)


def test_directions_below_float32_resolution_are_not_signal() -> None:
    assert signal_count([1.0, 1e-3, 1e-8], 0.0) == 2
    assert signal_count([1.0, 1e-3, 1e-4], 5e-4) == 2
    assert signal_count([], 0.0) == 0


def spectrum(base: numpy.ndarray, tuned: numpy.ndarray, dtype: DType, known: int | None = None) -> Spectrum:
    values = numpy.linalg.svdvals(tuned - base)
    tally = NoiseTally()
    add(tally, spacing(tuned, dtype) ** 2 / 12, lambda sums: sums)
    few = values[:known].tolist()
    rest = float((values[known:] ** 2).sum()) if known is not None else 0.0
    total = float((values**2).sum())
    return Spectrum(few, tuple(base.shape), total, rest, tally.edge, tally.energy, signal_count(few, tally.edge))


SIZES = [(768, 768), (1024, 256), (256, 512)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("rms", [1.0, 2.0, 16.0])
@pytest.mark.parametrize("known", [None, 8])
def test_a_merged_lora_is_recognised_from_one_ulp_upwards(dtype: DType, rms: float, known: int | None) -> None:
    found = []
    for m, n in SIZES:
        base = weight(m, n, dtype)
        tuned = stored(base + low_rank(m, n, 8, rms * middle(base, dtype)), dtype)
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
        random = numpy.random.default_rng(7)
        U, V = (numpy.linalg.qr(random.standard_normal((side, 96)))[0] for side in (m, n))
        part = (U * numpy.arange(1.0, 97) ** -0.7) @ V.T
        part /= numpy.sqrt(numpy.mean(part**2))
        bulk = random.standard_normal((m, n))
        change = (math.sqrt(1 - low) * bulk + math.sqrt(low) * part) * rms * middle(base, dtype)
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
