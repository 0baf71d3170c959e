# SPDX-License-Identifier: Apache-2.0
"""Weighted factors are best for the inputs they were weighted with; a matrix that is no second moment is refused."""

from __future__ import annotations

import pytest
import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.linalg.whitening import (
    Moment,
    moment_of_gram,
    moment_of_inputs,
    output_energy,
    weighted_factors,
)


def moment_of(values: torch.Tensor) -> Moment:
    """Of all rows at once."""
    return moment_of_inputs([values], len(values))


def inputs(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """With a mean, and directions of very different strength, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(9)))
    strength = torch.arange(1, size + 1).float().pow(-1.0)
    return (torch.randn(n, size, generator=generator) * strength + 0.3 * strength.flip(0)) @ turn.T


def delta(m: int = 40, n: int = 32) -> torch.Tensor:
    return 0.01 * torch.randn(m, n, generator=torch.Generator().manual_seed(4))


def formed(moment: Moment) -> torch.Tensor:
    return (moment.basis * moment.energies) @ moment.basis.T


@pytest.mark.parametrize("n", [10, 32, 500])
def test_inputs_and_their_gram_matrix_give_the_same_moment(n: int) -> None:
    x = inputs(n, 32)
    one = moment_of(x)
    gram = x.double().T @ x.double() / n
    torch.testing.assert_close(formed(one), gram, atol=1e-9, rtol=1e-7)
    other = moment_of_gram(gram, x.double().mean(dim=0))
    torch.testing.assert_close(one.times_power(delta(), 0.25), other.times_power(delta(), 0.25))
    d = delta().double()
    assert output_energy(d, one) == pytest.approx(float((x.double() @ d.T).square().sum() / n))
    rest = x.double() @ d.T
    rest -= rest.mean(dim=0)
    elsewhere = other.mean
    assert elsewhere is not None
    shifted = (x.double() - 0.5 * elsewhere) @ d.T
    assert output_energy(d, one, 0.5 * elsewhere) == pytest.approx(float(shifted.square().sum() / n))
    assert output_energy(d, other, other.mean) == pytest.approx(float(rest.square().sum() / n))


def test_times_power_uses_the_damped_moment() -> None:
    moment = moment_of(inputs(10, 32))
    damped = formed(moment) + 0.01 * moment.energies.sum() / 32 * torch.eye(32, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    wanted = delta().double() @ (vectors * values.pow(0.25)) @ vectors.T
    torch.testing.assert_close(moment.times_power(delta().double(), 0.25), wanted)
    back = moment.times_power(moment.times_power(delta().double(), 0.25), -0.25)
    torch.testing.assert_close(back, delta().double())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_whitened_factors_are_best_and_half_whitened_ones_lie_between(rank: int) -> None:
    moment = moment_of(inputs(400, 32))
    d = delta()
    errors = []
    for power in (0.0, 0.25, 0.5):
        B, A = weighted_factors(d, moment, rank, power=power)
        errors.append(output_energy(d - B @ A, moment))
        assert B.norm(dim=0).tolist() == pytest.approx(A.norm(dim=1).tolist(), rel=1e-4)
    assert errors[2] < errors[1] < errors[0]
    plain = truncated_svd(d, rank=rank).factors()
    assert errors[0] == pytest.approx(output_energy(d - plain[0] @ plain[1], moment), rel=1e-3)


def test_full_rank_leaves_no_error() -> None:
    B, A = weighted_factors(delta(), moment_of(inputs(10, 32)), 32)
    assert float((delta() - B @ A).norm() / delta().norm()) < 1e-4


NO_MOMENTS = {
    "NaN": (torch.full((4, 4), float("nan")), "NaN"),
    "not symmetric": (torch.eye(4) + torch.ones(4, 4).triu(1), "not symmetric"),
    "negative": (torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])), "negative"),
    "zero": (torch.zeros(4, 4), "zero"),
}


@pytest.mark.parametrize("fault", NO_MOMENTS)
def test_a_matrix_that_is_not_a_second_moment_is_refused(fault: str) -> None:
    gram, words = NO_MOMENTS[fault]
    with pytest.raises(FitError, match=words):
        moment_of_gram(gram)


def test_an_impossible_mean_is_refused() -> None:
    with pytest.raises(FitError, match="not a possible mean"):
        moment_of_gram(torch.eye(4), torch.full((4,), 2.0))
    assert moment_of_gram(torch.eye(4), torch.full((4,), 0.5)).mean is not None


@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.zeros(0, 4), torch.full((3, 4), float("inf"))])
def test_zero_or_missing_inputs_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(FitError):
        moment_of(values)


@pytest.mark.parametrize("count", [10, 32, 500])
def test_inputs_in_blocks_give_the_same_moment(count: int) -> None:
    x = inputs(count, 32)
    one, other = moment_of(x), moment_of_inputs(iter(x.split(7)), count)
    for power in (0.25, 0.5):
        assert torch.allclose(*(m.times_power(torch.eye(32, dtype=torch.float64), power) for m in (one, other)))
    assert one.mean is not None
    assert other.mean is not None
    assert torch.allclose(one.mean, other.mean)
