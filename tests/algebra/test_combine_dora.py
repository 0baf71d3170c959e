# SPDX-License-Identifier: Apache-2.0
"""With the base at hand a DoRA can be scaled, added to others and given a rank: what comes out is the best LoRA for what it does.

Without it a DoRA alone gets a lower rank, and stays one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import combine, convert, merge, resize
from surgery.algebra import proof
from surgery_formats.adapters.format import Format
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, NothingChangedError, ProofError
from surgery_formats.updates import is_directed
from tests.oracles import disk, models, peft_oracle
from tests.support.combinations import best

CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
FULL = models.HIDDEN


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a DoRA and a LoRA."""
    folder = tmp_path_factory.mktemp("dora")
    base = models.build_base("llama", folder / "base")
    peft_oracle.train("llama", base, "LoraConfig", {**CONFIG, "use_dora": True}, folder / "dora", seed=1)
    peft_oracle.train("llama", base, "LoraConfig", CONFIG, folder / "lora", seed=2)
    return base, folder / "dora", folder / "lora"


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge adds, float64."""
    before = disk.read_tensors(base)
    merged = peft_oracle.merge("llama", base, [(adapter, 1.0)]).tensors
    return {n: value.double() - before[n].double() for n, value in merged.items() if "_proj" in n}


def test_a_dora_and_a_lora_add_up_as_peft_merges_each(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, dora, lora = made
    combine([(dora, 0.7), (lora, -0.3)], output=tmp_path / "out", base=base, rank=FULL)
    one, other, got = (deltas(base, path) for path in (dora, lora, tmp_path / "out"))
    for name, value in one.items():
        wanted = 0.7 * value - 0.3 * other[name]
        assert float((got[name] - wanted).norm()) <= 2e-6 * float(wanted.norm()) + 1e-9, name
    assert max(float(value.norm()) for value in got.values()) > 1


def test_a_dora_is_cut_to_the_best_lora_of_a_rank(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, dora, _ = made
    result = resize(dora, output=tmp_path / "out", base=base, rank=4)
    one, got = deltas(base, dora), deltas(base, tmp_path / "out")
    assert {module.rank for module in result.modules} == {4}
    for name, value in one.items():
        left = float((got[name] - value).norm())
        assert left <= 1.0001 * best(value.numpy(), 4) + 2e-6 * float(value.norm()) + 1e-9, name


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_without_the_base_a_dora_of_a_lower_rank_keeps_its_magnitudes(
    made: tuple[Path, Path, Path], to: str, tmp_path: Path
) -> None:
    """The factors are the best of their rank, and PEFT merges what was written as float64 has it."""
    base, dora, _ = made
    result = resize(dora, output=tmp_path / to, rank=2, to=to)
    assert {(module.outcome, module.rank) for module in result.modules} == {("approximated", 2)}
    assert "magnitudes" in " ".join(result.warnings)
    back = tmp_path / to if to == "peft" else convert(tmp_path / to, "peft", output=tmp_path / "back").output
    assert back is not None
    before, after, got = disk.read_tensors(dora), disk.read_tensors(back), deltas(base, back)
    weights = disk.read_tensors(base)
    for name in (key for key in before if key.endswith("lora_magnitude_vector")):
        assert torch.equal(before[name], after[name])
        module = name.removesuffix(".lora_magnitude_vector")
        product = 2.0 * before[f"{module}.lora_B.weight"].double() @ before[f"{module}.lora_A.weight"].double()
        U, S, V = torch.linalg.svd(product)
        weight = weights[f"{module.removeprefix('base_model.model.')}.weight"].double()
        moved = weight + U[:, :2] * S[:2] @ V[:2]
        wanted = before[name].double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
        left = got[f"{module.removeprefix('base_model.model.')}.weight"] - wanted
        assert float(left.norm()) <= 1e-5 * float(wanted.norm()), name


def test_the_proof_sees_magnitudes_of_another_module(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dora, _ = made
    read = proof.read_back

    def exchanged(target: Format, path: Path) -> Adapter:
        adapter = read(target, path)
        first, second = [site for site in adapter.updates if "q_proj" in site.path][:2]
        (one,), (other,) = adapter.updates[first], adapter.updates[second]
        assert is_directed(one)
        assert is_directed(other)
        return replace(adapter, updates={**adapter.updates, first: (one.rebuilt(one.direction, other.magnitude),)})

    monkeypatch.setattr(proof, "read_back", exchanged)
    with pytest.raises(ProofError, match="is not what it was"):
        resize(dora, output=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_dora_whose_rank_is_low_enough_is_taken_over(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, dora, _ = made
    with pytest.raises(NothingChangedError, match="no module has a higher rank"):
        resize(dora, output=tmp_path / "out", rank=3)
    with pytest.raises(FitError, match=r"of which .* times depends on the base"):
        combine([(dora, 0.5)], output=tmp_path / "out", rank=2)


def test_half_a_dora_merges_as_half_of_what_it_does(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, dora, _ = made
    combine([(dora, 0.5)], output=tmp_path / "half", base=base, rank=FULL)
    merge(base, tmp_path / "half", output=tmp_path / "merged")
    before, after = disk.read_tensors(base), disk.read_tensors(tmp_path / "merged")
    for name, value in deltas(base, dora).items():
        torch.testing.assert_close(after[name].double(), before[name].double() + 0.5 * value, atol=2e-6, rtol=0)


def test_without_base_or_rank_it_is_refused_and_the_way_is_named(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, dora, lora = made
    ways: list[tuple[dict[str, Any], str]] = [
        ({}, "give the base (`base=`) and a rank (`rank=`), or merge"),
        ({"base": base}, "give a rank (`rank=`), or merge"),
        ({"rank": 8}, "give the base (`base=`), or merge"),
    ]
    for options, way in ways:
        with pytest.raises(FitError, match=r"depends on the base|rank cannot change") as caught:
            combine([(dora, 0.7), (lora, -0.3)], output=tmp_path / "out", **options)
        assert way in str(caught.value)
