# SPDX-License-Identifier: Apache-2.0
"""An extracted adapter makes TUNED of BASE: attached in PEFT, merged by PEFT, merged here; and every tensor is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery_formats.errors import FitError
from tests.oracles import disk, models
from tests.support.extractions import ARCHS, WHOLE, assert_round_trip, everything, largest, low_rank, only, tune


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


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_an_alpha_that_no_factor_can_make_up_for_is_refused(
    alpha: float, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(FitError, match=r"alpha is 1e[-+]300; it lies between 1e-12 and 1e\+12"):
        surgery.extract_lora(*llama, rank=2, alpha=alpha, output=tmp_path / "out")


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


def test_a_bf16_pair_loses_only_the_rounding_of_the_factors(tmp_path: Path) -> None:
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
    monkeypatch.setattr("surgery.extraction.stream.scan.HELD", {"cpu": 0})
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
