# SPDX-License-Identifier: Apache-2.0
"""Sums and re-rankings of products, against the dense answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.errors import FitError
from surgery_formats.linalg.factored import (
    concatenated,
    factored_inner,
    factored_norm,
    relative_error,
    rerank,
    singular_values,
)
from tests.support.libraries import each_library
from tests.support.spectra import norm

Of = Callable[[numpy.ndarray], Array]
Terms = list[tuple[numpy.ndarray, numpy.ndarray]]


def product(B: Array, A: Array) -> numpy.ndarray:
    return to_cpu(B).astype(numpy.float64) @ to_cpu(A).astype(numpy.float64)


def exact_sum(terms: Terms, weights: list[float]) -> numpy.ndarray:
    return sum(w * product(B, A) for (B, A), w in zip(terms, weights, strict=True))


def ones(*shape: int) -> numpy.ndarray:
    return numpy.ones(shape, numpy.float32)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Terms, list[float]]:
    m, n = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    random = numpy.random.default_rng(draw(st.integers(0, 999)))
    ranks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    weights = [draw(st.sampled_from([1.0, 0.7, -0.3, 2.5, -1.0])) for _ in ranks]
    kind = numpy.float32
    return [(random.standard_normal((m, r), kind), random.standard_normal((r, n), kind)) for r in ranks], weights


@each_library
@settings(max_examples=120, deadline=None)
@given(made=sums(), rank=st.integers(1, 20))
def test_sums_are_exact_and_reranking_is_optimal(made: tuple[Terms, list[float]], rank: int, of: Of) -> None:
    terms, weights = made
    dense = exact_sum(terms, weights)
    B, A = concatenated([(of(b), of(a)) for b, a in terms], weights)
    size = sum(abs(w) * norm(b) * norm(a) for (b, a), w in zip(terms, weights, strict=True))  # terms may cancel
    assert to_cpu(B).dtype == numpy.float32
    assert norm(product(B, A) - dense) <= 1e-6 * size
    assert factored_norm(B, A) == pytest.approx(norm(dense), abs=1e-6 * size)
    s = numpy.linalg.svdvals(dense)
    assert numpy.abs(singular_values(B, A)[: len(s)] - s[: B.shape[1]]).max() <= 1e-6 * size
    found = rerank(B, A, rank)
    assert found.B.shape[1] == min(rank, B.shape[1], *dense.shape)
    error, best = norm(product(found.B, found.A) - dense), norm(s[rank:])
    assert error <= 1.0001 * best + 1e-6 * size
    assert abs(found.lost - error) <= 1e-6 * size


@each_library
def test_full_size_adapters_add_up_exactly(of: Of) -> None:
    """Two of rank 16 and 8, weights .7 and -.3, in a 512 x 384 layer."""
    random = numpy.random.default_rng(0)
    terms = [
        (random.normal(0, 0.01, (512, r)).astype(numpy.float32), random.normal(0, 0.02, (r, 384)).astype(numpy.float32))
        for r in (16, 8)
    ]
    dense = exact_sum(terms, [0.7, -0.3])
    exact = B, A = concatenated([(of(b), of(a)) for b, a in terms], [0.7, -0.3])
    assert norm(product(B, A) - dense) <= 1e-6 * norm(dense)
    whole = rerank(B, A, 24)
    assert relative_error(exact, whole[:2]) <= 1e-6
    s = numpy.linalg.svdvals(dense)
    for rank in (4, 16):
        found = rerank(B, A, rank)
        best = norm(s[rank:])
        assert norm(product(found.B, found.A) - dense) <= 1.0001 * best
        assert relative_error(exact, found[:2]) == pytest.approx(best / norm(dense), rel=1e-5)
        lengths = numpy.linalg.norm(to_cpu(found.B), axis=0), numpy.linalg.norm(to_cpu(found.A), axis=1)
        numpy.testing.assert_allclose(*lengths, rtol=2e-6)


@each_library
def test_norms_of_small_differences_do_not_cancel(of: Of) -> None:
    random = numpy.random.default_rng(0)
    B, A = random.standard_normal((20, 4)), random.standard_normal((4, 30))
    nudged = B + 1e-11 * random.standard_normal((20, 4))
    expected = norm((nudged - B) @ A) / norm(B @ A)
    assert relative_error((of(B), of(A)), (of(nudged), of(A))) == pytest.approx(expected, rel=1e-3)
    assert relative_error((of(B), of(A)), (of(B), of(A))) <= 1e-14


@each_library
def test_the_inner_product_equals_that_of_the_full_matrices(of: Of) -> None:
    random = numpy.random.default_rng(1)
    B, A, D, C = (random.standard_normal(s, numpy.float32) for s in ((9, 3), (3, 7), (9, 5), (5, 7)))
    expected = float((product(B, A) * product(D, C)).sum())
    assert factored_inner(of(B), of(A), of(D), of(C)) == pytest.approx(expected, rel=1e-12)


@each_library
def test_errors_relative_to_zero_are_zero_or_infinite(of: Of) -> None:
    B, A = of(numpy.zeros((5, 2))), of(ones(2, 4))
    assert relative_error((B, A), (B, A)) == 0.0
    assert relative_error((B, A), (B + 1, A)) == math.inf
    assert rerank(B, A, 1).lost == 0.0


def test_factors_of_different_shapes_are_refused() -> None:
    one, other = (ones(5, 2), ones(2, 4)), (ones(5, 2), ones(2, 3))
    with pytest.raises(FitError, match="different shapes"):
        concatenated([one, other])
    with pytest.raises(FitError, match="no product"):
        factored_norm(one[0], ones(3, 4))
    with pytest.raises(FitError, match="inner"):
        factored_inner(*one, *other)
    with pytest.raises(ValueError, match="term"):
        concatenated([])
    with pytest.raises(ValueError, match="weight"):
        concatenated([one], [1.0, 2.0])
    with pytest.raises(ValueError, match="rank"):
        rerank(*one, 0)
    with pytest.raises(FitError, match="NaN"):
        rerank(one[0] * math.nan, one[1], 1)
