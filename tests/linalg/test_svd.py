# SPDX-License-Identifier: Apache-2.0
"""As good as the best possible approximation, and honest about how good."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy
import pytest
import threadpoolctl
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surgery_formats.arrays import Array, is_torch, to_cpu
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from tests.support.libraries import each_library
from tests.support.spectra import KINDS, check, made, norm, on_cpu, true_error

Of = Callable[[numpy.ndarray], Array]


def orthonormal(basis: numpy.ndarray) -> bool:
    return bool(numpy.abs(basis.T @ basis - numpy.eye(basis.shape[1])).max() <= 1e-5)


@each_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (2048, 256), (256, 2048), (1024, 1024)])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_the_error_is_within_a_thousandth_of_the_optimum(shape: tuple[int, int], kind: str, rank: int, of: Of) -> None:
    d, s = made(*shape, kind)
    check(d, s, truncated_svd(of(d), rank=rank), rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (256, 2048), (1024, 1024)])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_a_power_of_two_changes_sizes_only(shape: tuple[int, int], kind: str, rank: int) -> None:
    """All other bits are the same, so that the deltas of small and large weights are as exact as each other."""
    d, _ = made(*shape, kind)
    found, small = truncated_svd(d, rank=rank), truncated_svd(d * 2.0**-12, rank=rank)
    assert numpy.array_equal(found.U, small.U)
    assert numpy.array_equal(found.V, small.V)
    assert numpy.array_equal(found.S, small.S * 2.0**12)


@pytest.mark.slow
@each_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 1024), (2048, 4096)])
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_the_error_of_a_large_matrix_is_within_a_thousandth_of_the_optimum(
    shape: tuple[int, int], kind: str, rank: int, of: Of
) -> None:
    d, s = made(*shape, kind)
    check(d, s, truncated_svd(of(d), rank=rank), rank)


@each_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(512, 512), (1024, 512)])
def test_the_difference_of_a_bf16_pair_is_near_its_optimum(shape: tuple[int, int], kind: str, of: Of) -> None:
    delta, _ = made(*shape, kind)
    base = (numpy.random.default_rng(3).standard_normal(shape, numpy.float32) * 0.02).astype(ml_dtypes.bfloat16)
    tuned = base.astype(numpy.float32) + delta * (1e-4 / numpy.sqrt(numpy.mean(delta**2)))
    moved = tuned.astype(ml_dtypes.bfloat16).astype(numpy.float32) - base.astype(numpy.float32)
    s = numpy.linalg.svdvals(moved.astype(numpy.float64))
    for rank in (16, 64):
        check(moved, s, truncated_svd(of(moved), rank=rank), rank)


@each_library
@pytest.mark.parametrize("rank", [16, 64, 200])
def test_ranks_beyond_the_true_one_add_nothing(rank: int, of: Of) -> None:
    """A merged LoRA: after its own directions nothing but rounding noise is left to build a basis from."""
    d, s = made(1024, 512, "low")
    found = truncated_svd(of(d), rank=rank)
    check(d, s, found, rank)
    assert found.bound == 1.0
    assert float(found.S[12:].max()) <= 1e-6 * found.total


@each_library
def test_residuals_below_float32_resolution_are_resolved(of: Of) -> None:
    d, s = made(1024, 1024, "fast")
    found = truncated_svd(
        of(d), rank=100
    )  # the best possible residual is 3e-4 of the norm, 1/3000 of the first singular value
    check(d, s, found, 100)
    found = on_cpu(truncated_svd(of(numpy.concat([d, numpy.zeros_like(d)]).astype(numpy.float64)), rank=140))
    assert found.U.dtype == numpy.float64
    assert found.residual <= 1.001 * norm(s[140:])


@each_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_the_rank_is_the_least_that_holds_the_energy(kind: str, energy: float, of: Of) -> None:
    matrix, s = made(512, 1024, kind)
    d, share = of(matrix), numpy.cumsum(s**2) / numpy.sum(s**2)
    needed = int((share < energy).sum()) + 1
    found = truncated_svd(d, energy=energy)
    assert needed <= found.rank <= needed + 1 + needed // 50
    assert found.residual**2 <= (1 - energy) * found.total**2 * (1 + 1e-5)
    again = truncated_svd(d, max_error=math.sqrt(1 - energy))
    assert again.rank == found.rank
    assert truncated_svd(d, energy=energy, rank=3).rank == min(3, found.rank)


@each_library
def test_all_of_the_energy_gives_the_true_rank(of: Of) -> None:
    d = of(made(512, 512, "low")[0])
    assert truncated_svd(d, max_error=1e-5).rank == 12
    assert truncated_svd(d, energy=1 - 1e-9).rank == 12


@each_library
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
def test_the_bound_holds_for_any_shape_and_rank(m: int, n: int, rank: int, inner: int, seed: int, of: Of) -> None:
    random = numpy.random.default_rng(seed)
    d = random.standard_normal((m, inner), numpy.float32) @ random.standard_normal((inner, n), numpy.float32)
    found, s = on_cpu(truncated_svd(of(d), rank=rank)), numpy.linalg.svdvals(d.astype(numpy.float64))
    best, total = norm(s[rank:]), norm(s)
    assert found.rank == min(m, n, rank)
    error = true_error(d, found)
    assert error <= max(1.001 * best, 1e-6 * total)
    assert abs(found.residual - error) <= 0.01 * error + 1e-9 * total
    assert orthonormal(found.U)
    assert orthonormal(found.V)


@each_library
def test_equal_singular_values_are_found(of: Of) -> None:
    d = numpy.eye(600, dtype=numpy.float32)
    check(d, numpy.ones(600), truncated_svd(of(d), rank=16), 16)


class Rows:
    """A source that counts, and that gives bfloat16 on its own terms."""

    def __init__(self, d: Array) -> None:
        self.d, self.largest, self.read = d, 0, 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[0], self.d.shape[1]

    def rows(self, start: int, stop: int) -> Array:
        assert 0 <= start < stop <= len(self.d)
        self.largest, self.read = max(self.largest, stop - start), self.read + stop - start
        return self.d[start:stop]


@each_library
@pytest.mark.parametrize("turned", [False, True])
def test_a_source_is_read_in_blocks(turned: bool, of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.linalg.matrix._BLOCK", 100_000)
    d, _ = made(4096, 512, "power")
    rounded = (d.T if turned else d).astype(ml_dtypes.bfloat16)
    d, s = rounded.astype(numpy.float32), numpy.linalg.svdvals(rounded.astype(numpy.float64))
    source = Rows(of(rounded))
    found = truncated_svd(source, rank=16)
    assert source.largest * d.shape[1] <= 100_000
    assert source.read <= 16 * len(d)
    check(d, s, found, 16)
    found = truncated_svd(source, rank=200)
    assert found.iterations == 0  # so much of the spectrum that all of it is computed, by blocks
    check(d, s, found, 200)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    d, _ = made(1024, 512, "spiked")
    runs = []
    for threads in (1, 1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            runs += [truncated_svd(d, rank=r) for r in (8, 64)]
    with ThreadPoolExecutor(2) as pool:
        runs += pool.map(lambda r: truncated_svd(d, rank=r), (8, 64))
    for at, run in enumerate(runs):
        first = runs[at % 2]
        assert all(numpy.array_equal(a, b) for a, b in zip(run[:3], first[:3], strict=True))
        assert run[3:] == first[3:]


@each_library
def test_signs_are_chosen_and_seeds_agree(of: Of) -> None:
    d, _ = made(512, 512, "power")
    one, two = (on_cpu(truncated_svd(of(d), rank=8, seed=seed)) for seed in (1, 2))
    assert not numpy.array_equal(one.U, two.U)
    numpy.testing.assert_allclose(one.U, two.U, rtol=0, atol=2e-2)
    assert (numpy.take_along_axis(one.U, numpy.abs(one.U).argmax(0, keepdims=True), axis=0) > 0).all()
    B, A = one.factors()
    numpy.testing.assert_allclose(B @ A, (one.U * one.S) @ one.V.T, rtol=0, atol=1e-6)
    numpy.testing.assert_allclose(numpy.linalg.norm(B, axis=0), numpy.linalg.norm(A, axis=1), rtol=1e-6)
    assert truncated_svd(of(d), rank=8, seed=-1).bound <= 1.001


@each_library
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [5, 600])
def test_nan_and_infinity_are_refused(bad: float, size: int, of: Of) -> None:
    d = numpy.random.default_rng(0).standard_normal((size, size), numpy.float32)
    d[2, 3] = bad
    with pytest.raises(FitError, match="NaN or infinity"):
        truncated_svd(of(d), rank=2)
    with pytest.raises(FitError, match="NaN or infinity"):
        truncated_svd(Rows(of(d)), rank=2)


@each_library
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_values_whose_squares_leave_float32_are_handled(factor: float, of: Of) -> None:
    d, s = made(512, 512, "power")
    found = truncated_svd(of(d * factor), rank=8)
    assert found.residual / found.total == pytest.approx(norm(s[8:]) / norm(s), rel=1e-3)


@each_library
@pytest.mark.parametrize("seed", [0, 38, 43, 53])  # directions of no weight came out skew for some
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (700, 500), (500, 700)])
def test_zero_rows_and_columns_stay_exactly_zero(shape: tuple[int, int], seed: int, of: Of) -> None:
    """Exactly: weights that were not trained keep their bits when the factors are merged."""
    d = numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)
    rows, cols = numpy.arange(3, shape[0], 5), numpy.arange(1, shape[1], 7)
    d[rows], d[:, cols] = 0, 0
    found = on_cpu(truncated_svd(of(d), rank=12))
    assert not found.U[rows].any()
    assert not found.V[cols].any()
    few = numpy.zeros(shape, numpy.float32)
    few[:5] = d[4:9]  # less rows than directions are asked for
    found = on_cpu(truncated_svd(of(few), rank=12))
    assert numpy.abs(((found.U * found.S) @ found.V.T)[5:]).max() <= 1e-6
    assert orthonormal(found.U)
    assert orthonormal(found.V)


@each_library
@pytest.mark.parametrize(("shape", "rank"), [((1, 50), 1), ((40, 64), 3), ((700, 600), 2)], ids=str)
def test_a_norm_near_a_power_of_two_does_not_change_the_scale(shape: tuple[int, int], rank: int, of: Of) -> None:
    """Rounding decides on which side it lies, in float32 and float64 apart: the scale must be one for both."""
    for seed in range(12):
        random = numpy.random.default_rng(seed)
        left, right = (random.standard_normal((size, rank)) for size in shape)
        exact = left @ right.T
        d = (exact / norm(exact)).astype(numpy.float32)
        for options in ({"rank": rank}, {"energy": 0.9999999}, {"rank": rank, "total": norm(d)}):
            found = truncated_svd(of(d), **options)  # type: ignore[arg-type]
            assert true_error(d, found) < 1e-6
            assert found.relative < 1e-6


@each_library
def test_a_zero_matrix_has_no_residual_and_bound_one(of: Of) -> None:
    zeros = of(numpy.zeros((7, 5), numpy.float32))
    found = truncated_svd(zeros, rank=3)
    assert (found.rank, found.residual, found.total, found.bound, found.relative) == (3, 0.0, 0.0, 1.0, 0.0)
    assert truncated_svd(zeros, energy=0.9).rank == 0


@each_library
def test_the_result_is_where_the_matrix_is_unless_a_device_is_named(of: Of) -> None:
    d = of(made(64, 64, "power")[0])
    assert all(is_torch(side) == is_torch(d) for side in truncated_svd(d, rank=2)[:3])
    assert not any(is_torch(side) for side in truncated_svd(d, rank=2, device="cpu")[:3])


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 0}, {"rank": -1}, {"energy": 0.0}, {"energy": 1.5}, {"max_error": 1.0}, {"max_error": -0.1}]
)
def test_invalid_criteria_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy|error"):
        truncated_svd(numpy.eye(3), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 4)])
def test_tensors_that_are_not_matrices_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FitError, match="matrix"):
        truncated_svd(numpy.ones(shape), rank=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_result(kind: str) -> None:
    d, s = made(1024, 2048, kind)
    found = truncated_svd(d, rank=16, device="cuda")
    assert found.U.is_cuda
    check(d, s, found, 16)
    again = truncated_svd(d, rank=16, device="cuda")
    assert numpy.array_equal(to_cpu(found.U), to_cpu(again.U))
