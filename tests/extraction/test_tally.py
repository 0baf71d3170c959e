# SPDX-License-Identifier: Apache-2.0
"""What is measured of a difference is right: in blocks, in stacks and in batches, on each library."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery import Rank
from surgery.extraction.factorise import StoredFactorSpec, factorise, factorise_stack
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.stream.tally import PairMeasure, Tally, measure_stack
from surgery_formats.arrays import Array, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.noise import NoiseTally
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.plain import Plain
from tests.support.libraries import each_library


class Compared(NamedTuple):
    """A pair of matrices: as arrays, as weights in files, and their true difference."""

    arrays: tuple[Array, Array]
    sides: tuple[Plain, Plain]
    change: torch.Tensor
    spacing: torch.Tensor


def compared(folder: Path, dtype: torch.dtype, of: Callable[[np.ndarray], Array], seed: int = 0) -> Compared:
    generator = torch.Generator().manual_seed(seed)
    old = (torch.randn(64, 48, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    new = (old.double() + 1e-3 * torch.randn(64, 48, generator=generator, dtype=torch.float64)).to(dtype)
    new[10:30] = old[10:30]
    new[:, 7] = old[:, 7]
    path = folder / f"{seed}.safetensors"
    save_file({"a": old, "b": new}, path)
    found = open_checkpoint(path).main.tensors
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}[dtype]
    spacing = torch.exp2(torch.frexp(new.double()).exponent.double() - 1 - bits)
    return Compared(
        (of(found["a"].read()), of(found["b"].read())),
        (Plain.of(found["a"]), Plain.of(found["b"])),
        new.double() - old.double(),
        spacing,
    )


def assert_right(measure: PairMeasure, edge: float, made: Array, pair: Compared) -> None:
    """Against float64 and the definitions; rows that do not differ have no noise in them."""
    hit = (pair.change != 0).any(1)
    rounding = pair.spacing[hit].square() / 12
    assert np.array_equal(made, pair.change.numpy().astype(made.dtype))
    assert measure.changed
    assert measure.moved == int((pair.change != 0).sum())
    assert measure.moved_share == measure.moved / pair.change.numel()
    assert measure.energy == pytest.approx(float(pair.change.square().sum()), rel=1e-6)
    assert measure.noise == pytest.approx(float(rounding.sum()), rel=1e-5)
    assert measure.ulp == float(pair.spacing[hit].flatten().sort().values[(rounding.numel() - 1) // 2])
    assert edge == pytest.approx(float(rounding.sum(1).max().sqrt() + rounding.sum(0).max().sqrt()), rel=1e-5)


@each_library
@pytest.mark.parametrize("height", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_tally_is_right_in_blocks_of_any_height(
    dtype: torch.dtype, height: int, of: Callable[[np.ndarray], Array], tmp_path: Path
) -> None:
    pair = compared(tmp_path, dtype, of)
    (old, new), tally, noise = pair.arrays, Tally(*pair.sides, 64, 100), NoiseTally()
    made = of(np.empty((64, 48), np.float64 if dtype == torch.float64 else np.float32))
    for at in range(0, 64, height):
        rows = slice(at, at + height)
        tally.subtract(at, old[rows], new[rows], made[rows], noise)
    measure = tally.result()
    assert_right(measure, noise.edge, to_cpu(made), pair)
    assert measure.rows == tuple(torch.nonzero((pair.change != 0).any(1)).flatten().tolist())


@each_library
@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stack_is_measured_as_its_matrices_are(
    dtype: torch.dtype,
    together: int,
    of: Callable[[np.ndarray], Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("surgery.extraction.stream.tally.MEASURED", together * 64 * 48)
    pairs = [compared(tmp_path, dtype, of, seed) for seed in range(5)]
    xp = namespace(pairs[0].arrays[0])
    base, tuned = (xp.stack([pair.arrays[side] for pair in pairs]) for side in (0, 1))
    tuned[2, ...] = base[2, ...]
    made = of(np.empty((5, 64, 48), np.float32))
    measures, edges = measure_stack(base, tuned, made, [pair.sides for pair in pairs])
    assert measures[2] == PairMeasure(False, numel=64 * 48)
    for number in (0, 1, 3, 4):
        assert_right(measures[number], edges[number], to_cpu(made)[number], pairs[number])
    tuned[3, 1, 1] = math.nan
    with pytest.raises(FitError, match="overflow"):  # of the stored values, none is
        measure_stack(base, tuned, made, [pair.sides for pair in pairs])


@each_library
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_a_stack_is_factorised_as_its_matrices_are(
    dtype: DType, transposed: bool, of: Callable[[np.ndarray], Array]
) -> None:
    """Among them one of low rank, of which almost nothing is left, and one whose squares vanish in float32."""
    random = np.random.default_rng(0)
    values = random.standard_normal((5, 300, 520), np.float32) * 1e-3
    values[1] = random.standard_normal((300, 4), np.float32) @ random.standard_normal((4, 520), np.float32)
    values[2] += random.standard_normal((300, 1), np.float32) @ random.standard_normal((1, 520), np.float32)
    values[4] *= np.float32(1e-25)
    energies = [float(np.sum(own.astype(np.float64) ** 2)) for own in values[:4]] + [0.0]
    plan = StoredFactorSpec(6, 1.25, dtype)
    scratch = ScratchFile(None)
    try:
        stack = factorise_stack(of(values), 8, energies=energies, edges=[0.5] * 5, plan=plan, transposed=transposed)
        together = stack.kept(scratch)
        assert len(together) == 5
        for matrix, own, energy in zip(together, values, energies, strict=True):
            alone = factorise(
                of(own), Rank.of(8), 8, [300], scratch, "cpu",
                energies=[energy], moved=True, edge=0.5, plan=plan, transposed=transposed,
            )  # fmt: skip
            assert matrix.values == pytest.approx(alone.values, rel=0.01, abs=1e-6 * alone.values[0])
            assert matrix.total == pytest.approx(alone.total, rel=1e-6)
            assert matrix.rest == pytest.approx(alone.rest, rel=2e-3, abs=1e-9 * alone.total)
            assert (matrix.edge, matrix.fold) == (alone.edge, alone.fold)
            assert matrix.bound <= 1.001
            left, right = (slot.read() for slot in (matrix.left, matrix.right))
            assert left.shape == ((6, 520) if transposed else (6, 300))
            product = (right.T @ left if transposed else left.T @ right).astype(np.float64) / plan.fold**2
            true = float(np.sum((own.astype(np.float64) - product) ** 2))
            assert matrix.left_energy is not None
            assert matrix.left_energy[0] == pytest.approx(true, rel=1e-3, abs=1e-12 * alone.total)
    finally:
        scratch.close()
