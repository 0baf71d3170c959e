# SPDX-License-Identifier: Apache-2.0
"""What differs between two adapters, against dense float64 arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from surgery import combine, convert, diff
from surgery.comparison.results import AdapterDiff
from surgery_formats.errors import FitError
from tests.support.adapter_files import GOLDEN, draw, peft_deltas, write_peft
from tests.support.differences import Q, V, diff_adapters, lora, run


def test_differences_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", (Q, 1, 3), (V, 3, 2))
    b = lora(tmp_path / "b", (Q, 5, 5), use_rslora=True)
    found = diff_adapters(a, b)
    one, other = peft_deltas(a), peft_deltas(b)
    q = one["model.layers.0.self_attn.q_proj"]
    p = other["model.layers.0.self_attn.q_proj"]
    both, only = found.modules
    assert (both.status, only.status) == ("different", "only in A")
    assert both.difference == pytest.approx(np.linalg.norm(p - q) / np.linalg.norm(q), rel=1e-9)
    assert both.cosine == pytest.approx((p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q), rel=1e-9)
    assert both.a
    assert both.b
    assert (both.a.rank, both.b.rank, both.a.scale) == (3, 5, 4 / 3)
    assert both.b.scale == pytest.approx(4 / math.sqrt(5))
    squares = np.linalg.svd(p, compute_uv=False) ** 2
    assert both.b.profile
    assert both.b.profile.stable_rank == pytest.approx(squares.sum() / squares[0])
    assert both.b.profile.ranks == {
        f"{share}": int((np.cumsum(squares) < share * squares.sum()).sum()) + 1 for share in (0.5, 0.9, 0.99)
    }
    v = one["model.layers.0.self_attn.v_proj"]
    everything = math.hypot(np.linalg.norm(p - q), np.linalg.norm(v)) / math.hypot(np.linalg.norm(q), np.linalg.norm(v))
    assert found.difference == pytest.approx(everything, rel=1e-9)
    assert not found.equal
    assert not found.same_structure


def test_one_delta_in_other_factors_and_formats_is_equal(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 2))
    combine([(a, 1.0), (b, 1.0)], output=tmp_path / "cat")
    combine([(a, 1.0), (b, 1.0)], output=tmp_path / "svd", method="svd")
    convert(tmp_path / "svd", "mlx", output=tmp_path / "mlx")
    for other in ("svd", "mlx"):
        found = diff_adapters(tmp_path / "cat", tmp_path / other)
        assert found.equal, found
        assert 0 < (found.difference or 0) < 1e-6
        assert not diff_adapters(tmp_path / "cat", tmp_path / other, tolerance=0.0).equal
    assert diff_adapters(a, a, tolerance=0.0).difference == 0.0


def test_magnitudes_whole_weights_and_kinds_are_told(tmp_path: Path) -> None:
    def made(name: str, magnitude: float, norm: float, dora: bool = True) -> Path:
        tensors = {
            f"{Q}.lora_A.weight": draw(1, 2, 32),
            f"{Q}.lora_B.weight": draw(2, 24, 2),
            "base_model.model.model.norm.weight": np.full(32, norm, np.float32),
        }
        if dora:
            tensors[f"{Q}.lora_magnitude_vector"] = np.full(24, magnitude, np.float32)
        return write_peft(tmp_path / name, tensors, r=2, use_dora=dora, modules_to_save=["norm"])

    base, scaled, plain = made("a", 1, 1), made("b", 1.5, 2), made("c", 1, 1, dora=False)
    notes = {one.name: one.note for one in diff_adapters(base, scaled).modules}
    assert notes["model.layers.0.self_attn.q_proj.weight"] == "magnitudes differ by 0.5"
    assert notes["model.norm.weight"] == "new values differ by 1"
    assert {one.difference for one in diff_adapters(base, scaled).modules} == {None}  # 0 would contradict the notes
    assert diff_adapters(base, scaled).difference is None
    assert diff_adapters(base, made("d", 1, 1)).difference == 0.0
    kinds = {one.name: (one.status, one.note) for one in diff_adapters(base, plain).modules}
    assert kinds["model.norm.weight"] == ("equal", "")
    assert kinds["model.layers.0.self_attn.q_proj.weight"][0] == "different"
    assert "only the base" in kinds["model.layers.0.self_attn.q_proj.weight"][1]


def test_headers_of_adapters_do_not_read_values(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 3))
    found = diff_adapters(a, b, header=True)
    assert found.equal
    assert found.difference is None
    assert not diff_adapters(a, lora(tmp_path / "c", (Q, 5, 4)), header=True).equal


def test_what_waits_for_a_base_is_not_compared_without_one() -> None:
    """Rows of llama.cpp's queries lie in another order: PEFT's and these are equal, and only a base shows it."""
    folder = GOLDEN / "gguf/llama"
    peft, gguf = folder / "lora/peft", folder / "lora/adapter.gguf"
    with pytest.raises(FitError, match="rotary pairs") as caught:
        diff(peft, gguf)
    assert caught.value.hint == "give it with `base=`"
    found = diff(peft, gguf, base=folder / "base")
    assert isinstance(found, AdapterDiff)
    assert found.equal
    assert diff(peft, gguf, header=True).facts["format"] == ("peft", "gguf")  # type: ignore[union-attr]


def test_a_base_of_no_name_is_no_fact_for_people() -> None:
    peft = GOLDEN / "gguf/llama/lora/peft"
    told = run("diff", peft, peft).output
    assert "kind        LORA\nparameters  3072\n" in told
