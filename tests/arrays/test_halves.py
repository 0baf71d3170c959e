# SPDX-License-Identifier: Apache-2.0
"""float16 by bits: exactly numpy's own results, for every value and around every rounding boundary."""

import numpy as np
import pytest

from surgery_formats.arrays import assign, cast
from surgery_formats.dtypes import DType

EVERY = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def rounded(values: np.ndarray) -> np.ndarray:
    """By numpy's own cast, one value at a time."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


@pytest.mark.parametrize("values", [EVERY, FINITE, FINITE[:1], FINITE[:0]], ids=["all", "finite", "one", "none"])
def test_every_float16_is_widened_exactly(values: np.ndarray) -> None:
    assert cast(values, DType.F32).tobytes() == values.astype(np.float32).tobytes()


def boundaries() -> np.ndarray:
    """Every float16, every middle between two, and the float32 on either side of each."""
    grid = np.unique(FINITE.astype(np.float32))
    middles = (grid[1:] + grid[:-1]) / 2  # exact: float32 has a bit to spare
    near = np.concatenate([grid, -grid[grid == 0], middles])
    sides = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([near, *sides])


def test_every_boundary_of_rounding_goes_where_numpy_has_it() -> None:
    values = boundaries()
    sizes = abs(values)
    # few enough at once that the sum of squares proves that none overflows
    for low, high, count in ((0, 120, 1 << 17), (120, 3000, 400), (3000, 32000, 4), (32000, 65504, 1)):
        some = values[(sizes >= low) & (sizes < high)]
        assert some.size > 1000
        for piece in np.array_split(some, -(-some.size // count)):
            assert cast(piece, DType.F16).tobytes() == rounded(piece).tobytes()


def test_values_far_below_and_any_bits_are_rounded_alike() -> None:
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    small = bits[abs(bits) < 200]
    assert small.size > 1 << 18
    assert cast(small, DType.F16).tobytes() == rounded(small).tobytes()
    tiny = np.ldexp(draw.standard_normal(1 << 18), -20).astype(np.float32)
    assert cast(tiny, DType.F16).tobytes() == rounded(tiny).tobytes()


@pytest.mark.parametrize("last", [65504.0, 65519.0, 65520.0, 1e30, np.inf, -np.inf, np.nan])
def test_what_overflows_or_is_no_number_stays_what_numpy_makes_of_it(last: float) -> None:
    values = np.array([1.0, -2.5, last], np.float32)
    assert cast(values, DType.F16).tobytes() == rounded(values).tobytes()


def test_a_part_of_a_matrix_is_rounded_in_place() -> None:
    values = np.random.default_rng(0).standard_normal((300, 400), np.float32)
    target = np.zeros((300, 400), np.float16)
    assign(target[:, ::2], values[:, ::2])
    assign(target[10:20], values[10:20])
    expected = np.zeros_like(target)
    expected[:, ::2], expected[10:20] = rounded(values[:, ::2]), rounded(values[10:20])
    assert target.tobytes() == expected.tobytes()
