# SPDX-License-Identifier: Apache-2.0
"""Matrices of one shape factorised together are factorised as each would be alone."""

from collections.abc import Callable

import numpy as np
import pytest
import threadpoolctl

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.linalg.svd import left_over, truncated_svd
from surgery_formats.linalg.svd_stack import energy_left, truncated_svds
from tests.support.libraries import each_library

RANK = 16


def differences(m: int, n: int, count: int = 3) -> np.ndarray:
    """Low rank and noise, as fine-tunes differ from their base; then zeros, a dense bulk, an exact rank, a tiny one."""
    rng = np.random.default_rng(m + n)
    tuned = [
        rng.normal(size=(m, 16)) @ rng.normal(size=(16, n)) * 5e-4 + rng.normal(size=(m, n)) * 4e-4
        for _ in range(count)
    ]
    exact = rng.normal(size=(m, 5)) @ rng.normal(size=(5, n))
    return np.stack([*tuned, np.zeros((m, n)), rng.normal(size=(m, n)), exact, tuned[0] * 1e-18]).astype(np.float32)


def norms(stack: np.ndarray) -> list[float]:
    return np.sqrt(np.sum(stack.astype(np.float64) ** 2, axis=(1, 2))).tolist()


@each_library
@pytest.mark.parametrize("shape", [(512, 768), (768, 300), (1024, 512), (40, 90)], ids=str)
def test_a_stack_is_factorised_as_its_matrices_are(shape: tuple[int, int], of: Callable[[np.ndarray], Array]) -> None:
    stack = differences(*shape)
    totals = norms(stack)
    arrays = of(stack)
    together = truncated_svds(arrays, rank=RANK, totals=totals)
    for i, total in enumerate(totals):
        alone = truncated_svd(arrays[i], rank=RANK, total=total)
        ours, theirs = (
            to_cpu(u) * to_cpu(s) @ to_cpu(v).T
            for u, s, v in ((together.U[i], together.S[i], together.V[i]), (alone.U, alone.S, alone.V))
        )
        assert np.abs(ours - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-30)
        assert together.residual[i] == pytest.approx(alone.residual, rel=1e-5, abs=2e-6 * total)
        assert together.bound[i] == pytest.approx(alone.bound, abs=1e-6)
        assert together.total[i] == pytest.approx(total, rel=1e-6)


def test_only_matrices_that_need_something_of_their_own_are_factorised_alone() -> None:
    stack = differences(512, 768)
    assert truncated_svds(stack, rank=RANK, totals=norms(stack)).alone == (3, 5, 6)


def test_the_result_of_a_matrix_does_not_depend_on_its_company() -> None:
    stack = differences(512, 768)[:3]
    totals = norms(stack)
    whole = truncated_svds(stack, rank=RANK, totals=totals)
    part = truncated_svds(stack[1:2], rank=RANK, totals=totals[1:2])
    assert np.abs(whole.U[1] - part.U[0]).max() < 1e-5
    assert whole.residual[1] == pytest.approx(part.residual[0], rel=1e-6)


def test_the_energy_left_of_a_stack_is_that_of_its_matrices() -> None:
    stack = differences(512, 768)[:3]
    svd = truncated_svds(stack, rank=RANK, totals=norms(stack))
    left, right = svd.U * svd.S[:, None, :], svd.V.mT
    for i, rows in enumerate(energy_left(stack, left, right)):
        exact = left_over(stack[i], left[i], right[i], how="fine").sum()
        assert rows.sum() + norms(stack)[i] ** 2 == pytest.approx(exact, rel=2e-5)


def test_the_bits_do_not_depend_on_the_threads_of_linear_algebra() -> None:
    stack = differences(1024, 768)[:3]
    results = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            svd = truncated_svds(stack, rank=RANK, totals=norms(stack))
            left = energy_left(stack, svd.U * svd.S[:, None, :], svd.V.mT)
        results.append([array.tobytes() for array in (svd.U, svd.S, svd.V, left)])
    assert results[0] == results[1]
