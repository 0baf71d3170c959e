# SPDX-License-Identifier: Apache-2.0
"""Products in pieces of a few rows have the bits of the product in one go."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats import products
from surgery_formats.products import add_product, multiply_in_pieces, same_in_pieces
from surgery_formats.threads import blas_kernels, one_thread

Factors = tuple[np.ndarray, np.ndarray]
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "of one size": lambda draw, shape: draw.standard_normal(shape),
    "of all sizes": lambda draw, shape: draw.standard_normal(shape) * np.exp2(draw.integers(-24, 40, shape)),
    "bfloat16, some of them 0": lambda draw, shape: (
        (draw.standard_normal(shape) * (draw.random(shape) < 0.7)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    ).view(np.float32),
    "small integers, whose sums are often 0": lambda draw, shape: draw.integers(-1, 2, shape),
    "beyond float32": lambda draw, shape: draw.standard_normal(shape) * 1e30,
}
pytestmark = pytest.mark.skipif(blas_kernels() != products._KERNELS, reason="other kernels: no pieces are made")


def factors(seed: int, kind: str, height: int, rank: int, width: int) -> Factors:
    draw = np.random.default_rng(seed)
    left, right = (KINDS[kind](draw, shape).astype(np.float32) for shape in ((height, rank), (rank, width)))
    return left, right


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether both ways give one array of bits."""
    with one_thread(), np.errstate(all="ignore"):
        found, wanted = np.empty((len(left), right.shape[1]), np.float32), left @ right
        multiply_in_pieces(left, right, found)
    return found.tobytes() == wanted.tobytes()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 300),
    st.integers(2, 64),
    st.one_of(st.integers(1, 1000), st.integers(1, 100).map(lambda n: 16 * n)),
    st.sampled_from([0, 3]),
)
def test_the_bits_are_those_of_one_product(seed: int, kind: str, height: int, rank: int, width: int, skip: int) -> None:
    left, right = factors(seed, kind, height, rank, width + skip)
    assert same_in_pieces(left, right)
    assert same(left, right[:, skip:])


@pytest.mark.parametrize("rank", [2, 4, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("width", [576, 1024, 2048, 4096, 5632, 8192, 14336])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_models_have_the_same_bits(kind: str, width: int, rank: int) -> None:
    left, right = factors(rank * width, kind, (1 << 19) // width, rank, width)
    assert same_in_pieces(left, right)
    assert same(left, right)


def underflowing(height: int) -> Factors:
    """Factors whose products round to -0."""
    return np.full((height, 2), -1e-25, np.float32), np.full((2, 4096), 1e-25, np.float32)


def test_sums_that_would_round_to_minus_0_are_taken_in_one_go() -> None:
    left, right = underflowing(128)
    assert not same_in_pieces(left, right)
    with one_thread():
        block = add_product(np.full((128, 4096), -0.0, np.float32), left, right)
    assert not np.signbit(block).any()


@pytest.mark.parametrize("height", [128, 129, 130, 135, 200])
def test_pieces_are_made(height: int) -> None:
    """They are known by what they alone give."""
    left, right = underflowing(height)
    found = np.empty((height, 4096), np.float32)
    with one_thread():
        multiply_in_pieces(left, right, found)
        assert not np.signbit(left @ right).any()
    assert np.signbit(found).all()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.ones((8, 4)), np.ones((4, 16))),
        (np.ones((8, 1), np.float32), np.ones((1, 16), np.float32)),
        (np.ones((8, 65), np.float32), np.ones((65, 16), np.float32)),
    ],
    ids=["float64", "rank 1", "rank 65"],
)
def test_other_products_are_not_taken_apart(left: np.ndarray, right: np.ndarray) -> None:
    assert not same_in_pieces(left, right)


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, -(2.0**-126), 1.5, np.inf])
def test_the_least_magnitude_is_found_beside_zeros(value: float) -> None:
    least = products._least(np.array([[3e38, value], [0.0, -0.0]], np.float32))
    assert least == (np.float32(3e38) if value == 0 or value > 3e38 else abs(value))


def test_zeros_have_no_least_magnitude() -> None:
    assert products._least(np.zeros((2, 2), np.float32)) == np.inf


@pytest.mark.parametrize("shape", [(1 << 16, 16), (16, 1 << 16)])
def test_the_least_magnitude_is_found_without_a_copy(shape: tuple[int, int]) -> None:
    factor = np.ones(shape, np.float32)
    factor[-1, -1] = 0.25
    tracemalloc.start()
    try:
        assert products._least(factor) == 0.25
        assert tracemalloc.get_traced_memory()[1] < factor.nbytes / 4
    finally:
        tracemalloc.stop()
