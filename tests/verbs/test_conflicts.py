# SPDX-License-Identifier: Apache-2.0
"""How two adapters get in each other's way, against whole decompositions of what they add."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from tests.support.page_reader import check_page

OUT, INPUTS, RANK = 40, 30, 4
MODULES = [f"model.layers.{layer}.self_attn.{part}" for layer in range(2) for part in ("q_proj", "v_proj")]


def write(path: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    path.mkdir()
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(A, np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(B, np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[1].shape[0]
    modules = sorted({name.rpartition(".")[2] for name in factors})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "base_model_name_or_path": "x",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def drawn(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal((OUT, RANK)), random.standard_normal((RANK, INPUTS))) for name in MODULES}


def spaces(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    U, values, V = np.linalg.svd(delta)
    return U[:, :RANK], values, V[:RANK].T


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Of two spaces by their projections, which name no angle."""
    return float(np.trace(one @ one.T @ other @ other.T)) / min(one.shape[1], other.shape[1])


def test_overlaps_spikes_and_growth_are_those_of_the_whole_deltas(tmp_path):
    mine, theirs = drawn(1), drawn(2)
    result = surgery.diff(write(tmp_path / "a", mine), write(tmp_path / "b", theirs))
    assert len(result.modules) == len(MODULES)
    for module in result.modules:
        name = module.name.removesuffix(".weight")
        one, other = (B.astype(np.float32) @ A.astype(np.float32) for B, A in (mine[name], theirs[name]))
        (left, values, right), (left_other, values_other, right_other) = spaces(one), spaces(other)
        conflict = module.conflict
        assert conflict.inputs == pytest.approx(overlap(right, right_other), abs=1e-5)
        assert conflict.outputs == pytest.approx(overlap(left, left_other), abs=1e-5)
        spikes = [each[0] ** 2 / (each**2).sum() for each in (values, values_other)]
        assert conflict.spikes == pytest.approx(spikes, abs=1e-5)
        both = np.linalg.svd(one + other, compute_uv=False)[0]
        assert conflict.growth == pytest.approx(both / max(values[0], values_other[0]), abs=1e-5)
        assert conflict.chance == pytest.approx(RANK / INPUTS)


def test_orthogonal_adapters_do_not_meet_and_equal_directions_add_up(tmp_path):
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((INPUTS, 2 * RANK)))[0].T
    B = np.linalg.qr(np.random.default_rng(4).standard_normal((OUT, 2 * RANK)))[0]
    sides = {
        "a": (B[:, :RANK], basis[:RANK]),
        "apart": (B[:, RANK:], basis[RANK:]),
        "same": (2 * B[:, :RANK], basis[:RANK]),
        "spike": (B[:, :RANK] * np.array([100, 1, 1, 1]), basis[:RANK]),
    }
    at = {name: write(tmp_path / name, dict.fromkeys(MODULES, side)) for name, side in sides.items()}
    found = {name: surgery.diff(at["a"], at[name]).modules[0].conflict for name in sides if name != "a"}
    assert (found["apart"].inputs, found["apart"].outputs) == pytest.approx((0, 0), abs=1e-6)
    assert found["apart"].growth == pytest.approx(1, abs=1e-5)
    assert (found["same"].inputs, found["same"].outputs) == pytest.approx((1, 1), abs=1e-5)
    assert found["same"].growth == pytest.approx(1.5, abs=1e-5)
    assert found["spike"].spikes == pytest.approx((1 / RANK, 10_000 / 10_003), abs=1e-4)
    assert surgery.diff(at["a"], at["a"]).modules[0].conflict is None


def test_a_dry_run_of_a_sum_tells_them_with_weights_and_writing_does_not(tmp_path):
    a, b = write(tmp_path / "a", drawn(1)), write(tmp_path / "b", drawn(1))
    ahead = surgery.combine([a, (b, 0.5)], dry_run=True)
    assert [conflict.growth for conflict in ahead.conflicts.values()] == pytest.approx([1.5] * len(MODULES))
    assert "overlap of inputs 1, of outputs 1" in str(ahead)
    assert len(check_page(ahead.summary().as_html()).all("figure")) == 4
    assert ahead.as_json()["conflicts"].keys() == ahead.conflicts.keys()
    done = surgery.combine([a, (b, 0.5)], output=tmp_path / "out")
    assert not done.conflicts
    assert "conflicts" not in done.as_manifest()
    some = surgery.combine([a, b], only="q_proj", dry_run=True)
    assert all("q_proj" in name for name in some.conflicts)
    assert not surgery.combine([a, b, b], dry_run=True).conflicts
