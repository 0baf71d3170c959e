# SPDX-License-Identifier: Apache-2.0
"""Codes: within half a step, the same again after decoding, and products nearer than rounding each factor gets them."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.arrays import Array, cast, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import CODINGS, Coding
from surgery_formats.linalg.factored import relative_error
from surgery_formats.linalg.quantise import Codes, dequantise, quantise, quantise_product
from tests.support.libraries import each_library

Of = Callable[[numpy.ndarray], Array]
every_coding = pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))


@st.composite
def _numbers(draw: st.DrawFn) -> numpy.ndarray:
    """Rows of one or more groups, some of them zero or with an outlier, at any scale that weights have."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 40)))
    random = numpy.random.default_rng(draw(st.integers(0, 10_000)))
    values = random.standard_normal(shape) * 10.0 ** draw(st.integers(-12, 12))
    values[draw(st.integers(0, shape[0] - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    return values


def _exact(values: Array) -> numpy.ndarray:
    return to_cpu(values).astype(numpy.float64)


def _steps(codes: Codes, coding: Coding) -> numpy.ndarray:
    values = to_cpu(codes.values)
    return _exact(codes.scales).repeat(coding.group)[: values.size].reshape(values.shape)


@each_library
@every_coding
@settings(max_examples=60, deadline=None)
@given(values=_numbers())
def test_values_are_within_half_a_step_unless_clipped(coding: Coding, values: numpy.ndarray, of: Of) -> None:
    codes = quantise(of(values), coding)
    error = numpy.abs(_exact(dequantise(codes, coding)) - values)
    sizes = numpy.abs(to_cpu(codes.values))
    inside = sizes < coding.largest
    assert (error <= _steps(codes, coding) * (0.5 + 1e-12))[inside].all()
    assert (sizes <= coding.largest).all()
    plain = _at_largest(values, coding)  # the scale that clips nothing is among those tried, so the error is no larger
    assert (error**2).sum() <= ((plain - values) ** 2).sum() * (1 + 1e-12)


def _at_largest(values: numpy.ndarray, coding: Coding) -> numpy.ndarray:
    """Each group coded with the scale ``max / largest``, rounded as scales are."""
    found = numpy.empty(values.size)
    for start in range(0, values.size, coding.group):
        group = values.reshape(-1)[start : start + coding.group]
        step = _exact(cast(numpy.abs(group).max(keepdims=True) / coding.largest, DType.BF16))[0]
        coded = numpy.round(group / step).clip(-coding.largest, coding.largest) * step if step else group * 0
        found[start : start + coding.group] = coded
    return found.reshape(values.shape)


@each_library
@every_coding
@settings(max_examples=60, deadline=None)
@given(values=_numbers())
def test_coding_decoded_values_again_changes_nothing(coding: Coding, values: numpy.ndarray, of: Of) -> None:
    decoded = dequantise(quantise(of(values), coding), coding)
    assert numpy.array_equal(to_cpu(dequantise(quantise(decoded, coding), coding)), to_cpu(decoded))


@each_library
@every_coding
def test_float32_holds_every_code_exactly(coding: Coding, of: Of) -> None:
    codes = numpy.arange(-coding.largest, coding.largest + 1, dtype=numpy.int8)
    for scale in (1.9921875, 3e-38, 1.17e36):  # all bits of a bfloat16 set, the smallest and the largest that matter
        scales = cast(numpy.full(coding.scales(len(codes)), scale), DType.BF16)
        exact = codes * _exact(scales)[0]
        assert numpy.array_equal(_exact(dequantise(Codes(of(codes), of(scales)), coding)), exact)


def _product(rank: int, out: int = 96, inputs: int = 160) -> tuple[numpy.ndarray, numpy.ndarray]:
    random = numpy.random.default_rng(rank)
    B = random.standard_normal((out, rank)) * numpy.arange(1, rank + 1) ** -0.7
    return B, random.standard_normal((rank, inputs))


def _decoded(B: Codes, A: Codes, coding: Coding) -> tuple[Array, Array]:
    return dequantise(B, coding), dequantise(A, coding).T


@each_library
@every_coding
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
def test_a_coded_product_is_nearer_than_its_rounded_factors(coding: Coding, rank: int, of: Of) -> None:
    B, A = map(of, _product(rank))
    found = quantise_product(B, A, coding)
    assert found.error == relative_error((B, A), _decoded(found.B, found.A, coding))
    plain = relative_error((B, A), _decoded(quantise(B, coding), quantise(A.T, coding), coding))
    assert found.error <= plain
    if rank == 40:  # what mixing, feedback and least squares are for
        assert found.error < 0.75 * plain
        assert found.error < {"int8": 0.008, "int4": 0.12}[coding.name]


@each_library
@every_coding
def test_codes_are_deterministic_and_stable_under_recoding(coding: Coding, of: Of) -> None:
    B, A = _product(16)
    one, other = (quantise_product(of(B), of(A), coding) for _ in range(2))
    assert numpy.array_equal(to_cpu(one.B.values), to_cpu(other.B.values))
    assert numpy.array_equal(to_cpu(one.A.scales), to_cpu(other.A.scales))
    decoded = dequantise(one.B, coding), dequantise(one.A, coding).T
    again = quantise_product(*decoded, coding)
    assert numpy.array_equal(to_cpu(dequantise(again.B, coding)), to_cpu(decoded[0]))
    assert numpy.array_equal(to_cpu(dequantise(again.A, coding).T), to_cpu(decoded[1]))


@each_library
@every_coding
def test_zeros_stay_zero_and_redundant_rank_is_dropped(coding: Coding, of: Of) -> None:
    nothing = quantise_product(of(numpy.zeros((5, 3))), of(numpy.ones((3, 4))), coding)
    assert nothing.error == 0.0
    B, A = _product(16, 6, 9)
    assert tuple(quantise_product(of(B), of(A), coding).B.values.shape) == (6, 6)
    padded = numpy.concat([B, numpy.zeros((6, 4))], axis=1), numpy.concat([A, numpy.ones((4, 9))])
    assert quantise_product(of(padded[0]), of(padded[1]), coding).error < 0.3
    with pytest.raises(FitError, match="NaN or infinity"):
        quantise_product(of(B * numpy.nan), of(A), coding)
