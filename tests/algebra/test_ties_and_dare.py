# SPDX-License-Identifier: Apache-2.0
"""TIES, DARE and pruning of adapters are what their papers say, and are cut optimally."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from surgery import Rank, combine
from surgery_formats.errors import FitError
from tests.oracles import models, peft_oracle
from tests.support.adapter_files import (
    peft_deltas,
)
from tests.support.combinations import best, simple


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """arXiv:2306.01708, algorithm 1, element by element; lambda is the weights, on the task vectors."""
    n = deltas[0].size
    trimmed = []
    for delta, weight in zip(deltas, weights, strict=True):
        keep = np.argsort(-np.abs(delta).ravel(), kind="stable")[: math.ceil(density * n)]
        flat = np.zeros(n)
        flat[keep] = delta.ravel()[keep]
        trimmed.append(weight * flat)
    merged = np.zeros(n)
    for p in range(n):
        gamma = np.sign(sum(vector[p] for vector in trimmed))
        agreeing = [vector[p] for vector in trimmed if vector[p] != 0 and np.sign(vector[p]) == gamma]
        merged[p] = np.mean(agreeing) if agreeing else 0.0
    return merged.reshape(deltas[0].shape)


@pytest.fixture
def pair(tmp_path: Path) -> list[tuple[Path, float]]:
    return [
        (simple(tmp_path / "a", 1, 3), 0.7),
        (simple(tmp_path / "b", 5, 4), -0.4),
        (simple(tmp_path / "c", 9, 2), 1.1),
    ]


def _found(pairs: list[tuple[Path, float]], out: Path, **options: object) -> np.ndarray:
    combine(pairs, output=out, rank=24, **options)  # type: ignore[arg-type]  # full rank: nothing is lost
    return peft_deltas(out)["model.layers.0.self_attn.q_proj"]


def _deltas(pairs: list[tuple[Path, float]]) -> tuple[list[np.ndarray], list[float]]:
    return [peft_deltas(path)["model.layers.0.self_attn.q_proj"] for path, _ in pairs], [weight for _, weight in pairs]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_follows_its_paper(pair: list[tuple[Path, float]], tmp_path: Path, density: float) -> None:
    wanted = ties(*_deltas(pair), density)
    got = _found(pair, tmp_path / "out", method="ties", density=density)
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_by_frequency_elects_the_sign_of_most(
    pair: list[tuple[Path, float]], tmp_path: Path, density: float
) -> None:
    deltas, weights = _deltas(pair)
    kept = [
        w * np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-math.ceil(density * d.size)], d, 0)
        for d, w in zip(deltas, weights, strict=True)
    ]
    signs = np.sign(sum(np.sign(d) for d in kept))
    agree = [np.where((np.sign(d) == signs) & (d != 0), d, 0) for d in kept]
    wanted = sum(agree) / np.maximum(sum((d != 0).astype(float) for d in agree), 1)
    got = _found(pair, tmp_path / "out", method="ties", density=density, majority="frequency")
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_peft_ties_is_what_peft_computes(tmp_path: Path, density: float, majority: str) -> None:
    base = models.build_base("llama", tmp_path / "base")
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    pairs = [(tmp_path / name, weight) for name, weight in (("one", 0.7), ("two", -0.4), ("three", 1.1))]
    for seed, (path, _) in enumerate(pairs):
        peft_oracle.train("llama", base, "LoraConfig", config, path, seed=seed)
    combine(pairs, output=tmp_path / "out", rank=models.HIDDEN, method="peft-ties", density=density, majority=majority)
    wrapped = peft_oracle.attach("llama", base, [(path, 1.0) for path, _ in pairs], "float64")
    with peft_oracle.quiet():
        wrapped.add_weighted_adapter(
            ["a0", "a1", "a2"],
            [weight for _, weight in pairs],
            "both",
            combination_type="ties_svd",
            density=density,
            majority_sign_method=majority,
            svd_rank=models.HIDDEN,
        )
    got = peft_deltas(tmp_path / "out")
    assert got
    for name, delta in got.items():
        module = wrapped.base_model.model.get_submodule(name)
        wanted = module.get_delta_weight("both").detach().double().numpy()
        assert np.linalg.norm(delta - wanted) <= 1e-5 * np.linalg.norm(wanted), name


def test_magnitude_prune_is_the_sum_of_what_is_left(pair: list[tuple[Path, float]], tmp_path: Path) -> None:
    deltas, weights = _deltas(pair)
    wanted = sum(
        w * np.where(np.abs(d) >= np.quantile(np.abs(d), 0.75, method="higher"), d, 0)
        for d, w in zip(deltas, weights, strict=True)
    )
    got = _found(pair, tmp_path / "out", method="magnitude-prune", density=0.25)
    assert np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_dare_drops_and_rescales(pair: list[tuple[Path, float]], tmp_path: Path, method: str) -> None:
    """arXiv:2311.03099: every value is what one of the 2^3 ways to drop gives, and each is dropped as often as it should be."""
    deltas, weights = _deltas(pair)
    density = 0.6
    got = _found(pair, tmp_path / "out", method=method, density=density)
    masks = [[bool(bits >> i & 1) for i in range(3)] for bits in range(8)]
    ways = []
    for mask in masks:
        parts = [w * d / density * keep for d, w, keep in zip(deltas, weights, mask, strict=True)]
        ways.append(sum(parts) if method == "dare-linear" else ties(parts, [1.0] * 3, 1.0))
    apart = np.abs(np.stack(ways) - got)
    assert apart.min(axis=0).max() <= 1e-5 * np.abs(got).max()
    if method == "dare-linear":
        nearest = apart.argmin(axis=0)
        for number in range(3):
            kept = np.mean([masks[way][number] for way in nearest.ravel()])
            assert abs(kept - density) < 4 * math.sqrt(density * (1 - density) / got.size)
    again = _found(pair, tmp_path / "again", method=method, density=density)
    other = _found(pair, tmp_path / "other", method=method, density=density, seed=1)
    assert np.array_equal(got, again)
    assert not np.allclose(got, other)


def test_dare_keeps_the_mean(tmp_path: Path) -> None:
    """Rescaling makes the expectation of what is left the delta itself."""
    from surgery.algebra.ties_and_dare import merge_deltas

    delta = np.full((400, 400), 3.0)
    found = merge_deltas([delta.copy], [1.0], method="dare-linear", density=0.1, seed=0, name="x", owners=[0])
    assert float(found.mean()) == pytest.approx(3.0, rel=0.03)
    assert set(np.unique(found).tolist()) == {0.0, 30.0}


def test_a_dense_method_is_cut_optimally(pair: list[tuple[Path, float]], tmp_path: Path) -> None:
    wanted = ties(*_deltas(pair), 0.3)
    result = combine(pair, output=tmp_path / "out", rank=5, method="ties", density=0.3)
    apart = np.linalg.norm(peft_deltas(tmp_path / "out")["model.layers.0.self_attn.q_proj"] - wanted)
    assert apart <= 1.0001 * best(wanted, 5) + 1e-6 * np.linalg.norm(wanted)
    assert result.error == pytest.approx(apart / np.linalg.norm(wanted), rel=1e-4)
    by_energy = combine(pair, output=tmp_path / "e", rank=Rank.energy(0.9), method="ties", density=0.3)
    squares = np.linalg.svd(wanted, compute_uv=False) ** 2
    assert by_energy.modules[0].rank == int((np.cumsum(squares) < 0.9 * squares.sum()).sum()) + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ties", "rank": 4}, "needs a density"),
        ({"method": "ties", "density": 0.5}, "full rank"),
        ({"method": "exact", "density": 0.5}, "no density"),
        ({"method": "tise"}, "no method"),
        ({"method": "ties", "rank": 4, "density": 0.5, "majority": "most"}, "no majority"),
        ({"method": "dare-linear", "rank": 4, "density": 0.5, "majority": "total"}, "elects no signs"),
        ({"rank": 0}, "the rank is 0"),
        ({"rank": Rank.budget("1MB")}, "is for extractions"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(FitError, match=said):
        combine([(tmp_path / "never read", 1.0)], output=tmp_path / "x", **options)  # type: ignore[arg-type]


def test_dare_drops_other_values_of_each_adapter() -> None:
    """Alike deltas would otherwise lose the same values, and what each keeps would not make up for the other."""
    from surgery.algebra.ties_and_dare import merge_deltas

    delta = np.ones((200, 200))
    found = merge_deltas(
        [delta.copy] * 2, [1.0, 1.0], method="dare-linear", density=0.5, seed=0, name="x", owners=[0, 1]
    )
    assert [float((found == value).mean()) for value in (0.0, 2.0, 4.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
