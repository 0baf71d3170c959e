# SPDX-License-Identifier: Apache-2.0
"""Sums and re-rankings of products, against the dense answer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.errors import FitError
from surgery_formats.linalg.factored import (
    concatenated,
    factored_inner,
    factored_norm,
    relative_error,
    rerank,
    singular_values,
)

Terms = list[tuple[torch.Tensor, torch.Tensor]]


def exact_sum(terms: Terms, weights: list[float]) -> torch.Tensor:
    return torch.stack([w * (B.double() @ A.double()) for (B, A), w in zip(terms, weights, strict=True)]).sum(0)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Terms, list[float]]:
    m, n = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ranks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    weights = [draw(st.sampled_from([1.0, 0.7, -0.3, 2.5, -1.0])) for _ in ranks]
    return [(torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)) for r in ranks], weights


@settings(max_examples=120, deadline=None)
@given(sums(), st.integers(1, 20))
def test_sums_are_exact_and_reranking_is_optimal(made: tuple[Terms, list[float]], rank: int) -> None:
    terms, weights = made
    dense = exact_sum(terms, weights)
    B, A = concatenated(terms, weights)
    size = sum(abs(w) * float((b.double() @ a.double()).norm()) for (b, a), w in zip(terms, weights, strict=True))
    assert B.dtype == torch.float32
    assert float((B.double() @ A.double() - dense).norm()) <= 1e-6 * size
    assert factored_norm(B, A) == pytest.approx(float(dense.norm()), abs=1e-6 * size)
    s = torch.linalg.svdvals(dense)
    assert float((singular_values(B, A)[: len(s)] - s[: B.shape[1]]).abs().max()) <= 1e-6 * size
    found = rerank(B, A, rank)
    assert found.B.shape[1] == min(rank, B.shape[1], *dense.shape)
    error, best = float((found.B.double() @ found.A.double() - dense).norm()), float(s[rank:].norm())
    assert error <= 1.0001 * best + 1e-6 * size
    assert abs(found.lost - error) <= 1e-6 * size


def test_full_size_adapters_add_up_exactly() -> None:
    """Two of rank 16 and 8, weights .7 and -.3, in a 512 x 384 layer."""
    g = torch.Generator().manual_seed(0)
    terms = [(torch.randn(512, r, generator=g) * 0.01, torch.randn(r, 384, generator=g) * 0.02) for r in (16, 8)]
    dense = exact_sum(terms, [0.7, -0.3])
    B, A = concatenated(terms, [0.7, -0.3])
    assert float((B.double() @ A.double() - dense).norm() / dense.norm()) <= 1e-6
    exact = (B, A)
    whole = rerank(B, A, 24)
    assert relative_error(exact, whole[:2]) <= 1e-6
    s = torch.linalg.svdvals(dense)
    for rank in (4, 16):
        found = rerank(B, A, rank)
        best = float(s[rank:].norm())
        assert float((found.B.double() @ found.A.double() - dense).norm()) <= 1.0001 * best
        assert relative_error(exact, found[:2]) == pytest.approx(best / float(dense.norm()), rel=1e-5)
        norms = torch.linalg.vector_norm(found.B, dim=0), torch.linalg.vector_norm(found.A, dim=1)
        torch.testing.assert_close(*norms)


def test_norms_of_small_differences_do_not_cancel() -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(20, 4, generator=g).double(), torch.randn(4, 30, generator=g).double()
    nudged = B + 1e-11 * torch.randn(20, 4, generator=g)
    expected = float(((nudged - B) @ A).norm() / (B @ A).norm())
    assert relative_error((B, A), (nudged, A)) == pytest.approx(expected, rel=1e-3)
    assert relative_error((B, A), (B, A)) <= 1e-14


def test_the_inner_product_equals_that_of_the_full_matrices() -> None:
    g = torch.Generator().manual_seed(1)
    B, A, D, C = (torch.randn(*s, generator=g) for s in ((9, 3), (3, 7), (9, 5), (5, 7)))
    expected = float(((B.double() @ A.double()) * (D.double() @ C.double())).sum())
    assert factored_inner(B, A, D, C) == pytest.approx(expected, rel=1e-12)


def test_errors_relative_to_zero_are_zero_or_infinite() -> None:
    B, A = torch.zeros(5, 2), torch.ones(2, 4)
    assert relative_error((B, A), (B, A)) == 0.0
    assert relative_error((B, A), (B + 1, A)) == math.inf
    assert rerank(B, A, 1).lost == 0.0


def test_factors_of_different_shapes_are_refused() -> None:
    one, other = (torch.ones(5, 2), torch.ones(2, 4)), (torch.ones(5, 2), torch.ones(2, 3))
    with pytest.raises(FitError, match="different shapes"):
        concatenated([one, other])
    with pytest.raises(FitError, match="no product"):
        factored_norm(one[0], torch.ones(3, 4))
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
