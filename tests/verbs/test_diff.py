# SPDX-License-Identifier: Apache-2.0
"""What differs between two checkpoints, against dense float64 arithmetic, and on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery import diff
from surgery_formats.errors import FitError, NotFoundError
from tests.support.differences import Q, changed, diff_models, lora, run
from tests.support.kit import make_base, make_lora


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def test_a_copy_is_equal(base: Path, tmp_path: Path) -> None:
    found = diff_models(base, changed(base, tmp_path / "b"))
    assert found.equal
    assert (found.difference, found.moved) == (0.0, 0.0)


def test_values_are_measured_in_float64(base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    old = load_file(base / "model.safetensors")[name]
    new = old.clone()
    new[3, :7] += 0.5
    found = diff_models(base, changed(base, tmp_path / "b", **{name.replace(".", "__"): new}))
    different = [one for one in found.tensors if one.status != "equal"]
    assert [(one.name, one.status) for one in different] == [(name, "values")]
    values = different[0].values
    assert values
    apart = new.double() - old.double()
    assert values.max_abs == float(apart.abs().max())
    assert values.relative == pytest.approx(float(apart.norm() / old.double().norm()), rel=1e-6)
    assert values.moved == int((apart != 0).sum()) / old.numel()
    assert found.difference == values.relative
    assert diff_models(base, tmp_path / "b", tolerance=values.relative * 1.01).equal
    assert not diff_models(base, tmp_path / "b", tolerance=values.relative * 0.99).equal


def test_types_shapes_and_missing_tensors(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    other = changed(
        base,
        tmp_path / "b",
        model__norm__weight=tensors["model.norm.weight"].float(),
        lm_head__weight=torch.zeros(65, 32, dtype=torch.bfloat16),
        model__layers__0__self_attn__q_proj__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.zeros(32),
    )
    found = diff_models(base, other)
    statuses = {one.name: one.status for one in found.tensors if one.status != "equal"}
    assert statuses == {
        "lm_head.weight": "shape",
        "model.layers.0.self_attn.q_proj.bias": "only in B",
        "model.layers.0.self_attn.q_proj.weight": "only in A",
        "model.norm.weight": "dtype",
    }
    norm = next(one for one in found.tensors if one.name == "model.norm.weight")
    assert norm.values
    assert norm.values.moved == 0.0
    assert {
        one.name: one.status for one in diff_models(base, other, header=True).tensors if one.status != "equal"
    } == statuses
    assert not found.same_structure


def test_values_that_are_no_numbers(base: Path, tmp_path: Path) -> None:
    nan = load_file(base / "model.safetensors")["model.norm.weight"]
    nan[0], nan[1] = math.nan, math.inf
    one = changed(base, tmp_path / "a", model__norm__weight=nan)
    values = next(t for t in diff_models(base, one).tensors if t.status != "equal").values
    assert values
    assert (values.not_finite, values.difference, values.moved) == (2, 0.0, 2 / 32)
    other = nan.clone()
    other[2] = 5.0
    values = next(
        t for t in diff_models(one, changed(base, tmp_path / "b", model__norm__weight=other)).tensors if t.values
    ).values
    assert values
    assert values.moved == 1 / 32  # a NaN is where a NaN was
    assert not diff_models(base, one, tolerance=1.0).equal


def test_signs_of_zero_are_one_value_and_integers_compare(base: Path, tmp_path: Path) -> None:
    one = changed(base, tmp_path / "a", extra=torch.tensor([0.0, 1.0]), ids=torch.tensor([1, 2, 3]))
    other = changed(base, tmp_path / "b", extra=torch.tensor([-0.0, 1.0]), ids=torch.tensor([1, 2, 4]))
    found = {t.name: t for t in diff_models(one, other).tensors}
    assert found["extra"].status == "equal"
    assert found["ids"].status == "values"
    assert found["ids"].values
    assert found["ids"].values.max_abs == 1.0


def test_a_tied_head_that_one_of_them_stores(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    stored = changed(base, tmp_path / "stored", lm_head__weight=tensors["model.embed_tokens.weight"])
    tied = changed(base, tmp_path / "tied", lm_head__weight=None)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert diff_models(stored, tied).equal
    assert not diff_models(base, tied).equal


@pytest.mark.parametrize("small", [False, True], ids=["gram", "krylov"])
@pytest.mark.parametrize("shape", [(64, 40), (40, 64), (3000, 20)])
def test_the_spectrum_of_a_difference(
    base: Path, tmp_path: Path, shape: tuple[int, int], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size: by the Gram matrix, in slabs of a wide one, or by block Krylov where that would be too large."""
    monkeypatch.setattr("surgery.comparison.spectrum._SLAB", 500)
    monkeypatch.setattr("surgery.comparison.spectrum._SHORT_SIDE", 8 if small else 8192)
    torch.manual_seed(3)
    old = torch.randn(shape)
    low = torch.randn(shape[0], 3) @ torch.diag(torch.tensor([4.0, 1.0, 0.2])) @ torch.randn(3, shape[1])
    one = changed(base, tmp_path / "a", extra__weight=old)
    other = changed(base, tmp_path / "b", extra__weight=old + low)
    found = next(t for t in diff_models(one, other, spectrum=True).tensors if t.status != "equal").values
    assert found
    assert found.profile
    squares = torch.linalg.svdvals(
        load_file(other / "model.safetensors")["extra.weight"].double() - old.double()
    ).square()
    assert found.profile.stable_rank == pytest.approx(float(squares.sum() / squares[0]), rel=1e-6)
    for share in (0.5, 0.9, 0.99):
        assert found.profile.ranks[f"{share}"] == int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


def test_a_difference_of_many_directions_is_said_to_be_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix too large for its Gram matrix, whose change is noise: its leading directions are found, the rest is counted as many."""
    torch.manual_seed(3)
    old = torch.randn(900, 700)
    spikes = torch.linalg.qr(torch.randn(900, 5)).Q @ torch.linalg.qr(torch.randn(700, 5)).Q.T * 300
    monkeypatch.setattr("surgery.comparison.spectrum._SHORT_SIDE", 100)
    monkeypatch.setattr("surgery.comparison.spectrum.LOOKED_AT", 20)
    one = changed(base, tmp_path / "a", extra__weight=old)
    other = changed(base, tmp_path / "b", extra__weight=old + spikes + 0.2 * torch.randn(900, 700))
    found = next(t for t in diff_models(one, other, spectrum=True).tensors if t.status != "equal").values
    assert found
    assert found.profile
    assert found.profile.ranks == {"0.5": 3, "0.9": 5, "0.99": None}
    assert found.profile.stable_rank == pytest.approx(5, rel=0.1)
    assert json.loads(run("diff", one, other, "--spectrum", "--json").stdout)["result"]["tensors"]


def test_large_tensors_are_read_in_blocks(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the blocks, the figures are the same."""
    import surgery.comparison.checkpoints as room
    import surgery.comparison.spectrum as reading

    torch.manual_seed(1)
    old = torch.randn(333, 7)
    one = changed(base, tmp_path / "a", extra=old)
    other = changed(base, tmp_path / "b", extra=old + 0.1 * torch.randn(333, 7))
    whole = diff_models(one, other)
    monkeypatch.setattr(reading, "_BLOCK", 64)
    monkeypatch.setattr(room, "_BYTES", 100)
    pieces = diff_models(one, other)
    assert pieces.difference == pytest.approx(whole.difference, rel=1e-12)
    assert [one.status for one in pieces.tensors] == [one.status for one in whole.tensors]


def test_inputs_that_cannot_be_compared_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="one is an adapter"):
        diff(base, make_lora(tmp_path / "lora"))
    with pytest.raises(NotFoundError):
        diff(base, tmp_path / "nothing")
    with pytest.raises(FitError, match="tolerance"):
        diff(base, base, tolerance=-1.0)


def test_fail_on_decides_the_exit_code_of_diff(base: Path, tmp_path: Path) -> None:
    same = changed(base, tmp_path / "same")
    values = changed(base, tmp_path / "values", model__norm__weight=torch.zeros(32, dtype=torch.bfloat16))
    shape = changed(base, tmp_path / "shape", model__norm__weight=None)
    assert run("diff", base, same, "--fail-on", "any").exit_code == 0
    assert run("diff", base, values).exit_code == 0
    assert run("diff", base, values, "--fail-on", "structure").exit_code == 0
    assert run("diff", base, values, "--fail-on", "any").exit_code == 6
    assert run("diff", base, shape, "--fail-on", "structure", "--header").exit_code == 6
    assert run("diff", base, values, "--fail-on", "any", "--tolerance", "1").exit_code == 0
    assert run("diff", base, tmp_path / "no").exit_code == 3
    assert run("diff", base, make_lora(tmp_path / "lora")).exit_code == 4
    assert run("diff", base, values, "--tolerance", "-1").exit_code == 2


def test_diff_for_people_and_machines(base: Path, tmp_path: Path) -> None:
    values = changed(base, tmp_path / "values", model__norm__weight=torch.zeros(32, dtype=torch.bfloat16))
    text = run("diff", base, values).stdout
    assert "model.norm.weight" in text
    assert "model.embed_tokens.weight" not in text
    assert "model.embed_tokens.weight" in run("diff", base, values, "-v").stdout
    document = json.loads(run("diff", base, values, "--json").stdout)
    assert document["command"] == "diff"
    assert document["result"]["equal"] is False
    assert document["result"]["difference"] == 1.0
    lora_text = run("diff", lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 2))).stdout
    assert "q_proj" in lora_text
    assert "3 | 2" in lora_text
