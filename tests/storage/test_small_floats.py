# SPDX-License-Identifier: Apache-2.0
"""Small floats mean what their standards say, by their formula and by torch, and the nearest code is the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery_formats.storage.small_floats import (
    E2M1,
    E2M3,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    E8M0,
    SmallFloat,
    decode_pairs,
)

SIGNED = {E2M1: (1, 1), E2M3: (3, 1), E4M3: (3, 7), E5M2: (2, 15), E4M3_FNUZ: (3, 8), E5M2_FNUZ: (2, 16)}
"""Bits of the fraction, and the bias of the exponent."""
KINDS = pytest.mark.parametrize("kind", SIGNED, ids=lambda kind: kind.label)


def codes_of(kind: SmallFloat) -> np.ndarray:
    return np.arange(1 << kind.bits, dtype=np.uint8)


@KINDS
def test_codes_stand_for_sign_exponent_and_fraction(kind: SmallFloat) -> None:
    fraction_bits, bias = SIGNED[kind]
    for code, value in enumerate(kind.decode(codes_of(kind)).tolist()):
        magnitude = code & ((1 << (kind.bits - 1)) - 1)
        exponent, fraction = magnitude >> fraction_bits, magnitude & ((1 << fraction_bits) - 1)
        mantissa = fraction / (1 << fraction_bits) + (exponent > 0)
        number = mantissa * 2.0 ** (max(exponent, 1) - bias) * (-1.0 if code >> (kind.bits - 1) else 1.0)
        if np.isfinite(value):
            assert value == number
        else:  # the codes for no number and for infinity
            assert abs(number) > kind.largest or code == 128


@KINDS
def test_the_greatest_number_is_the_greatest(kind: SmallFloat) -> None:
    values = kind.decode(codes_of(kind))
    assert values[np.isfinite(values)].max() == kind.largest
    beyond = np.array([np.finfo(np.float32).max, kind.largest * 1.3, np.inf], np.float32)
    assert (kind.rounded(beyond) == kind.largest).all()
    assert (kind.rounded(-beyond) == -kind.largest).all()


@KINDS
@given(values=arrays(np.float32, 64, elements=st.floats(-1e5, 1e5, width=32) | st.floats(-8, 8, width=32)))
def test_no_code_is_nearer(kind: SmallFloat, values: np.ndarray) -> None:
    numbers = kind.decode(codes_of(kind)).astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    best = abs(values[:, None].astype(np.float64) - numbers).min(axis=1)
    assert np.array_equal(abs(kind.rounded(values).astype(np.float64) - values), best)


@KINDS
def test_a_tie_goes_to_the_even_code(kind: SmallFloat) -> None:
    numbers = kind.decode(codes_of(kind)[: 1 << (kind.bits - 1)])
    numbers = numbers[np.isfinite(numbers)]
    between = (numbers[:-1].astype(np.float64) + numbers[1:]) / 2
    ties = between.astype(np.float32)
    assert (ties == between).all()
    assert (kind.nearest(ties) % 2 == 0).all()


@KINDS
def test_every_number_keeps_its_code(kind: SmallFloat) -> None:
    codes = codes_of(kind)
    codes = codes[np.isfinite(kind.decode(codes))]
    assert np.array_equal(kind.nearest(kind.decode(codes)), codes)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
        (E4M3_FNUZ, torch.float8_e4m3fnuz),
        (E5M2_FNUZ, torch.float8_e5m2fnuz),
        (E8M0, torch.float8_e8m0fnu),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_torch_reads_the_same_numbers(kind: SmallFloat, dtype: torch.dtype) -> None:
    codes = codes_of(kind)
    assert np.array_equal(kind.decode(codes), torch.from_numpy(codes).view(dtype).float().numpy(), equal_nan=True)


@KINDS
def test_conversions_agree_with_those_of_ml_dtypes(kind: SmallFloat) -> None:
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((300, 401)) * kind.largest * 2.0 ** rng.integers(-30, 2, (300, 401))).astype(
        np.float32
    )
    inside = values.clip(-kind.largest, kind.largest)
    assert np.array_equal(kind.nearest(values), inside.astype(getattr(ml_dtypes, kind.type_name)).view(np.uint8))


def test_pairs_have_the_first_number_in_the_low_half() -> None:
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (3, 5), np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 10)
    assert np.array_equal(decode_pairs(E2M1, packed), E2M1.decode(halves))
    assert np.array_equal(decode_pairs(E2M1, packed[:, 1:3]), E2M1.decode(halves[:, 2:6]))
