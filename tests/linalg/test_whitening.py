# SPDX-License-Identifier: Apache-2.0
"""Weighted factors are best for the inputs they were weighted with; a matrix that is no second moment is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.linalg.whitening import (
    Moment,
    moment_of_gram,
    moment_of_inputs,
    output_energy,
    weighted_factors,
)
from tests.support.libraries import each_library
from tests.support.spectra import norm

Of = Callable[[numpy.ndarray], Array]


def moment_of(values: Array) -> Moment:
    """Of all rows at once."""
    return moment_of_inputs([values], len(values))


def inputs(n: int, size: int, seed: int = 0) -> numpy.ndarray:
    """With a mean, and directions of very different strength, as activations have."""
    turn, _ = numpy.linalg.qr(numpy.random.default_rng(9).standard_normal((size, size)))
    strength = 1 / numpy.arange(1.0, size + 1)
    drawn = numpy.random.default_rng(seed).standard_normal((n, size))
    return ((drawn * strength + 0.3 * strength[::-1]) @ turn.T).astype(numpy.float32)


def delta(m: int = 40, n: int = 32) -> numpy.ndarray:
    return (0.01 * numpy.random.default_rng(4).standard_normal((m, n))).astype(numpy.float32)


def formed(moment: Moment) -> numpy.ndarray:
    return to_cpu((moment.basis * moment.energies) @ moment.basis.T)


def close(one: Array, other: Array, rtol: float = 1e-7, atol: float = 1e-7) -> None:
    numpy.testing.assert_allclose(to_cpu(one), to_cpu(other), rtol=rtol, atol=atol)


@each_library
@pytest.mark.parametrize("n", [10, 32, 500])
def test_inputs_and_their_gram_matrix_give_the_same_moment(n: int, of: Of) -> None:
    x = inputs(n, 32).astype(numpy.float64)
    one = moment_of(of(inputs(n, 32)))
    gram = x.T @ x / n
    close(formed(one), gram, atol=1e-9)
    other = moment_of_gram(of(gram), of(x.mean(axis=0)))
    close(one.times_power(of(delta()), 0.25), other.times_power(of(delta()), 0.25), rtol=1.3e-6, atol=1e-5)
    d = delta().astype(numpy.float64)
    assert output_energy(of(d), one) == pytest.approx(norm(x @ d.T) ** 2 / n)
    rest = x @ d.T
    rest -= rest.mean(axis=0)
    elsewhere = other.mean
    assert elsewhere is not None
    shifted = (x - 0.5 * to_cpu(elsewhere)) @ d.T
    assert output_energy(of(d), one, 0.5 * elsewhere) == pytest.approx(norm(shifted) ** 2 / n)
    assert output_energy(of(d), other, other.mean) == pytest.approx(norm(rest) ** 2 / n)


def _power(matrix: Array, exponent: float) -> Array:
    values, vectors = numpy.linalg.eigh(matrix)
    return (vectors * values.clip(0) ** exponent) @ vectors.T


@each_library
def test_times_power_uses_the_damped_moment(of: Of) -> None:
    moment, exact = moment_of(of(inputs(10, 32))), of(delta().astype(numpy.float64))
    damped = formed(moment) + 0.01 * float(moment.energies.sum()) / 32 * numpy.eye(32)
    values, vectors = numpy.linalg.eigh(damped)
    close(moment.times_power(exact, 0.25), to_cpu(exact) @ (vectors * values**0.25) @ vectors.T)
    close(moment.times_power(moment.times_power(exact, 0.25), -0.25), exact)
    bare = to_cpu(moment.times_power(exact, 0.25)) - to_cpu(exact) @ _power(formed(moment), 0.25)
    assert norm(bare) > 0.01  # without the damping it is another


@each_library
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_whitened_factors_are_best_and_half_whitened_ones_lie_between(rank: int, of: Of) -> None:
    moment, d = moment_of(of(inputs(400, 32))), of(delta())
    errors = []
    for power in (0.0, 0.25, 0.5):
        B, A = weighted_factors(d, moment, rank, power=power)
        errors.append(output_energy(d - B @ A, moment))
        close(numpy.linalg.norm(to_cpu(B), axis=0), numpy.linalg.norm(to_cpu(A), axis=1), rtol=1e-4)
    assert errors[2] < errors[1] < errors[0]
    plain = truncated_svd(d, rank=rank).factors()
    assert errors[0] == pytest.approx(output_energy(d - plain[0] @ plain[1], moment), rel=1e-3)


@each_library
def test_full_rank_leaves_no_error(of: Of) -> None:
    d = of(delta())
    B, A = weighted_factors(d, moment_of(of(inputs(10, 32))), 32)
    assert norm(to_cpu(d - B @ A)) / norm(delta()) < 1e-4


NO_MOMENTS = {
    "NaN": (numpy.full((4, 4), numpy.nan), "NaN"),
    "not symmetric": (numpy.eye(4) + numpy.triu(numpy.ones((4, 4)), 1), "not symmetric"),
    "negative": (numpy.diag([1.0, 1.0, 1.0, -1.0]), "negative"),
    "zero": (numpy.zeros((4, 4)), "zero"),
}


@each_library
@pytest.mark.parametrize("fault", NO_MOMENTS)
def test_a_matrix_that_is_not_a_second_moment_is_refused(fault: str, of: Of) -> None:
    gram, words = NO_MOMENTS[fault]
    with pytest.raises(FitError, match=words):
        moment_of_gram(of(gram))


@each_library
def test_an_impossible_mean_is_refused(of: Of) -> None:
    with pytest.raises(FitError, match="not a possible mean"):
        moment_of_gram(of(numpy.eye(4)), of(numpy.full(4, 2.0)))
    assert moment_of_gram(of(numpy.eye(4)), of(numpy.full(4, 0.5))).mean is not None


@each_library
@pytest.mark.parametrize("values", [numpy.zeros((3, 4)), numpy.zeros((0, 4)), numpy.full((3, 4), numpy.inf)])
def test_zero_or_missing_inputs_are_refused(values: numpy.ndarray, of: Of) -> None:
    with pytest.raises(FitError):
        moment_of(of(values))


@each_library
@pytest.mark.parametrize("count", [10, 32, 500])
def test_inputs_in_blocks_give_the_same_moment(count: int, of: Of) -> None:
    x = of(inputs(count, 32))
    one, other = moment_of(x), moment_of_inputs((x[at : at + 7] for at in range(0, count, 7)), count)
    for power in (0.25, 0.5):
        close(*(m.times_power(of(numpy.eye(32)), power) for m in (one, other)), rtol=1e-5, atol=1e-8)
    assert one.mean is not None
    assert other.mean is not None
    close(one.mean, other.mean)
