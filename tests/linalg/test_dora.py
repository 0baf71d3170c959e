# SPDX-License-Identifier: Apache-2.0
"""Alternation recovers what a DoRA made, gains nothing where there is nothing, and says so beforehand."""

from __future__ import annotations

import pytest
import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.fit_dora import HeldPair, alternate, best_rows, row_share
from surgery_formats.linalg.svd import truncated_svd


def made(shape: tuple[int, int], spread: float, common: float = 1.0, seed: int = 0) -> HeldPair:
    """A weight, and the same with rank 8 added and its rows rescaled."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    base = 0.02 * torch.randn(m, n, generator=generator, dtype=torch.float64)
    low = torch.randn(m, 8, generator=generator, dtype=torch.float64)
    low = low @ torch.randn(8, n, generator=generator, dtype=torch.float64)
    low *= 0.01 * base.norm() / low.norm()
    scales = common + spread * torch.randn(m, 1, generator=generator, dtype=torch.float64)
    return HeldPair(base.float(), (scales * (base + low)).float())


class Streamed:
    """Never whole."""

    def __init__(self, pair: HeldPair) -> None:
        self.pair, self.shape = pair, pair.shape

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair.rows(start, stop)


def lora(pair: HeldPair, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    found = truncated_svd(pair.tuned - pair.base, rank=rank)
    return *found.factors(), found.relative


def applied(pair: HeldPair, found: object) -> torch.Tensor:
    """DoRA's own equation."""
    v = pair.base.double() + found.B.double() @ found.A.double()  # type: ignore[attr-defined]
    return found.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(256, 192), (96, 400), (500, 64)])
@pytest.mark.parametrize(("spread", "common"), [(0.02, 1.0), (0.005, 1.0), (0.02, 1.05), (0.0, 1.0)])
def test_rescaled_rows_plus_rank_8_are_recovered_exactly(shape: tuple[int, int], spread: float, common: float) -> None:
    pair = made(shape, spread, common)
    found = alternate(pair, 8)
    error = (pair.tuned.double() - applied(pair, found)).norm() / (pair.tuned - pair.base).double().norm()
    assert float(error) < 2e-4
    assert found.residual / found.total == pytest.approx(float(error), abs=2e-5)
    if spread:
        assert lora(pair, 8)[2] > 0.3


def test_a_dense_change_gains_nothing_and_row_share_predicts_it() -> None:
    generator = torch.Generator().manual_seed(2)
    base = 0.02 * torch.randn(256, 192, generator=generator)
    pair = HeldPair(base, base + 2e-4 * torch.randn(256, 192, generator=generator).sign())
    B, A, plain = lora(pair, 8)
    found = alternate(pair, 8)
    assert 0.98 * plain < found.residual / found.total <= plain * 1.001
    assert found.steps <= 3
    along, energy = row_share(pair.tuned - pair.base - B @ A, pair.base + B @ A)
    assert along < 0.02 * energy


@pytest.mark.parametrize("spread", [0.005, 0.02])
def test_row_share_detects_a_rescaling_of_similar_rows(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    U, _ = torch.linalg.qr(torch.randn(256, 192, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(192, 192, generator=generator))
    base = (U / torch.arange(1, 193)) @ V.T
    pair = HeldPair(base, base * (1 + spread * torch.randn(256, 1, generator=generator)))
    B, A, _ = lora(pair, 8)
    along, energy = row_share(pair.tuned - pair.base - B @ A, pair.base + B @ A)
    assert along > 0.06 * energy
    assert alternate(pair, 8).residual < 1e-4 * float((pair.tuned - pair.base).norm())


def test_magnitudes_are_the_least_squares_solution() -> None:
    pair = made((64, 48), 0.02)
    B, A, _ = lora(pair, 3)
    rows = best_rows(pair, B, A)
    v = pair.base.double() + B.double() @ A.double()
    for factor in (0.999, 1.001):
        worse = pair.tuned.double() - factor * rows.gain[:, None] * v
        assert float(worse.norm()) > rows.residual
    torch.testing.assert_close(rows.magnitude, rows.gain * v.norm(dim=1))


def test_reading_in_blocks_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = made((300, 64), 0.02)
    held = alternate(pair, 8)
    monkeypatch.setattr("surgery_formats.linalg.fit_dora._BLOCK", 64 * 7)
    streamed = alternate(Streamed(pair), 8)
    torch.testing.assert_close(applied(pair, held), applied(pair, streamed), atol=1e-7, rtol=1e-5)


def test_a_zero_row_is_refused() -> None:
    pair = made((32, 24), 0.02)
    pair.base[3], pair.tuned[3] = 0, 0
    with pytest.raises(FitError, match="zero"):
        alternate(pair, 4)
