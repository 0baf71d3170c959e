# SPDX-License-Identifier: Apache-2.0
"""What differs between two adapters or two checkpoints: against dense float64 arithmetic, and on the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from surgery import combine, convert, diff
from surgery.comparison.checkpoints import CheckpointDiff
from surgery.comparison.results import AdapterDiff
from surgery_cli.group import surgery
from surgery_formats.errors import FitError, NotFoundError
from tests.support.adapter_files import GOLDEN, draw, peft_deltas, write_peft
from tests.support.kit import make_base, make_lora

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = Q.replace("q_proj", "v_proj")


def lora(folder: Path, *seeds: tuple[str, int, int], **config: object) -> Path:
    """``(stem, seed, rank)`` each; weights of 24x32."""
    tensors = {}
    for stem, seed, rank in seeds:
        tensors[f"{stem}.lora_A.weight"] = draw(seed, rank, 32)
        tensors[f"{stem}.lora_B.weight"] = draw(seed + 1, 24, rank)
    ranks = {stem.rpartition(".")[2]: rank for stem, _, rank in seeds}
    return write_peft(folder, tensors, **{"r": seeds[0][2], "lora_alpha": 4, "rank_pattern": ranks, **config})


def adapters(a: Path, b: Path, **options: object) -> AdapterDiff:
    found = diff(a, b, **options)  # type: ignore[arg-type]
    assert isinstance(found, AdapterDiff)
    return found


def models(a: Path, b: Path, **options: object) -> CheckpointDiff:
    found = diff(a, b, **options)  # type: ignore[arg-type]
    assert isinstance(found, CheckpointDiff)
    return found


def run(*words: object) -> Result:
    return CliRunner().invoke(surgery, [str(word) for word in words])


# --- adapters ---------------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", (Q, 1, 3), (V, 3, 2))
    b = lora(tmp_path / "b", (Q, 5, 5), use_rslora=True)
    found = adapters(a, b)
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
        found = adapters(tmp_path / "cat", tmp_path / other)
        assert found.equal, found
        assert 0 < (found.difference or 0) < 1e-6
        assert not adapters(tmp_path / "cat", tmp_path / other, tolerance=0.0).equal
    assert adapters(a, a, tolerance=0.0).difference == 0.0


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
    notes = {one.name: one.note for one in adapters(base, scaled).modules}
    assert notes["model.layers.0.self_attn.q_proj.weight"] == "magnitudes differ by 0.5"
    assert notes["model.norm.weight"] == "new values differ by 1"
    assert {one.difference for one in adapters(base, scaled).modules} == {None}  # 0 would contradict the notes
    assert adapters(base, scaled).difference is None
    assert adapters(base, made("d", 1, 1)).difference == 0.0
    kinds = {one.name: (one.status, one.note) for one in adapters(base, plain).modules}
    assert kinds["model.norm.weight"] == ("equal", "")
    assert kinds["model.layers.0.self_attn.q_proj.weight"][0] == "different"
    assert "only the base" in kinds["model.layers.0.self_attn.q_proj.weight"][1]


def test_headers_of_adapters_do_not_read_values(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 3))
    found = adapters(a, b, header=True)
    assert found.equal
    assert found.difference is None
    assert not adapters(a, lora(tmp_path / "c", (Q, 5, 4)), header=True).equal


# --- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def changed(base: Path, folder: Path, **new: torch.Tensor | None) -> Path:
    """A copy with some tensors replaced (``__`` for dots) or removed."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in new.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_copy_is_equal(base: Path, tmp_path: Path) -> None:
    found = models(base, changed(base, tmp_path / "b"))
    assert found.equal
    assert (found.difference, found.moved) == (0.0, 0.0)


def test_values_are_measured_in_float64(base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    old = load_file(base / "model.safetensors")[name]
    new = old.clone()
    new[3, :7] += 0.5
    found = models(base, changed(base, tmp_path / "b", **{name.replace(".", "__"): new}))
    different = [one for one in found.tensors if one.status != "equal"]
    assert [(one.name, one.status) for one in different] == [(name, "values")]
    values = different[0].values
    assert values
    apart = new.double() - old.double()
    assert values.max_abs == float(apart.abs().max())
    assert values.relative == pytest.approx(float(apart.norm() / old.double().norm()), rel=1e-6)
    assert values.moved == int((apart != 0).sum()) / old.numel()
    assert found.difference == values.relative
    assert models(base, tmp_path / "b", tolerance=values.relative * 1.01).equal
    assert not models(base, tmp_path / "b", tolerance=values.relative * 0.99).equal


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
    found = models(base, other)
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
        one.name: one.status for one in models(base, other, header=True).tensors if one.status != "equal"
    } == statuses
    assert not found.same_structure


def test_values_that_are_no_numbers(base: Path, tmp_path: Path) -> None:
    nan = load_file(base / "model.safetensors")["model.norm.weight"]
    nan[0], nan[1] = math.nan, math.inf
    one = changed(base, tmp_path / "a", model__norm__weight=nan)
    values = next(t for t in models(base, one).tensors if t.status != "equal").values
    assert values
    assert (values.not_finite, values.difference, values.moved) == (2, 0.0, 2 / 32)
    other = nan.clone()
    other[2] = 5.0
    values = next(
        t for t in models(one, changed(base, tmp_path / "b", model__norm__weight=other)).tensors if t.values
    ).values
    assert values
    assert values.moved == 1 / 32  # a NaN is where a NaN was
    assert not models(base, one, tolerance=1.0).equal


def test_signs_of_zero_are_one_value_and_integers_compare(base: Path, tmp_path: Path) -> None:
    one = changed(base, tmp_path / "a", extra=torch.tensor([0.0, 1.0]), ids=torch.tensor([1, 2, 3]))
    other = changed(base, tmp_path / "b", extra=torch.tensor([-0.0, 1.0]), ids=torch.tensor([1, 2, 4]))
    found = {t.name: t for t in models(one, other).tensors}
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
    assert models(stored, tied).equal
    assert not models(base, tied).equal


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
    found = next(t for t in models(one, other, spectrum=True).tensors if t.status != "equal").values
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
    found = next(t for t in models(one, other, spectrum=True).tensors if t.status != "equal").values
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
    whole = models(one, other)
    monkeypatch.setattr(reading, "_BLOCK", 64)
    monkeypatch.setattr(room, "_BYTES", 100)
    pieces = models(one, other)
    assert pieces.difference == pytest.approx(whole.difference, rel=1e-12)
    assert [one.status for one in pieces.tensors] == [one.status for one in whole.tensors]


def test_inputs_that_cannot_be_compared_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="one is an adapter"):
        diff(base, make_lora(tmp_path / "lora"))
    with pytest.raises(NotFoundError):
        diff(base, tmp_path / "nothing")
    with pytest.raises(FitError, match="tolerance"):
        diff(base, base, tolerance=-1.0)


# --- the command ------------------------------------------------------------------------------------------------------------


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


def test_combine_and_resize_on_the_command_line(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", (Q, 1, 3)), lora(tmp_path / "b", (Q, 5, 2))
    done = run("combine", f"{a}=0.7", f"{b}=-0.3", "-o", tmp_path / "ab", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)["result"]
    assert document["modules"][0]["rank"] == 5
    assert document["error"] < 1e-6
    wanted = sum(w * peft_deltas(p)["model.layers.0.self_attn.q_proj"] for p, w in ((a, 0.7), (b, -0.3)))
    got = peft_deltas(tmp_path / "ab")["model.layers.0.self_attn.q_proj"]
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
    shown = run("combine", a, b, "-o", tmp_path / "ties", "--method", "ties", "--density", "20%", "--rank", 4)
    assert shown.exit_code == 0, shown.stderr
    assert "error" in shown.stdout
    dry = run("resize", tmp_path / "ab", "-o", tmp_path / "small", "--rank", 2, "--dry-run")
    assert dry.exit_code == 0
    assert "nothing was written" in dry.stderr
    assert not (tmp_path / "small").exists()
    assert run("resize", tmp_path / "ab", "-o", tmp_path / "small", "--energy", ".9").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("combine", "A", "-o", "X", "--method", "ties"), 2),
        (("combine", "A", "-o", "X", "--method", "ties", "--density", ".2"), 2),
        (("combine", "A", "-o", "X", "--density", ".2"), 2),
        (("combine", "A", "-o", "X", "--rank", "0"), 2),
        (("combine", "A", "-o", "X", "--energy", "2"), 2),
        (("combine", "-o", "X"), 2),
        (("combine", "A=strong", "-o", "X"), 2),
        (("combine", "A", "A", "-o", "A"), 4),
        (("combine", "A", "-o", "X"), 4),
        (("combine", "A=1", "A=-1", "-o", "X"), 4),
        (("combine", "A", "NOWHERE", "-o", "X"), 3),
        (("resize", "A", "-o", "X"), 2),
        (("resize", "A", "-o", "X", "--rank", "8"), 4),
        (("resize", "NOWHERE", "-o", "X", "--rank", "8"), 3),
    ],
)
def test_exit_codes_of_combine_and_resize(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    lora(tmp_path / "A", (Q, 1, 3))
    places = {"A": tmp_path / "A", "X": tmp_path / "x", "NOWHERE": tmp_path / "nowhere"}
    found = []
    for word in words:
        name, equals, weight = word.partition("=")
        found.append(f"{places.get(name, name)}{equals}{weight}")
    result = run(*found)
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith(("error:", "Usage"))
    assert not (tmp_path / "x").exists()


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
