# SPDX-License-Identifier: Apache-2.0
"""Codes: within half a step, the same again after decoding, and products nearer than rounding each factor gets them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import CODINGS, Coding
from surgery_formats.linalg.factored import relative_error
from surgery_formats.linalg.quantise import Codes, dequantise, quantise, quantise_product

every_coding = pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))


@st.composite
def _numbers(draw: st.DrawFn) -> torch.Tensor:
    """Rows of one or more groups, some of them zero or with an outlier, at any scale that weights have."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-12, 12))
    values[draw(st.integers(0, shape[0] - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    return values


def _steps(codes: Codes, coding: Coding) -> torch.Tensor:
    return codes.scales.double().repeat_interleave(coding.group)[: codes.values.numel()].reshape(codes.values.shape)


@every_coding
@settings(max_examples=60, deadline=None)
@given(_numbers())
def test_values_are_within_half_a_step_unless_clipped(coding: Coding, values: torch.Tensor) -> None:
    codes = quantise(values, coding)
    error = (dequantise(codes, coding).double() - values).abs()
    inside = codes.values.abs() < coding.largest
    assert bool((error <= _steps(codes, coding) * (0.5 + 1e-12))[inside].all())
    assert bool((codes.values.abs() <= coding.largest).all())
    plain = _at_largest(values, coding)  # the scale that clips nothing is among those tried, so the error is no larger
    assert float(error.square().sum()) <= float((plain - values).square().sum()) * (1 + 1e-12)


def _at_largest(values: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Each group coded with the scale ``max / largest``, rounded as scales are."""
    found = torch.empty_like(values).reshape(-1)
    for start in range(0, values.numel(), coding.group):
        group = values.reshape(-1)[start : start + coding.group]
        step = (group.abs().max() / coding.largest).bfloat16().double()
        coded = (group / step).round().clamp(-coding.largest, coding.largest) * step if step else group * 0
        found[start : start + coding.group] = coded
    return found.reshape(values.shape)


@every_coding
@settings(max_examples=60, deadline=None)
@given(_numbers())
def test_coding_decoded_values_again_changes_nothing(coding: Coding, values: torch.Tensor) -> None:
    decoded = dequantise(quantise(values, coding), coding)
    assert torch.equal(dequantise(quantise(decoded, coding), coding), decoded)


@every_coding
def test_float32_holds_every_code_exactly(coding: Coding) -> None:
    codes = torch.arange(-coding.largest, coding.largest + 1, dtype=torch.int8)
    for scale in (1.9921875, 3e-38, 1.17e36):  # all bits of a bfloat16 set, the smallest and the largest that matter
        scales = torch.full((coding.scales(len(codes)),), scale, dtype=torch.bfloat16)
        exact = codes.double() * scales[0].double()
        assert torch.equal(dequantise(Codes(codes, scales), coding).double(), exact)


def _product(rank: int, out: int = 96, inputs: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    decay = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.7
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64) * decay
    return B, torch.randn(rank, inputs, generator=generator, dtype=torch.float64)


@every_coding
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
def test_a_coded_product_is_nearer_than_its_rounded_factors(coding: Coding, rank: int) -> None:
    B, A = _product(rank)
    found = quantise_product(B, A, coding)
    decoded = dequantise(found.B, coding).double(), dequantise(found.A, coding).double().T
    assert found.error == relative_error((B, A), decoded)
    plain = dequantise(quantise(B, coding), coding).double(), dequantise(quantise(A.T.contiguous(), coding), coding).T
    assert found.error <= relative_error((B, A), (plain[0], plain[1].double()))
    if rank == 40:  # what mixing, feedback and least squares are for
        assert found.error < 0.75 * relative_error((B, A), (plain[0], plain[1].double()))
        assert found.error < {"int8": 0.008, "int4": 0.12}[coding.name]


@every_coding
def test_codes_are_deterministic_and_stable_under_recoding(coding: Coding) -> None:
    B, A = _product(16)
    one, other = (quantise_product(B, A, coding) for _ in range(2))
    assert torch.equal(one.B.values, other.B.values)
    assert torch.equal(one.A.scales, other.A.scales)
    decoded = dequantise(one.B, coding), dequantise(one.A, coding).T
    again = quantise_product(*decoded, coding)
    assert torch.equal(dequantise(again.B, coding), decoded[0])
    assert torch.equal(dequantise(again.A, coding).T, decoded[1])


@every_coding
def test_zeros_stay_zero_and_redundant_rank_is_dropped(coding: Coding) -> None:
    nothing = quantise_product(torch.zeros(5, 3), torch.ones(3, 4), coding)
    assert nothing.error == 0.0
    B, A = _product(16, 6, 9)
    assert quantise_product(B, A, coding).B.values.shape == (6, 6)
    padded = torch.cat([B, torch.zeros(6, 4, dtype=torch.float64)], 1), torch.cat([A, torch.ones(4, 9)], 0)
    assert quantise_product(*padded, coding).error < 0.3
    with pytest.raises(FitError, match="NaN or infinity"):
        quantise_product(B * torch.nan, A, coding)
