# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback is GPTQ's own, and makes errors vanish where it shall."""

from __future__ import annotations

import numpy as np
import pytest

from surgery_formats.linalg.feedback import feedback, leading_inputs, round_columns, round_rows, step_width

GENERATOR = np.random.default_rng(0)


def nearest(values: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    codes = values.round()
    return codes.astype(np.int8), codes.astype(np.float32)


def gptq(values: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The published recursion: column by column, with the Cholesky factor of the inverse."""
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    work, rounded = values.astype(np.float64), np.empty_like(values)
    for j in range(values.shape[1]):
        rounded[:, j] = work[:, j].astype(np.float32).round()
        error = (work[:, j] - rounded[:, j]) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    return rounded


@pytest.mark.parametrize(("rank", "diagonal"), [(1, 1.0), (4, 0.1), (8, 1e-3), (60, 0.01)])
def test_it_is_gptq_with_the_same_second_moment(rank: int, diagonal: float) -> None:
    values = GENERATOR.normal(size=(40, 60)).astype(np.float32) * 2
    directions = GENERATOR.normal(size=(rank, 60)) / np.sqrt(60)
    codes, rounded = round_columns(values, feedback(directions, diagonal, 1), nearest)
    wanted = gptq(values, diagonal * np.eye(60) + directions.T @ directions)
    assert (rounded != wanted).mean() < 0.002  # float32 against float64, halfway between two numbers
    assert np.array_equal(codes, rounded.astype(np.int8))


def test_small_changes_of_a_grid_survive_in_their_directions_and_nowhere_with_nearest() -> None:
    basis = np.linalg.qr(GENERATOR.normal(size=(1024, 4)))[0].T
    stored = GENERATOR.integers(-7, 8, (64, 1024)).astype(np.float32)
    update = (GENERATOR.normal(size=(64, 4)) @ basis).astype(np.float32)
    assert np.array_equal(nearest(stored + update, 0)[1], stored)
    _, rounded = round_columns(stored + update, feedback(basis, 0.02), nearest)
    inside = [part @ basis.T for part in (rounded - stored, update)]
    assert np.linalg.norm(inside[0] - inside[1]) < 0.15 * np.linalg.norm(inside[1])


def test_values_on_the_grid_stay_whatever_the_directions() -> None:
    stored = GENERATOR.integers(-7, 8, (8, 300)).astype(np.float32)
    _, rounded = round_columns(stored, feedback(GENERATOR.normal(size=(3, 300)), 1e-3), nearest)
    assert np.array_equal(rounded, stored)


@pytest.mark.parametrize("height", [8, 24, 80, 304])
def test_rows_as_inputs_in_blocks_are_columns_of_the_transpose(height: int) -> None:
    values = GENERATOR.normal(size=(50, 600)).astype(np.float32) * 2
    inputs = feedback(GENERATOR.normal(size=(5, 600)), 0.1)
    assert inputs.width == step_width(600) == 8
    _, wanted = round_columns(values, inputs, nearest)
    error = np.zeros((5, 50), np.float32)
    blocks = [values.T[start : start + height] for start in range(0, 600, height)]
    found = [round_rows(block, i * height, error, inputs, nearest)[1] for i, block in enumerate(blocks)]
    assert (wanted != np.concatenate(found).T).mean() < 0.002


def test_leading_inputs_span_the_rows_of_every_factor() -> None:
    pairs = [(GENERATOR.normal(size=(9, r)), GENERATOR.normal(size=(r, 40))) for r in (2, 3)]
    basis = leading_inputs(pairs, 64)
    assert np.allclose(basis @ basis.T, np.eye(5))
    for B, A in pairs:
        assert np.allclose(B @ A @ basis.T @ basis, B @ A)
    assert len(leading_inputs(pairs, 3)) == 3
    assert len(leading_inputs([(np.zeros((9, 2)), np.ones((2, 40)))], 64)) == 0
