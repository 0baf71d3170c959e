# SPDX-License-Identifier: Apache-2.0
"""Orthonormal to rounding however skew a panel is, alone and in a stack, in either library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy
import pytest

from surgery_formats.arrays import Array, is_torch, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.panel import noise, orthonormal, positive, within, without
from tests.support.libraries import each_library

Of = Callable[[numpy.ndarray], Array]


def panels(b: int, n: int) -> numpy.ndarray:
    """Well conditioned, with directions from 1 down to 1e-15, of rank 1, and zero."""
    random = numpy.random.default_rng(0)
    rows = random.standard_normal((4, b, n))
    rows[1] *= 10.0 ** -numpy.linspace(0, 15, b)[:, None]
    rows[1] = numpy.linalg.qr(random.standard_normal((b, b)))[0] @ rows[1]
    rows[2] = rows[2, :, :1] * rows[2, :1]
    rows[3] = 0
    return rows


@each_library
@pytest.mark.parametrize(("b", "n"), [(1, 5), (6, 6), (24, 300), (128, 700)])
def test_a_panel_becomes_orthonormal_and_keeps_its_rows(b: int, n: int, of: Of) -> None:
    rows, filler = panels(b, n), numpy.random.default_rng(1).standard_normal((b, n))
    basis = to_cpu(orthonormal(of(rows), of(filler)))
    assert numpy.abs(basis @ basis.mT - numpy.eye(b)).max() <= 4e-15 * n**0.5
    beside = rows - (rows @ basis.mT) @ basis
    assert numpy.linalg.norm(beside, axis=(1, 2)).max() <= 1e-8 * n  # the filler's share
    for one, alone in zip(basis, rows, strict=True):
        numpy.testing.assert_allclose(to_cpu(orthonormal(of(alone), of(filler))) @ one.T, numpy.eye(b), atol=1e-6)


@each_library
def test_stacks_are_projected_one_by_one(of: Of) -> None:
    filler = of(numpy.random.default_rng(1).standard_normal((5, 40)))
    basis, rows = orthonormal(of(panels(5, 40)), filler), of(panels(3, 40))
    rest = to_cpu(without(rows, basis))
    assert numpy.abs(rest @ to_cpu(basis).mT).max() <= 1e-14
    for one, row, held in zip(rest, rows, basis, strict=True):
        numpy.testing.assert_allclose(to_cpu(without(row, held)), one, atol=1e-14)
    support = numpy.arange(40) != 7
    inside = to_cpu(rows) * support
    unit = inside / numpy.linalg.norm(inside, axis=-1, keepdims=True).clip(min=1e-300)
    nearly = unit + 1e-9 * ~support
    assert numpy.array_equal(to_cpu(within(of(nearly), of(support)))[:3], (nearly * support)[:3])
    assert numpy.array_equal(to_cpu(within(of(nearly), of(~support)))[:3], nearly[:3])  # they lie outside
    assert to_cpu(positive(of(numpy.array([[1.0, -2.0], [2.0, -1.0], [1.0, -1.0]])))).tolist() == [[-1], [1], [1]]


@each_library
def test_random_numbers_are_those_of_the_seed(of: Of) -> None:
    like = of(numpy.zeros(0))
    one, same, other = (noise((4, 500), seed, DType.F32, like) for seed in (-3, -3, 4))
    assert is_torch(one) == is_torch(like)
    assert numpy.array_equal(to_cpu(one), to_cpu(same))
    assert not numpy.array_equal(to_cpu(one), to_cpu(other))
    assert abs(float(to_cpu(one).std()) - 1) < 0.05


SCRIPT = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
import numpy
from surgery_formats.linalg import coding, factored, fit_dora, noise, quantise, svd, whitening
from surgery_formats.dtypes import DType
d = numpy.random.default_rng(0).standard_normal((300, 200), numpy.float32)
B, A = svd.truncated_svd(d, rank=8).factors()
factored.rerank(B, A, 4)
quantise.dequantise(quantise.quantise_product(B, A, coding.CODINGS["int4"]).B, coding.CODINGS["int4"])
noise.survival(d, B @ A, DType.BF16)
fit_dora.alternate(fit_dora.HeldPair(d, d + B @ A), 4, device="cpu")
whitening.weighted_factors(d, whitening.moment_of_inputs([d], 300), 8)
"""


def test_linear_algebra_on_the_cpu_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
