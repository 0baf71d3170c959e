# SPDX-License-Identifier: Apache-2.0
"""Factors weighted by the inputs a model gets lose less on them, are compared with plain ones, and hostile calibrations are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.tensors.tensor import StoredTensor
from tests.oracles import disk, models
from tests.support.extractions import assert_round_trip, everything, only, tune
from tests.support.kit import spawn


def recorded(arch: str, folder: Path) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer of a tiny model, some of them strong."""
    model = models.load(arch, folder)
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].detach().float()
            found.setdefault(name, []).append(flat.reshape(-1, flat.shape[-1]).clone())

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(hook(name))
    models.run(arch, model)
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, values in found.items():  # many more like the few that it got
        rows = torch.cat(values)
        rows, mean = rows - rows.mean(dim=0), rows.mean(dim=0)
        made[f"{name}.activations"] = torch.randn(400, len(rows), generator=generator) @ rows / len(rows) ** 0.5 + mean
    return made


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """With biases on query, key and value."""
    base = models.build_base("qwen2", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only("layers", everything))
    return base, tuned, recorded("qwen2", base)


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def missing(result: surgery.ExtractResult, out: Path, base: Path, tuned: Path, x: dict[str, torch.Tensor]) -> float:
    """Error of the outputs on the inputs `x` as a merge makes them, biases included; relative to the change's."""
    surgery.merge(base, out, output=out.with_name(f"{out.name}-merged"))
    old, new, got = (disk.read_tensors(f) for f in (base, tuned, out.with_name(f"{out.name}-merged")))
    left = total = 0.0
    for row in result.rows:
        if row.calibration is not None:
            module = row.name.removesuffix(".weight")
            inputs = x[f"{module}.activations"].double()[3::4]  # the others are what the factors were weighted with
            rest = inputs @ (new[row.name].double() - got[row.name].double()).T
            if row.calibration.bias:
                rest += new[f"{module}.bias"].double() - got[f"{module}.bias"].double()
            left += float(rest.square().sum() / len(inputs))
            total += float((inputs @ (new[row.name].double() - old[row.name].double()).T).square().sum() / len(inputs))
    return (left / total) ** 0.5


def test_it_loses_less_on_these_inputs_and_says_how_much(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, tuned, x = qwen
    given = saved(x, tmp_path / "x.safetensors")
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, calibration=given)
    plain = surgery.extract_lora(base, tuned, output=tmp_path / "plain", rank=4, kind="lora")
    totals = result.calibration
    assert totals is not None
    assert totals.weighted > 0.8 * totals.modules >= 10
    assert totals.biases == 6
    assert totals.error < 0.95 * totals.plain
    assert missing(result, tmp_path / "out", base, tuned, x) == pytest.approx(totals.error, rel=1e-3)
    assert result.residual > plain.residual, "for other inputs, plain factors are better"
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["calibration"]["output_error"] == pytest.approx(totals.error, rel=1e-5)
    for name, row in manifest["tensors"].items():
        if "mlp" in name:
            kept = row["calibration"]["kept"]
            assert (kept == "weighted") == (row["calibration"]["weighted"] < row["calibration"]["plain"])


def test_corrected_biases_are_right_attached_and_merged(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, tuned, x = qwen
    given = saved(x, tmp_path / "x.safetensors")
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, calibration=given)
    corrected = [row for row in result.rows if row.kind == "corrected"]
    assert len(corrected) == 6
    assert all(row.name.endswith("_proj.bias") and row.form == "bias" for row in corrected)
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    wanted = models.run("qwen2", models.load("qwen2", tmp_path / "merged"))
    attached = PeftModel.from_pretrained(models.load("qwen2", base), str(tmp_path / "out")).double().eval()
    assert float((models.run("qwen2", attached) - wanted).abs().max()) < 2e-6
    assert float((models.run("qwen2", attached.merge_and_unload()) - wanted).abs().max()) < 2e-6


def test_without_biases_none_is_touched(qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    base, _, x = qwen
    tuned = tune(base, tmp_path / "weights", only("proj.weight"))
    given = saved(x, tmp_path / "x.safetensors")
    with_them = surgery.extract_lora(base, tuned, output=tmp_path / "with", rank=4, calibration=given)
    assert with_them.classes["corrected"] == 6, "biases that did not change are corrected, too"
    without = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, calibration=given, dense=("norm",))
    assert "corrected" not in without.classes
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if name.endswith("bias")]
    assert with_them.calibration is not None
    assert without.calibration is not None
    assert with_them.calibration.error < without.calibration.error


def test_few_inputs_do_not_mislead(qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Weighted with noise, factors are better on that noise and on no other: inputs that were kept back show it."""
    base, tuned, x = qwen
    few = {
        name: torch.randn(8, value.shape[1], generator=torch.Generator().manual_seed(1)) for name, value in x.items()
    }
    given = saved(few, tmp_path / "x.safetensors")
    result = surgery.extract_lora(
        base, tuned, output=tmp_path / "out", rank=4, calibration=given, dense=("norm",), allow_loss=True
    )
    assert result.calibration is not None
    assert result.calibration.weighted < 0.7 * result.calibration.modules


def test_a_gram_with_a_mean_is_as_good_as_the_inputs(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, tuned, x = qwen
    grams = {}
    for name, value in x.items():
        module = name.removesuffix(".activations")
        grams[f"{module}.gram"] = value.double().T @ value.double() / len(value)
        grams[f"{module}.mean"] = value.double().mean(dim=0)
    one = surgery.extract_lora(
        base, tuned, output=tmp_path / "one", rank=4, calibration=saved(x, tmp_path / "x.safetensors")
    )
    two = surgery.extract_lora(
        base, tuned, output=tmp_path / "two", rank=4, calibration=saved(grams, tmp_path / "g.safetensors")
    )
    assert one.calibration is not None
    assert two.calibration is not None
    assert two.calibration.error == pytest.approx(one.calibration.error, rel=0.2)


def test_plain_factors_are_kept_where_weighting_does_not_help(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, tuned, _ = qwen
    size = disk.read_tensors(base)["model.layers.0.mlp.up_proj.weight"].shape[1]
    given = saved({"model.layers.0.mlp.up_proj.gram": torch.eye(size)}, tmp_path / "g.safetensors")
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=4, calibration=given)
    plain = surgery.extract_lora(base, tuned, output=tmp_path / "plain", rank=4, kind="lora")
    row = next(row for row in result.rows if row.calibration is not None)
    assert row.calibration is not None
    assert row.calibration.weighted == pytest.approx(row.calibration.plain, rel=1e-4)
    assert result.residual == pytest.approx(plain.residual, rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_at_full_rank_nothing_changes(arch: str, tmp_path: Path) -> None:
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    x = {name: value for name, value in recorded(arch, base).items() if "lm_head" not in name}
    given = saved(x, tmp_path / "x.safetensors")
    result = surgery.extract_lora(base, tuned, output=tmp_path / "out", rank=128, calibration=given)
    assert result.calibration is not None
    assert result.calibration.modules == len(x)
    assert_round_trip(arch, base, tuned, tmp_path / "out", 2e-5)


MODULE = "model.layers.0.mlp.up_proj"
HOSTILE: dict[str, tuple[dict[str, torch.Tensor], type[SurgeryError], str]] = {
    "too narrow": ({f"{MODULE}.activations": torch.ones(5, 7)}, FitError, "inputs"),
    "not a matrix": ({f"{MODULE}.activations": torch.ones(32)}, FitError, "inputs"),
    "gram of another size": ({f"{MODULE}.gram": torch.eye(7)}, FitError, "inputs"),
    "NaN": ({f"{MODULE}.activations": torch.full((4, 32), float("nan"))}, FitError, "NaN"),
    "Inf in the mean": (
        {f"{MODULE}.gram": torch.eye(32), f"{MODULE}.mean": torch.full((32,), float("inf"))},
        FitError,
        "Inf",
    ),
    "unknown module": ({"model.layers.9.mlp.up_proj.activations": torch.ones(5, 32)}, FitError, "lacks"),
    "an embedding": ({"model.embed_tokens.activations": torch.ones(5, 32)}, FitError, "cannot be weighted"),
    "not symmetric": ({f"{MODULE}.gram": torch.ones(32, 32).triu()}, FitError, "symmetric"),
    "zeros": ({f"{MODULE}.activations": torch.zeros(4, 32)}, FitError, "zero"),
    "no part": ({MODULE: torch.ones(5, 32)}, MalformedError, "no part"),
    "both": ({f"{MODULE}.gram": torch.eye(32), f"{MODULE}.activations": torch.ones(5, 32)}, MalformedError, "gram"),
    "a mean alone": ({f"{MODULE}.mean": torch.ones(32)}, MalformedError, "mean"),
    "integers": ({f"{MODULE}.activations": torch.ones(5, 32, dtype=torch.int64)}, MalformedError, "I64"),
    "nothing": ({}, MalformedError, "no inputs"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_calibration_is_refused(fault: str, tmp_path: Path) -> None:
    tensors, kind, words = HOSTILE[fault]
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    given = saved(tensors, tmp_path / "x.safetensors")
    with pytest.raises(kind, match=words) as caught:
        surgery.extract_lora(base, tuned, output=tmp_path / "out", calibration=given)
    assert caught.value.exit_code == (4 if kind is FitError else 3)
    assert str(caught.value.file).endswith("x.safetensors")
    assert not (tmp_path / "out").exists()


def test_the_command_weights_factors_and_refuses_missing_inputs_and_dora(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, tuned, x = qwen
    given = saved(x, tmp_path / "x.safetensors")
    done = spawn("extract-lora", base, tuned, "-o", tmp_path / "out", "--rank", "4", "--calibration", given)
    assert done.returncode == 0, done.stderr
    assert "weighted factors in" in done.stdout
    lost = spawn("extract-lora", base, tuned, "-o", tmp_path / "no", "--calibration", tmp_path / "none.safetensors")
    assert lost.returncode == 3
    both = spawn("extract-lora", base, tuned, "-o", tmp_path / "no", "--calibration", given, "--kind", "dora")
    assert both.returncode == 2


def test_raw_inputs_are_read_in_parts(
    qwen: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are; the same every fourth row judges."""
    base, tuned, found = qwen
    file = saved(found, tmp_path / "x.safetensors")
    whole = surgery.extract_lora(base, tuned, rank=2, calibration=file, dry_run=True)
    largest, read = 0, StoredTensor.read

    def seen(self: StoredTensor, *rows: int) -> Array:
        nonlocal largest
        made = read(self, *rows)
        if self.name.endswith(".activations"):
            largest = max(largest, made.size)
        return made

    monkeypatch.setattr("surgery.engine.calibration_file._READ", 512)
    monkeypatch.setattr(StoredTensor, "read", seen)
    parts = surgery.extract_lora(base, tuned, rank=2, calibration=file, dry_run=True)
    assert 0 < largest <= 512
    facts = [[row.calibration for row in one.rows if row.calibration is not None] for one in (whole, parts)]
    assert len(facts[0]) == len(facts[1]) > 8
    for one, other in zip(*facts, strict=True):
        assert (one.weighted, one.plain) == pytest.approx((other.weighted, other.plain), rel=1e-6)
