# SPDX-License-Identifier: Apache-2.0
"""As good as the best possible approximation, and honest about how good."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from tests.support.spectra import KINDS, check, made, true_error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (2048, 256), (256, 2048), (1024, 1024)])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_the_error_is_within_a_thousandth_of_the_optimum(shape: tuple[int, int], kind: str, rank: int) -> None:
    d, s = made(*shape, kind)
    check(d, s, truncated_svd(d * 2.0**-12, rank=rank)._replace(**_unscaled(d, rank)), rank)


def _unscaled(d: torch.Tensor, rank: int) -> dict[str, object]:
    """The same matrix times a power of two: the same bits but for that factor, in S and norms only."""
    found, small = truncated_svd(d, rank=rank), truncated_svd(d * 2.0**-12, rank=rank)
    assert torch.equal(found.U, small.U)
    assert torch.equal(found.V, small.V)
    assert torch.equal(found.S, small.S * 2.0**12)
    return {"S": found.S, "residual": found.residual, "total": found.total}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 1024), (2048, 4096)])
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_the_error_of_a_large_matrix_is_within_a_thousandth_of_the_optimum(
    shape: tuple[int, int], kind: str, rank: int
) -> None:
    d, s = made(*shape, kind)
    check(d, s, truncated_svd(d, rank=rank), rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(512, 512), (1024, 512)])
def test_the_difference_of_a_bf16_pair_is_near_its_optimum(shape: tuple[int, int], kind: str) -> None:
    delta, _ = made(*shape, kind)
    base = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    tuned = (base.float() + delta * (1e-4 / delta.square().mean().sqrt())).bfloat16()
    moved = tuned.float() - base.float()
    s = torch.linalg.svdvals(moved.double())
    for rank in (16, 64):
        check(moved, s, truncated_svd(moved, rank=rank), rank)


@pytest.mark.parametrize("rank", [16, 64, 200])
def test_ranks_beyond_the_true_one_add_nothing(rank: int) -> None:
    """A merged LoRA: after its own directions nothing but rounding noise is left to build a basis from."""
    d, s = made(1024, 512, "low")
    found = truncated_svd(d, rank=rank)
    check(d, s, found, rank)
    assert found.bound == 1.0
    assert float(found.S[12:].max()) <= 1e-6 * found.total


def test_residuals_below_float32_resolution_are_resolved() -> None:
    d, s = made(1024, 1024, "fast")
    found = truncated_svd(
        d, rank=100
    )  # the best possible residual is 3e-4 of the norm, 1/3000 of the first singular value
    check(d, s, found, 100)
    found = truncated_svd(torch.cat([d, torch.zeros_like(d)]).double(), rank=140)
    assert found.U.dtype == torch.float64
    assert found.residual <= 1.001 * float(s[140:].norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_the_rank_is_the_least_that_holds_the_energy(kind: str, energy: float) -> None:
    d, s = made(512, 1024, kind)
    share = torch.cumsum(s.square(), 0) / s.square().sum()
    needed = int((share < energy).sum()) + 1
    found = truncated_svd(d, energy=energy)
    assert needed <= found.rank <= needed + 1 + needed // 50
    assert found.residual**2 <= (1 - energy) * found.total**2 * (1 + 1e-5)
    again = truncated_svd(d, max_error=math.sqrt(1 - energy))
    assert again.rank == found.rank
    assert truncated_svd(d, energy=energy, rank=3).rank == min(3, found.rank)


def test_all_of_the_energy_gives_the_true_rank() -> None:
    d, _ = made(512, 512, "low")
    assert truncated_svd(d, max_error=1e-5).rank == 12
    assert truncated_svd(d, energy=1 - 1e-9).rank == 12


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 50),
    inner=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@example(m=40, n=40, rank=50, inner=0, seed=0)
@example(m=1, n=40, rank=1, inner=1, seed=0)
@example(m=40, n=1, rank=3, inner=1, seed=0)
@example(m=30, n=30, rank=1, inner=1, seed=0)
def test_the_bound_holds_for_any_shape_and_rank(m: int, n: int, rank: int, inner: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(m, inner, generator=g) @ torch.randn(inner, n, generator=g)
    found, s = truncated_svd(d, rank=rank), torch.linalg.svdvals(d.double())
    best, total = float(s[rank:].norm()), float(s.norm())
    assert found.rank == min(m, n, rank)
    error = true_error(d, found)
    assert error <= max(1.001 * best, 1e-6 * total)
    assert abs(found.residual - error) <= 0.01 * error + 1e-9 * total
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(found.rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.V.T @ found.V, torch.eye(found.rank), rtol=0, atol=1e-5)


def test_equal_singular_values_are_found() -> None:
    d = torch.eye(600)
    found = truncated_svd(d, rank=16)
    check(d, torch.ones(600, dtype=torch.float64), found, 16)


class Rows:
    """A source that counts, and that gives bfloat16 on its own terms."""

    def __init__(self, d: torch.Tensor) -> None:
        self.d, self.largest, self.read = d, 0, 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[0], self.d.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start < stop <= len(self.d)
        self.largest, self.read = max(self.largest, stop - start), self.read + stop - start
        return self.d[start:stop]


@pytest.mark.parametrize("turned", [False, True])
def test_a_source_is_read_in_blocks(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.linalg.matrix._BLOCK", 100_000)
    d, _ = made(4096, 512, "power")
    d = (d.T if turned else d).bfloat16().contiguous()
    source = Rows(d)
    found = truncated_svd(source, rank=16)
    assert source.largest * d.shape[1] <= 100_000
    assert source.read <= 16 * len(d)
    check(d.float(), torch.linalg.svdvals(d.double()), found, 16)
    assert (
        truncated_svd(Rows(d), rank=200).iterations == 0
    )  # so much of the spectrum that all of it is computed, by blocks
    check(d.float(), torch.linalg.svdvals(d.double()), truncated_svd(Rows(d), rank=200), 200)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    d, _ = made(1024, 512, "spiked")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            runs += [truncated_svd(d, rank=r) for r in (8, 64)]
            assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(2) as pool:
            runs += pool.map(lambda r: truncated_svd(d, rank=r), (8, 64))
    finally:
        torch.set_num_threads(before)
    for at, run in enumerate(runs):
        first = runs[at % 2]
        assert all(torch.equal(a, b) for a, b in zip(run[:3], first[:3], strict=True))
        assert run[3:] == first[3:]


def test_signs_are_chosen_and_seeds_agree() -> None:
    d, _ = made(512, 512, "power")
    one, two = truncated_svd(d, rank=8, seed=1), truncated_svd(d, rank=8, seed=2)
    assert not torch.equal(one.U, two.U)
    torch.testing.assert_close(one.U, two.U, rtol=0, atol=2e-2)
    assert bool((one.U.gather(0, one.U.abs().argmax(0, keepdim=True)) > 0).all())
    B, A = one.factors()
    torch.testing.assert_close(B @ A, (one.U * one.S) @ one.V.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [5, 600])
def test_nan_and_infinity_are_refused(bad: float, size: int) -> None:
    d = torch.randn(size, size)
    d[2, 3] = bad
    with pytest.raises(FitError, match="NaN or infinity"):
        truncated_svd(d, rank=2)
    with pytest.raises(FitError, match="NaN or infinity"):
        truncated_svd(Rows(d), rank=2)


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_values_whose_squares_leave_float32_are_handled(factor: float) -> None:
    d, s = made(512, 512, "power")
    found = truncated_svd(d * factor, rank=8)
    assert found.residual / found.total == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize("seed", [0, 38, 43, 53])  # directions of no weight came out skew for the last three
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (700, 500), (500, 700)])
def test_zero_rows_and_columns_stay_exactly_zero(shape: tuple[int, int], seed: int) -> None:
    """Exactly: weights that were not trained keep their bits when the factors are merged."""
    torch.manual_seed(seed)
    d, rows, cols = torch.randn(shape), torch.arange(3, shape[0], 5), torch.arange(1, shape[1], 7)
    d[rows], d[:, cols] = 0, 0
    found = truncated_svd(d, rank=12)
    assert not bool(found.U[rows].any())
    assert not bool(found.V[cols].any())
    few = torch.zeros(shape)
    few[:5] = d[4:9]  # less rows than directions are asked for
    found = truncated_svd(few, rank=12)
    assert not bool(((found.U * found.S) @ found.V.T)[5:].abs().max() > 1e-6)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.V.T @ found.V, torch.eye(12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((1, 50), 1), ((40, 64), 3), ((700, 600), 2)], ids=str)
def test_a_norm_near_a_power_of_two_does_not_change_the_scale(shape: tuple[int, int], rank: int) -> None:
    """Rounding decides on which side it lies, in float32 and float64 apart: the scale must be one for both."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
        d = left @ right.T
        d = (d / d.norm()).float()
        for options in ({"rank": rank}, {"energy": 0.9999999}, {"rank": rank, "total": float(d.double().norm())}):
            found = truncated_svd(d, **options)  # type: ignore[arg-type]
            assert true_error(d, found) < 1e-6
            assert found.relative < 1e-6


def test_a_zero_matrix_has_no_residual_and_bound_one() -> None:
    found = truncated_svd(torch.zeros(7, 5), rank=3)
    assert (found.rank, found.residual, found.total, found.bound, found.relative) == (3, 0.0, 0.0, 1.0, 0.0)
    assert truncated_svd(torch.zeros(7, 5), energy=0.9).rank == 0


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 0}, {"rank": -1}, {"energy": 0.0}, {"energy": 1.5}, {"max_error": 1.0}, {"max_error": -0.1}]
)
def test_invalid_criteria_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy|error"):
        truncated_svd(torch.eye(3), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 4)])
def test_tensors_that_are_not_matrices_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FitError, match="matrix"):
        truncated_svd(torch.ones(shape), rank=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_result(kind: str) -> None:
    d, s = made(1024, 2048, kind)
    found = truncated_svd(d, rank=16, device="cuda")
    assert found.U.is_cuda
    check(d, s, found._replace(U=found.U.cpu(), S=found.S.cpu(), V=found.V.cpu()), 16)
    again = truncated_svd(d, rank=16, device="cuda")
    assert torch.equal(found.U, again.U)
