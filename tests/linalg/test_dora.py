# SPDX-License-Identifier: Apache-2.0
"""Alternation recovers what a DoRA made, gains nothing where there is nothing, and says so beforehand."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.errors import FitError
from surgery_formats.linalg.fit_dora import DoRAFit, HeldPair, alternate, best_columns, best_rows, row_share
from surgery_formats.linalg.svd import truncated_svd
from tests.support.libraries import each_library
from tests.support.spectra import norm

Of = Callable[[numpy.ndarray], Array]


def made(shape: tuple[int, int], spread: float, common: float = 1.0, seed: int = 0) -> HeldPair:
    """A weight, and the same with rank 8 added and its rows rescaled."""
    random, (m, n) = numpy.random.default_rng(seed), shape
    base = 0.02 * random.standard_normal((m, n))
    low = random.standard_normal((m, 8)) @ random.standard_normal((8, n))
    low *= 0.01 * norm(base) / norm(low)
    scales = common + spread * random.standard_normal((m, 1))
    return HeldPair(base.astype(numpy.float32), (scales * (base + low)).astype(numpy.float32))


def moved(pair: HeldPair, of: Of) -> HeldPair:
    return HeldPair(of(pair.base), of(pair.tuned))


class Streamed:
    """Never whole."""

    def __init__(self, pair: HeldPair) -> None:
        self.pair, self.shape = pair, pair.shape

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        return self.pair.rows(start, stop)


def lora(pair: HeldPair, rank: int) -> tuple[numpy.ndarray, numpy.ndarray, float]:
    found = truncated_svd(pair.tuned - pair.base, rank=rank)
    return *found.factors(), found.relative


def adapted(pair: HeldPair, B: Array, A: Array) -> numpy.ndarray:
    B, A = (to_cpu(factor).astype(numpy.float64) for factor in (B, A))
    return pair.base.astype(numpy.float64) + B @ A


def lengths(v: numpy.ndarray) -> numpy.ndarray:
    return numpy.linalg.norm(v, axis=1, keepdims=True)


def applied(pair: HeldPair, found: DoRAFit) -> numpy.ndarray:
    """DoRA's own equation."""
    v = adapted(pair, found.B, found.A)
    return to_cpu(found.magnitude)[:, None] * v / lengths(v)


@each_library
@pytest.mark.parametrize("shape", [(256, 192), (96, 400), (500, 64)])
@pytest.mark.parametrize(("spread", "common"), [(0.02, 1.0), (0.005, 1.0), (0.02, 1.05), (0.0, 1.0)])
def test_rescaled_rows_plus_rank_8_are_recovered_exactly(
    shape: tuple[int, int], spread: float, common: float, of: Of
) -> None:
    pair = made(shape, spread, common)
    found = alternate(moved(pair, of), 8)
    error = norm(pair.tuned - applied(pair, found)) / norm(pair.tuned - pair.base)
    assert error < 2e-4
    assert found.residual / found.total == pytest.approx(error, abs=2e-5)
    if spread:
        assert lora(pair, 8)[2] > 0.3


@each_library
def test_a_dense_change_gains_nothing_and_row_share_predicts_it(of: Of) -> None:
    random = numpy.random.default_rng(2)
    base = 0.02 * random.standard_normal((256, 192), numpy.float32)
    pair = HeldPair(base, base + numpy.float32(2e-4) * numpy.sign(random.standard_normal((256, 192), numpy.float32)))
    B, A, plain = lora(pair, 8)
    found = alternate(moved(pair, of), 8)
    assert 0.98 * plain < found.residual / found.total <= plain * 1.001
    assert found.steps <= 3
    along, energy = row_share(of(pair.tuned - pair.base - B @ A), of(pair.base + B @ A))
    assert along < 0.02 * energy


@each_library
@pytest.mark.parametrize("spread", [0.005, 0.02])
def test_row_share_detects_a_rescaling_of_similar_rows(spread: float, of: Of) -> None:
    random = numpy.random.default_rng(3)
    U, V = (numpy.linalg.qr(random.standard_normal((side, 192)))[0] for side in (256, 192))
    base = (U / numpy.arange(1, 193)) @ V.T
    tuned = base * (1 + spread * random.standard_normal((256, 1)))
    pair = HeldPair(base.astype(numpy.float32), tuned.astype(numpy.float32))
    B, A, _ = lora(pair, 8)
    along, energy = row_share(of(pair.tuned - pair.base - B @ A), of(pair.base + B @ A))
    assert along > 0.06 * energy
    assert alternate(moved(pair, of), 8).residual < 1e-4 * norm(pair.tuned - pair.base)


@each_library
def test_magnitudes_are_the_least_squares_solution(of: Of) -> None:
    pair = made((64, 48), 0.02)
    B, A, _ = lora(pair, 3)
    v = adapted(pair, B, A)
    rows, columns = (best(moved(pair, of), of(B), of(A)) for best in (best_rows, best_columns))
    for found, along in ((rows, 1), (columns, 0)):
        gain = numpy.expand_dims(to_cpu(found.gain), along)
        assert norm(pair.tuned - gain * v) == pytest.approx(found.residual, rel=1e-5)
        for factor in (0.999, 1.001):
            assert norm(pair.tuned - factor * gain * v) > found.residual
        expected = gain * numpy.linalg.norm(v, axis=along, keepdims=True)
        numpy.testing.assert_allclose(to_cpu(found.magnitude), expected.reshape(-1), rtol=1e-7)


def test_reading_in_blocks_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = made((300, 64), 0.02)
    held = alternate(pair, 8)
    monkeypatch.setattr("surgery_formats.linalg.fit_dora._BLOCK", 64 * 7)
    streamed = alternate(Streamed(pair), 8)
    numpy.testing.assert_allclose(applied(pair, held), applied(pair, streamed), atol=1e-7, rtol=1e-5)


@each_library
def test_a_zero_row_is_refused(of: Of) -> None:
    pair = made((32, 24), 0.02)
    pair.base[3], pair.tuned[3] = 0, 0
    with pytest.raises(FitError, match="zero"):
        alternate(moved(pair, of), 4)
