# SPDX-License-Identifier: Apache-2.0
"""An extracted adapter makes TUNED of BASE: attached in PEFT, merged by PEFT, merged here; and every tensor is accounted for."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.extraction.proof import agrees
from surgery.extraction.ranks import parse_budget
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError, ProofError
from tests.kit import ROOT, spawn
from tests.oracles import disk, models

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]
WHOLE = 64  # no matrix of the tiny models has more directions


def everything(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As after a full fine-tune: no tensor keeps its values."""
    if not value.is_floating_point():
        return value + 3 if name.endswith("num_batches_tracked") else value
    moved = (value.float() + 0.03 * torch.randn(value.shape, generator=generator)).to(value.dtype)
    return moved.abs() if name.endswith("running_var") else moved


def low_rank(rank: int) -> Change:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim != 2:
            return value
        left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in value.shape)
        return (value.double() + 0.05 * left @ right.T).to(value.dtype)

    return change


def only(part: str, change: Change = everything) -> Change:
    return lambda name, value, generator: change(name, value, generator) if part in name else value


def tune(base: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(5)
    tensors = {name: change(name, value, generator) for name, value in sorted(disk.read_tensors(base).items())}
    disk.write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    base = models.build_base("llama", tmp_path / "base")
    return base, tune(base, tmp_path / "tuned", everything)


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def assert_round_trip(arch: str, base: Path, tuned: Path, out: Path, tolerance: float = 2e-6) -> None:
    """Attached = merged by PEFT = merged here = TUNED, and TUNED is not BASE."""
    surgery.merge(base, out, output=out.with_name("merged"))
    wanted = models.run(arch, models.load(arch, tuned))
    assert largest(models.run(arch, models.load(arch, base)) - wanted) > 1e-2
    assert largest(models.run(arch, models.load(arch, out.with_name("merged"))) - wanted) < tolerance
    attached = PeftModel.from_pretrained(models.load(arch, base), str(out)).double().eval()
    assert largest(models.run(arch, attached) - wanted) < tolerance
    assert largest(models.run(arch, attached.merge_and_unload()) - wanted) < tolerance


ARCHS = (
    "llama", "llama_tied", "llama_cls", "qwen2", "gpt2", "gpt2_bare", "opt", "t5", "gpt_neox", "phi3", "mixtral", "mixtral_square",
    "qwen2_moe", "vit", "resnet", "whisper", "bert", "torch_module",
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
def test_at_full_rank_peft_computes_what_the_fine_tune_does(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE)
    assert "dropped" not in result.classes
    assert {row.name for row in result.rows if row.kind != "alias"} >= {
        name
        for name, value in disk.read_tensors(tuned).items()
        if not torch.equal(value, disk.read_tensors(base)[name])
    }
    assert result.residual < 1e-6
    assert_round_trip(arch, base, tuned, tmp_path / "out")


@pytest.mark.parametrize("arch", ["llama", "gpt2_bare", "mixtral"])
def test_a_low_rank_change_is_recovered_exactly(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(3))
    # an expert's gate and up are one matrix in the tree, whose rank is at most the sum of theirs
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=6 if arch == "mixtral" else 3)
    assert max(row.residual for row in result.rows) <= 1e-5
    assert_round_trip(arch, base, tuned, tmp_path / "out", 1e-4)


def test_the_reported_residual_is_the_least_possible(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = llama
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, embeddings="full")
    before, after = disk.read_tensors(base), disk.read_tensors(tuned)
    seen = 0
    for row in result.rows:
        if row.kind == "low-rank":
            values = torch.linalg.svdvals(after[row.name].double() - before[row.name].double())
            best = float((values[4:].square().sum() / values.square().sum()).sqrt())
            assert row.residual == pytest.approx(best, rel=1e-3)
            seen += 1
        else:
            assert row.residual == 0
    assert seen == 14
    merged = surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    assert merged.output is not None
    got = disk.read_tensors(tmp_path / "merged")
    energy = sum(float((after[name].double() - before[name].double()).square().sum()) for name in after)
    left = sum(float((after[name].double() - got[name].double()).square().sum()) for name in after)
    assert result.residual == pytest.approx((left / energy) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("options", [{"alpha": 5.0}, {"rslora": True}, {"rslora": True, "alpha": 7.0}, {}], ids=str)
def test_alpha_never_changes_the_delta(options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = llama
    surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE, **options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] == options.get("rslora", False)
    if "alpha" in options:
        assert config["lora_alpha"] == options["alpha"]
        assert not config["alpha_pattern"]
    assert_round_trip("llama", base, tuned, tmp_path / "out")


def test_sigma_is_shared_evenly(llama: tuple[Path, Path], tmp_path: Path) -> None:
    surgery.extract_lora(*llama, output=tmp_path / "out", rank=4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    rows, cols = tensors[f"{key}A.weight"].norm(dim=1), tensors[f"{key}B.weight"].norm(dim=0)
    torch.testing.assert_close(rows, cols)


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ("q_proj.bias", "bias"),
        ("layers.1.self_attn.v_proj", "bias LoRA"),
        ("input_layernorm", "modules_to_save"),
        ("norm.weight", "modules_to_save"),
    ],
)
def test_a_selective_fine_tune_is_stored_as_what_it_is(part: str, form: str, tmp_path: Path) -> None:
    base = models.build_base("qwen2", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only(part))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE)
    assert {row.form for row in result.rows if row.kind != "unchanged"} == set(form.split())
    touched = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(touched) <= 6, "nothing that did not change is stored"
    assert_round_trip("qwen2", base, tuned, tmp_path / "out")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_few_rows_of_an_embedding_are_stored_as_rows(arch: str, tmp_path: Path) -> None:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if "embed_tokens" in name:
            value = value.clone()
            value[[3, 7]] += 0.5 * torch.randn(2, value.shape[1], generator=generator)
        return value

    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", change)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out")
    assert [(row.kind, row.parameters) for row in result.rows if row.form] == [("rows", 2 * models.HIDDEN)]
    assert_round_trip(arch, base, tuned, tmp_path / "out")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_new_rows_of_a_vocabulary_are_kept(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only("proj"))
    tensors = disk.read_tensors(tuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], 0.1 * torch.ones(3, models.HIDDEN)])
    disk.write_safetensors(tuned / "model.safetensors", tensors)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "vocab_size": models.VOCAB + 3}))

    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE)
    assert result.classes["new rows"] == (1 if arch == "qwen2" else 2)
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    wanted = models.run(arch, models.load(arch, tuned))
    assert largest(models.run(arch, models.load(arch, tmp_path / "merged")) - wanted) < 2e-6
    model = models.load(arch, base)
    model.resize_token_embeddings(models.VOCAB + 3)
    attached = PeftModel.from_pretrained(model, str(tmp_path / "out")).double().eval()
    assert largest(models.run(arch, attached) - wanted) < 2e-6
    assert largest(models.run(arch, attached.merge_and_unload()) - wanted) < 2e-6


def test_a_tie_that_tuning_cut(tmp_path: Path) -> None:
    base = models.build_base("qwen2", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    tensors = disk.read_tensors(tuned)
    disk.write_safetensors(
        tuned / "model.safetensors", {**tensors, "lm_head.weight": 0.9 * tensors["model.embed_tokens.weight"]}
    )
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE)
    assert_round_trip("qwen2", base, tuned, tmp_path / "out")


def test_bf16_pairs(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = tune(base, tmp_path / "tuned", everything)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=WHOLE)
    assert result.dtype == "BF16"
    assert 1e-4 < result.residual < 4e-3, "what rounding the factors costs, and no more"
    assert 0 < result.noise < 1
    row = next(row for row in result.rows if row.name.endswith("0.mlp.up_proj.weight"))
    change = disk.read_tensors(tuned)[row.name].double() - disk.read_tensors(base)[row.name].double()
    assert row.moved == pytest.approx(float((change != 0).double().mean()))
    assert row.energy == pytest.approx(float(change.square().sum()), rel=1e-5)
    spacing = torch.exp2((torch.frexp(disk.read_tensors(tuned)[row.name].double()).exponent - 8).double())
    assert row.rms_ulp == pytest.approx(float(change.square().mean().sqrt() / spacing.median()), rel=1e-5)
    exact = surgery.extract_lora(base, tuned, output=tmp_path / "fp32", rank=WHOLE, dtype="fp32")
    assert exact.residual < 1e-6


def test_the_merge_knows_the_base(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = llama
    surgery.extract_lora(base, tuned, output=tmp_path / "out")
    with pytest.raises(FitError, match="content id"):
        surgery.merge(tuned, tmp_path / "out", output=tmp_path / "merged")


def test_every_tensor_is_in_one_class_and_the_totals_add_up(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = llama
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4)
    assert [row.name for row in result.rows] == list(disk.read_tensors(tuned))
    assert sum(row.share for row in result.rows) == pytest.approx(1)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert result.parameters == sum(value.numel() for value in stored.values())
    assert sum(row.nbytes for row in result.rows) == sum(value.nbytes for value in stored.values())
    assert result.adapter_nbytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["tensors"].keys() == {row.name for row in result.rows}


def test_a_large_matrix_is_read_in_blocks(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = surgery.extract_lora(*llama, output=tmp_path / "held", rank=4)
    monkeypatch.setattr("surgery.extraction.scan.HELD", {"cpu": 0})
    streamed = surgery.extract_lora(*llama, output=tmp_path / "streamed", rank=4)
    for one, other in zip(held.rows, streamed.rows, strict=True):
        assert one.residual == pytest.approx(other.residual, rel=1e-5)


def test_the_same_bytes_whatever_the_workers(llama: tuple[Path, Path], tmp_path: Path) -> None:
    for workers in (1, 3):
        surgery.extract_lora(*llama, output=tmp_path / f"out{workers}", workers=workers)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()


def test_a_dry_run_writes_nothing_and_knows_the_same(llama: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan = surgery.extract_lora(*llama, output=tmp_path / "out", rank=4, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    real = surgery.extract_lora(*llama, output=tmp_path / "out", rank=4)
    assert plan.residual == pytest.approx(real.residual, rel=1e-4)
    assert (plan.adapter_nbytes, plan.classes) == (real.adapter_nbytes, real.classes)


def test_other_formats_through_the_converter(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only("proj", low_rank(2)))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=2, to="mlx")
    assert result.format == "mlx"
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    wanted = disk.read_tensors(tuned)
    for name, value in disk.read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(value, wanted[name], atol=2e-6, rtol=0)
    with pytest.raises(FitError, match="cannot hold"):
        surgery.extract_lora(
            base, tune(base, tmp_path / "all", everything), output=tmp_path / "no.safetensors", to="kohya"
        )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "no"))]


def test_energy_and_error_are_met(llama: tuple[Path, Path], tmp_path: Path) -> None:
    held = surgery.extract_lora(*llama, output=tmp_path / "energy", energy=0.7)
    missing = surgery.extract_lora(*llama, output=tmp_path / "error", max_error=0.6)
    ranks = set()
    for row in held.rows:
        assert row.residual**2 <= 0.3 + 1e-6
    for row in missing.rows:
        assert row.residual <= 0.6 + 1e-6
        ranks.add(row.rank)
    assert len(ranks - {0}) > 1, "ranks differ by matrix"
    assert min(row.residual for row in missing.rows if row.rank) > 0.4, "and no more than needed"


@pytest.mark.parametrize("budget", ["10000", "60kB"])
def test_a_budget_is_kept_and_shared_out(budget: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (
            everything(name, value, generator)
            if "norm" in name
            else low_rank(12 if "layers.0.mlp.up" in name else 2)(name, value, generator)
        )

    tuned = tune(llama[0], tmp_path / "mixed", change)
    result = surgery.extract_lora(llama[0], tuned, output=tmp_path / "out", budget=budget)
    limit = parse_budget(budget)
    spent = result.parameters if limit.unit == "parameters" else result.adapter_nbytes
    assert 0.6 * limit.limit < spent <= limit.limit
    ranks = {row.name: row.rank for row in result.rows if row.rank}
    assert max(ranks, key=lambda name: ranks[name]) == "model.layers.0.mlp.up_proj.weight"
    flat = surgery.extract_lora(llama[0], tuned, output=tmp_path / "flat", rank=3)
    assert flat.parameters <= result.parameters * 1.2
    assert result.residual < flat.residual
    with pytest.raises(FitError, match="budget"):
        surgery.extract_lora(llama[0], tuned, output=tmp_path / "none", budget="100")


def test_auto_takes_what_stands_out_of_rounding(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = tune(base, tmp_path / "tuned", only("mlp", low_rank(5)))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank="auto")
    assert {row.rank for row in result.rows if row.rank} <= {4, 5}
    few = surgery.extract_lora(base, tuned, output=tmp_path / "few", rank="auto", budget="1500")
    assert few.parameters <= 1500
    assert max(row.rank for row in few.rows) <= 5


def merged_lora(base: Path, folder: Path, rank: int, size: float) -> Path:
    """As `surgery merge` leaves it: `size` times the spacing of the stored values, rounded once."""

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if "proj" not in name:
            return value
        unit = torch.exp2((torch.frexp(value.double()).exponent - 8).double()).median()
        left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator).double())[0] for n in value.shape)
        delta = left @ right.T
        return (value.double() + delta * size * unit / delta.square().mean().sqrt()).to(value.dtype)

    return tune(base, folder, change)


def test_a_merged_lora_is_recognised_and_ranks_beyond_it_are_called_noise(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype="bfloat16")
    tuned = merged_lora(base, tmp_path / "tuned", 2, 4.0)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=6)
    assert result.merged is not None
    assert (result.merged.rank, result.merged.layers, result.merged.of) == (2, 14, 14)
    rows = [row for row in result.rows if row.kind == "low-rank"]
    assert len(rows) == 14
    for row in rows:
        assert row.signal is not None
        assert (row.signal.count, row.signal.complete) == (2, True)
        assert "rank 6 asked: 4 directions are rounding noise; suggest <= 2" in row.why
        assert row.signal.survival == pytest.approx(1, abs=0.05)
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["looks_like"] == {"kind": "merged LoRA", "rank": 2, "layers": 14, "of": 14}
    assert manifest["tensors"][rows[0].name]["signal"] == 2
    done = spawn("extract-lora", base, tuned, "-o", tmp_path / "told", "--rank", "6")
    assert "looks like a merged rank-2 LoRA: 2 values above the edge in 14/14 layers" in done.stdout
    assert "model.layers.*.mlp.up_proj" in done.stdout
    assert "layers.1.mlp.up_proj" not in done.stdout
    assert "layers.1.mlp.up_proj" in spawn("-v", "extract-lora", base, tuned, "-o", tmp_path / "all").stdout


@pytest.mark.parametrize("arch", ["llama", "gpt2_bare", "mixtral"])
def test_the_predicted_survival_is_the_one_a_merge_measures(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base", dtype="bfloat16")

    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim < 2 or "wte" in name or "embed" in name or "wpe" in name:
            return value
        unit = torch.exp2((torch.frexp(value.float()).exponent - 8).float()).median()
        return (value.float() + unit * torch.randn(value.shape, generator=generator)).to(value.dtype)

    tuned = tune(base, tmp_path / "tuned", change)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=3)
    assert result.merged is None
    measured = surgery.merge(base, tmp_path / "out", output=tmp_path / "merged").ledger
    assert 0.1 < measured.survival < 0.95
    assert result.survival == pytest.approx(measured.survival, abs=0.02)


def test_the_table_says_what_other_choices_would_have_been(llama: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.extract_lora(*llama, output=tmp_path / "out", rank=4, table=True)
    plain = surgery.extract_lora(*llama, output=tmp_path / "plain", rank=4)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        tmp_path / "plain" / "adapter_config.json"
    ).read_bytes()
    assert [(c.rank, c.layers) for c in result.table][:4] == [
        (4, "attention"),
        (4, "mlp"),
        (4, "all"),
        (8, "attention"),
    ]
    by_choice = {(c.rank, c.layers): c for c in result.table}
    assert by_choice[4, "all"].residual == pytest.approx(plain.residual, rel=1e-4)
    assert by_choice[4, "all"].parameters == plain.parameters
    eight = surgery.extract_lora(*llama, output=tmp_path / "eight", rank=8)
    assert by_choice[8, "all"].residual == pytest.approx(eight.residual, rel=1e-4)
    assert by_choice[8, "all"].parameters == eight.parameters
    assert by_choice[64, "all"].residual < 1e-6
    missing = 1 - sum(row.share for row in result.rows if "self_attn" in row.name or row.kind == "dense")
    assert by_choice[64, "attention"].residual == pytest.approx(missing**0.5, rel=1e-4)


def test_a_rank_above_a_matrix_is_cut_and_said(llama: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.extract_lora(*llama, output=tmp_path / "out", rank=1000)
    row = next(row for row in result.rows if row.name.endswith("0.self_attn.k_proj.weight"))
    assert row.rank == 16
    assert "cut from 1000 to 16" in row.why


def test_nothing_changed(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    with pytest.raises(NothingChangedError):
        surgery.extract_lora(base, tune(base, tmp_path / "tuned", lambda n, v, g: v), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_is_refused_by_name(side: str, value: float, part: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder = dict(zip(("base", "tuned"), llama, strict=True))[side]
    tensors = disk.read_tensors(folder)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name].view(-1)[-1] = value
    disk.write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(FitError, match=r"NaN") as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out")
    assert caught.value.tensor == name
    assert list(tmp_path.iterdir()) == [*llama] or not (tmp_path / "out").exists()


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = disk.read_tensors(folder)
    edit(tensors)
    disk.write_safetensors(folder / "model.safetensors", tensors)


FIT = {
    "a layer more": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(56, 32)}),
        "model.layers.2.mlp.up_proj.weight",
    ),
    "a layer less": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "a wider layer": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(60, 32)}),
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a smaller vocabulary": (lambda t: t.update({"lm_head.weight": torch.ones(90, 32)}), "lm_head.weight"),
}


@pytest.mark.parametrize("fault", FIT)
def test_what_does_not_fit_is_refused_by_name(fault: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    edit, name = FIT[fault]
    edited(llama[1], edit)
    with pytest.raises(FitError) as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out")
    assert caught.value.tensor == name


def test_another_architecture_with_equal_shapes_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((llama[0] / "config.json").read_text())
    (llama[0] / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(FitError, match="mistral"):
        surgery.extract_lora(*llama, output=tmp_path / "out")


def test_a_loss_is_an_error_unless_it_is_allowed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FitError, match="would be lost") as caught:
        surgery.extract_lora(*llama, output=tmp_path / "out", dense=())
    assert "norm" in str(caught.value.tensor)
    result = surgery.extract_lora(*llama, output=tmp_path / "out", dense=(), rank=WHOLE, allow_loss=True)
    assert result.classes["dropped"] == 5
    dropped = [row for row in result.rows if row.kind == "dropped"]
    assert all("norm" in row.name and row.residual == 1 for row in dropped)
    assert result.lost == pytest.approx(sum(row.share for row in dropped))
    assert result.residual == pytest.approx(result.lost**0.5, rel=1e-3)


def test_a_wrong_factor_is_caught(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.extraction.factor import Factored

    right = Factored.factors

    def wrong(self: Factored, index: int, rank: int, fold: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        left, other = right(self, index, rank, fold)
        return (left * 1.02 if "layers.1.mlp.down_proj" in self.unit.path else left), other

    monkeypatch.setattr(Factored, "factors", wrong)
    with pytest.raises(ProofError, match="read back"):
        surgery.extract_lora(*llama, output=tmp_path / "out", rank=WHOLE)
    assert not (tmp_path / "out").exists()


def test_agreement_is_neither_blind_nor_nervous() -> None:
    assert agrees(0.5, 0.5, DType.F32)
    assert agrees(0.0023, 0.0, DType.BF16)
    assert not agrees(0.02, 0.0, DType.F32)
    assert not agrees(0.55, 0.5, DType.BF16)
    assert not agrees(0.4, 0.5, DType.BF16)


def test_an_output_that_exists_is_kept(llama: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputExistsError):
        surgery.extract_lora(*llama, output=tmp_path / "out")
    (tmp_path / "out" / "surgery_manifest.json").write_text("{}")  # an earlier output of this tool
    surgery.extract_lora(*llama, output=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 4, "energy": 0.5},
        {"energy": 0.0},
        {"max_error": 1.5},
        {"budget": "much"},
        {"alpha": 0.0},
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FitError):
        surgery.extract_lora(*llama, output=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("text", "limit", "unit"),
    [
        ("20MB", 20_000_000, "bytes"),
        ("1KiB", 1024, "bytes"),
        ("2M", 2_000_000, "parameters"),
        ("300", 300, "parameters"),
    ],
)
def test_budgets(text: str, limit: int, unit: str) -> None:
    found = parse_budget(text)
    assert (found.limit, found.unit) == (limit, unit)


@pytest.mark.parametrize(
    "words",
    [
        ("--rank", "0"),
        ("--rank", "-3"),
        ("--rank", "4", "--energy", ".5"),
        ("--budget", "x"),
        ("--dense", "all"),
        ("--alpha", "nan"),
    ],
    ids=str,
)
def test_the_command_refuses_what_means_nothing(
    words: tuple[str, ...], llama: tuple[Path, Path], tmp_path: Path
) -> None:
    done = spawn("extract-lora", *llama, "-o", tmp_path / "out", *words)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_tells_and_counts(llama: tuple[Path, Path], tmp_path: Path) -> None:
    done = spawn("extract-lora", *llama, "-o", tmp_path / "out", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "5 dense, 16 low-rank" in done.stdout
    again = spawn("extract-lora", *llama, "-o", tmp_path / "json", "--rank", "4", "--json")
    document = json.loads(again.stdout)
    assert document["command"] == "extract-lora"
    assert document["result"]["classes"] == {"dense": 5, "low-rank": 16}
    same = spawn("extract-lora", llama[0], llama[0], "-o", tmp_path / "none")
    assert same.returncode == 4


def _evaluate() -> Any:
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "examples" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_shipped_example_keeps_its_gain(tmp_path: Path) -> None:
    root = ROOT / "examples"
    folders = [root / "base", root / "tuned"]
    for rank in (4, 16):
        surgery.extract_lora(root / "base", root / "tuned", output=tmp_path / f"rank{rank}", rank=rank)
        folders.append(tmp_path / f"rank{rank}")
    evaluate = _evaluate()
    scores = {
        score.model: score for score in evaluate.evaluate(folders, root, evaluate.CONTEXT, evaluate.STRIDE, "cpu")
    }
    assert scores["base"].target > scores["rank4"].target > scores["rank16"].target > scores["tuned"].target
    assert scores["rank4"].recovered > 0.25
    assert scores["rank16"].recovered > 0.6
