# SPDX-License-Identifier: Apache-2.0
"""A DoRA is extracted where it says more, is what PEFT computes attached and merged, and a LoRA stays where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.extraction.stream.scan_plan import HELD
from surgery_formats.errors import FitError
from tests.oracles import disk, models
from tests.support.extractions import WHOLE, Change, assert_round_trip, everything, low_rank, only, tune
from tests.support.kit import spawn

TABLES = ("embed", "wte", "wpe", "shared", "lm_head", "relative_attention_bias")


def rescaled(rank: int, spread: float = 0.05) -> Change:
    """Rows (of a Conv1D, columns) of another length, and a change of low rank: what a DoRA makes."""

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim < 2 or any(part in name for part in TABLES):
            return value
        flat = value.double().reshape(len(value), -1)
        turned = "c_" in name
        flat = flat.T if turned else flat
        left, right = (torch.randn(size, rank, generator=generator).double() for size in flat.shape)
        low = left @ right.T
        made = flat + 0.1 * low * flat.norm() / low.norm()
        made *= 1 + spread * torch.randn(len(made), 1, generator=generator).double()
        return (made.T if turned else made).reshape(value.shape).to(value.dtype)

    return change


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "vit", "resnet", "bert", "whisper", "llama_tied", "opt"])
def test_at_full_rank_a_dora_of_everything_is_the_fine_tune(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE, kind="dora")
    assert config_of(tmp_path / "out")["use_dora"] is True
    assert {row.form for row in result.rows if row.rank} == {"DoRA"}
    assert result.residual < 1e-5
    assert_round_trip(arch, base, tuned, tmp_path / "out", 5e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2_bare", "vit"])
def test_auto_finds_a_dora_and_recovers_it_exactly(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rescaled(3))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=3)
    assert result.kind is not None
    assert result.kind.kind == "dora"
    assert result.kind.dora < 1e-3 < 0.1 < result.kind.equal <= result.kind.lora
    assert max(row.residual for row in result.rows) < 1e-3
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["kind"]["chosen"] == "dora"
    assert manifest["kind"]["lora"] > 0.1 > manifest["kind"]["dora"]
    assert_round_trip(arch, base, tuned, tmp_path / "out", 1e-3)
    plain = surgery.extract_lora(base, tuned, output=tmp_path / "plain", rank=3, kind="lora")
    assert plain.residual > 100 * result.residual
    assert plain.kind is not None
    assert plain.residual == pytest.approx(result.kind.lora, rel=0.01)


def test_auto_keeps_a_lora_where_the_change_is_dense_or_low_rank(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    for name, change in (("dense", everything), ("low", low_rank(3))):
        tuned = tune(base, tmp_path / name, change)
        result = surgery.extract_lora(base, tuned, output=tmp_path / f"{name}-out", rank=3)
        assert result.kind is not None
        assert result.kind.kind == "lora"
        assert config_of(tmp_path / f"{name}-out")["use_dora"] is False
        assert not [key for key in load_file(tmp_path / f"{name}-out" / "adapter_model.safetensors") if "magn" in key]


def test_a_dense_change_costs_no_second_factorisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    monkeypatch.setattr("surgery.extraction.choose_kind.alternate", None)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=3)
    assert result.kind is not None
    assert result.kind.rows < 0.03
    with pytest.raises(TypeError):
        surgery.extract_lora(base, tuned, output=tmp_path / "dora", rank=3, kind="dora")


def test_every_number_of_a_dora_is_counted(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, kind="dora", dtype="bf16")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert result.parameters == sum(value.numel() for value in stored.values())
    assert sum(row.nbytes for row in result.rows) == sum(value.nbytes for value in stored.values())
    assert {value.dtype for name, value in stored.items() if "magnitude" in name} == {torch.float32}
    assert {value.dtype for name, value in stored.items() if "lora_A" in name} == {torch.bfloat16}


def test_what_was_read_back_is_what_a_merge_makes(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, kind="dora")
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    before, wanted, got = (disk.read_tensors(folder) for folder in (base, tuned, tmp_path / "merged"))
    for row in result.rows:
        error = (wanted[row.name].double() - got[row.name].double()).norm()
        change = (wanted[row.name].double() - before[row.name].double()).norm()
        assert row.residual == pytest.approx(float(error / change), abs=2e-5)


def test_a_budget_pays_for_the_magnitudes(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rescaled(3))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=surgery.Rank.budget("6000"))
    assert result.kind is not None
    assert result.kind.kind == "dora"
    assert 3000 < result.parameters <= 6000
    least = str(surgery.extract_lora(base, tuned, output=tmp_path / "one", rank=1, kind="lora").parameters)
    with pytest.raises(FitError, match="budget"):
        surgery.extract_lora(base, tuned, output=tmp_path / "no", rank=surgery.Rank.budget(least), kind="dora")
    small = surgery.extract_lora(base, tuned, output=tmp_path / "small", rank=surgery.Rank.budget(least))
    assert small.kind is not None
    assert small.kind.kind == "lora"
    assert small.parameters <= int(least)


@pytest.mark.parametrize("options", [{"rslora": True, "alpha": 7.0}, {"alpha": 5.0}], ids=str)
def test_alpha_never_changes_a_dora(options: dict[str, object], tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE, kind="dora", **options)  # type: ignore[arg-type]
    assert_round_trip("llama", base, tuned, tmp_path / "out", 5e-6)


def test_where_no_dora_can_be_made(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    norms = tune(base, tmp_path / "norms", only("norm"))
    with pytest.raises(FitError, match="no linear layer"):
        surgery.extract_lora(base, norms, output=tmp_path / "out", kind="dora")
    mixtral = models.build_base("mixtral", tmp_path / "mixtral")
    experts = tune(mixtral, tmp_path / "experts", rescaled(3))
    with pytest.raises(FitError, match="experts"):
        surgery.extract_lora(mixtral, experts, output=tmp_path / "out", kind="dora")
    assert not (tmp_path / "out").exists()
    result = surgery.extract_lora(mixtral, experts, output=tmp_path / "out", rank=3)
    assert result.kind is not None
    assert "experts" in result.kind.why


def test_a_zero_row_keeps_the_model_a_lora(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")

    def zeroed(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if "up_proj" in name:
            value = value.clone()
            value[3] = 0
        return value

    hollow = tune(base, tmp_path / "hollow", zeroed)
    tuned = tune(base, tmp_path / "tuned", lambda n, v, g: zeroed(n, rescaled(3)(n, v, g), g))
    with pytest.raises(FitError, match="zero") as caught:
        surgery.extract_lora(hollow, tuned, output=tmp_path / "out", rank=3, kind="dora")
    assert "up_proj" in str(caught.value.tensor)
    result = surgery.extract_lora(hollow, tuned, output=tmp_path / "out", rank=3)
    assert result.kind is not None
    assert result.kind.kind == "lora"


def test_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rescaled(3))
    for workers in (1, 3):
        surgery.extract_lora(base, tuned, output=tmp_path / f"out{workers}", rank=3, workers=workers)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()


def test_a_large_matrix_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rescaled(3))
    held = surgery.extract_lora(base, tuned, output=tmp_path / "held", rank=3)
    monkeypatch.setitem(HELD, "cpu", 0)
    monkeypatch.setattr("surgery.extraction.choose_kind._held", None)
    streamed = surgery.extract_lora(base, tuned, output=tmp_path / "streamed", rank=3)
    assert held.kind is not None
    assert streamed.kind is not None
    assert streamed.kind.dora == pytest.approx(held.kind.dora, abs=1e-5)


def test_survival_of_a_dora_is_the_one_a_merge_measures(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = tune(base, tmp_path / "tuned", only("proj", rescaled(2, 0.01)))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=2, kind="dora")
    measured = surgery.merge(base, tmp_path / "out", output=tmp_path / "merged").ledger
    assert result.survival == pytest.approx(measured.survival, abs=0.01)


def test_other_formats_hold_it_too(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only("proj", rescaled(3)))
    surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=3, to="mlx")
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    wanted = disk.read_tensors(tuned)
    for name, value in disk.read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(value, wanted[name], atol=2e-4, rtol=0)


def test_the_command_suggests_dora_and_refuses_it_where_nothing_fits(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", rescaled(3))
    done = spawn("extract-lora", base, tuned, "-o", tmp_path / "out", "--rank", "3")
    assert "DoRA: a DoRA leaves 0.0" in done.stdout
    assert "a LoRA of as many numbers at least" in done.stdout
    assert spawn("extract-lora", base, tuned, "-o", tmp_path / "no", "--kind", "loha").returncode == 2
    norms = tune(base, tmp_path / "norms", only("norm"))
    assert spawn("extract-lora", base, norms, "-o", tmp_path / "no", "--kind", "dora").returncode == 4
    assert not (tmp_path / "no").exists()
