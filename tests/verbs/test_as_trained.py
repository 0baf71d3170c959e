# SPDX-License-Identifier: Apache-2.0
"""Which base: an adapter that was trained on a quantised base, merged into the release it was made of."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.engine.two_bases.as_trained import rule_values, values_of
from surgery.engine.two_bases.gap import base_gap
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.arrays import as_torch
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.support.kit import ROOT, spawn
from tests.support.quantised_folders import FORMATS, quantise_folder

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight as a reader of the folder gets it."""
    return {name: as_torch(read_rows(one.storage)) for name, one in open_checkpoint(folder).main.parameters.items()}


def deltas() -> dict[str, torch.Tensor]:
    """What the example's LoRA adds, float64."""
    config, factors = (
        json.loads((LORA / "adapter_config.json").read_text()),
        load_file(LORA / "adapter_model.safetensors"),
    )
    found = {}
    for key in factors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            product = factors[f"{stem}.lora_B.weight"].double() @ factors[key].double()
            found[f"{stem.removeprefix('base_model.model.')}.weight"] = config["lora_alpha"] / config["r"] * product
    return found


def renamed(folder: Path, base_name: str, **config: object) -> Path:
    """The example's LoRA as one of another base."""
    shutil.copytree(LORA, folder)
    old = json.loads((folder / "adapter_config.json").read_text())
    new = {**old, "base_model_name_or_path": base_name, **config}
    (folder / "adapter_config.json").write_text(json.dumps(new))
    return folder


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_values_are_the_quantised_ones_and_all_else_is_the_release(format_name: str, tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", format_name)
    result = surgery.merge(BASE, LORA, output=tmp_path / "out", as_trained=coded)
    trained, added = values(coded), deltas()
    for name, merged in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = trained[name].double() + added.get(name, 0)
        assert merged.dtype is torch.bfloat16
        apart = merged != wanted.float().to(torch.bfloat16)
        assert apart.float().mean() < 1e-3, name  # where the sum in float32 is halfway between two
        assert torch.allclose(merged.double(), wanted, rtol=2.0**-7, atol=1e-8), name
    config = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(config) == json.loads((BASE / "config.json").read_text())
    assert "42 weights have the values" in str(result)
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert added.keys().isdisjoint([untouched]) or untouched in added
    assert "as trained" in json.dumps(manifest["ledger"]["tensors"])


@pytest.mark.parametrize("rule", ["nf4", "nf4-double", "fp4", "fp4-double"])
def test_a_rule_makes_of_the_release_what_loading_in_four_bits_does(rule: str, tmp_path: Path) -> None:
    surgery.merge(BASE, LORA, output=tmp_path / "out", as_trained=rule, dtype="fp32")
    merged, before, added = values(tmp_path / "out"), values(BASE), deltas()
    for name, weight in before.items():
        error = merged[name].double() - added.get(name, 0) - weight.double()
        if "_proj" in name:
            assert 0.05 < float(error.norm() / weight.double().norm()) < 0.2, name
        else:
            assert float(error.norm()) < 1e-6 * float(weight.double().norm()), name


def test_nf4_by_rule_is_the_folder_that_was_quantised_so(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", "nf4")
    for name, trained in (("rule", "nf4"), ("folder", coded)):
        surgery.merge(BASE, LORA, output=tmp_path / name, as_trained=trained)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("rule", "folder"))
    assert all(one[name].equal(other[name]) for name in one)


def test_any_rows_by_rule_are_those_of_the_whole() -> None:
    base = open_checkpoint(BASE)
    for rule in ("nf4", "fp4-double"):
        for weight in list(rule_values(rule, base).weights.values())[:7]:
            whole = read_rows(weight)
            assert all((read_rows(weight, start, start + 3) == whole[start : start + 3]).all() for start in (0, 1, 13))


def test_the_gap_is_that_of_dense_matrices(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", "nf4")
    base = open_checkpoint(BASE)
    binding = bind([(read_adapter(LORA), 1.0)], base)
    gap = base_gap(binding, values_of(open_checkpoint(coded), base).weights)
    before, after, sums = (
        values(BASE),
        values(coded),
        dict.fromkeys(("apart", "update", "rows", "columns", "both"), 0.0),
    )
    for name, delta in deltas().items():
        apart = after[name].double() - before[name].double()
        left, spectrum, right = torch.linalg.svd(delta, full_matrices=False)
        rank = int((spectrum > spectrum[0] * 1e-7).sum())
        U, V = left[:, :rank], right[:rank].T
        for what, part in (
            ("apart", apart), ("update", delta), ("rows", apart @ V), ("columns", U.T @ apart), ("both", U.T @ apart @ V),
        ):  # fmt: skip
            sums[what] += float(part.norm() ** 2)
    for what, square in sums.items():
        assert getattr(gap, what) == pytest.approx(math.sqrt(square), rel=1e-4), what
    assert (gap.weights, gap.read) == (len(deltas()), 1.0)
    sampled = base_gap(binding, values_of(open_checkpoint(coded), base).weights, sampled=True)
    assert sampled.apart == pytest.approx(gap.apart, rel=0.05)
    assert math.isnan(sampled.rows)


@pytest.mark.parametrize(
    ("base_name", "method", "rule"),
    [
        ("someone/llama-3-8b-bnb-4bit", "bitsandbytes NF4", "nf4"),
        ("unsloth/llama-3-8b-bnb-4bit", "bitsandbytes NF4", ""),  # some of its modules are in 16 bits
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "bitsandbytes NF4", ""),
        ("TheBloke/Llama-2-7B-GPTQ", "GPTQ", ""),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ/", "AWQ", ""),
        ("mlx-community/Mistral-7B-4bit", "4 bits", ""),
        ("org/model-FP8-dynamic", "FP8", ""),
    ],
)
def test_the_name_of_a_base_tells(base_name: str, method: str, rule: str, tmp_path: Path) -> None:
    found = quantised_base_of(read_adapter(renamed(tmp_path / "lora", base_name)))
    assert found is not None
    assert (found.method, found.rule) == (method, rule)


@pytest.mark.parametrize("base_name", ["meta-llama/Llama-3.2-1B", "org/gptqueen-7b", "org/14bit-music", "", "a/hawqs"])
def test_other_names_tell_nothing(base_name: str, tmp_path: Path) -> None:
    lora = renamed(tmp_path / "lora", base_name)
    assert quantised_base_of(read_adapter(lora)) is None


def test_the_card_that_peft_writes_tells_the_type_and_the_nesting(tmp_path: Path) -> None:
    lora = renamed(tmp_path / "lora", "meta-llama/Llama-2-7b-hf")
    (lora / "README.md").write_text(
        "The following `bitsandbytes` quantization config was used during training:\n- load_in_8bit: False\n"
        "- load_in_4bit: True\n- bnb_4bit_quant_type: nf4\n- bnb_4bit_use_double_quant: True\n"
    )
    found = quantised_base_of(read_adapter(lora))
    assert found is not None
    assert (found.rule, found.evidence) == ("nf4-double", "its README.md")
    (lora / "README.md").write_text("- load_in_4bit: False\n")
    assert quantised_base_of(read_adapter(lora)) is None


def test_a_merge_into_the_release_says_what_that_costs(tmp_path: Path) -> None:
    lora = renamed(tmp_path / "lora", "someone/other-bnb-4bit")
    result = surgery.merge(BASE, lora, output=tmp_path / "out")
    (warning,) = [text for text in result.warnings if "was trained on a base in" in text]
    coded = quantise_folder(BASE, tmp_path / "coded", "nf4")
    base = open_checkpoint(BASE)
    gap = base_gap(bind([(read_adapter(LORA), 1.0)], base), values_of(open_checkpoint(coded), base).weights)
    said = float(warning.partition("of that rounding, ")[2].partition(" times")[0])
    assert said == pytest.approx(gap.beside, rel=0.06)
    assert "--as-trained nf4 adds it back" in warning
    for options in ({"as_trained": "nf4"}, {"dry_run": True, "as_trained": coded}):
        quiet = surgery.merge(BASE, lora, output=tmp_path / "other", overwrite=True, **options)
        assert not [text for text in quiet.warnings if "was trained on a base in" in text]
    assert not [text for text in surgery.merge(coded, lora, dry_run=True).warnings if "was trained on a base" in text]


@pytest.mark.parametrize("base_name", ["org/example-GPTQ", "unsloth/example-unsloth-bnb-4bit"])
def test_a_base_that_only_files_tell_is_asked_for(base_name: str, tmp_path: Path) -> None:
    lora = renamed(tmp_path / "lora", base_name)
    (warning,) = [text for text in surgery.merge(BASE, lora, dry_run=True).warnings if "costs" in text]
    assert "--as-trained with its folder takes its values" in warning


def test_tensors_of_the_quantised_folder_are_not_counted_as_the_adapter_s(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", "nf4")
    result = surgery.merge(BASE, LORA, as_trained=coded, dry_run=True)
    assert result.ledger.adapter_tensors == 84


def test_inspect_tells_what_an_adapter_was_trained_on(tmp_path: Path) -> None:
    report = surgery.inspect(renamed(tmp_path / "lora", "someone/example-bnb-4bit"))
    assert "trained on bitsandbytes NF4 (its base is called 'someone/example-bnb-4bit')" in " ".join(
        str(report.summary()).split()
    )
    assert "quantised_base" not in surgery.inspect(LORA).as_json()


def test_what_cannot_be_as_trained_is_refused(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", "nf4")
    with pytest.raises(FitError, match="its values are those"):
        surgery.merge(coded, LORA, output=tmp_path / "out", as_trained="nf4")
    with pytest.raises(FitError, match="is not quantised"):
        surgery.merge(BASE, LORA, output=tmp_path / "out", as_trained=BASE)
    fewer = shutil.copytree(coded, tmp_path / "fewer")
    tensors = load_file(fewer / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, fewer / "model.safetensors")
    with pytest.raises(FitError, match="has no such weight"):
        surgery.merge(BASE, LORA, output=tmp_path / "out", as_trained=fewer)
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_share_of_work(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "coded", "int8")
    done = spawn("merge", BASE, LORA, "-o", tmp_path / "out", "--as-trained", coded)
    assert done.returncode == 0, done.stderr
    assert "as trained" in done.stdout + done.stderr
    surgery.merge(BASE, LORA, output=tmp_path / "same", as_trained=coded, workers=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()


def test_report_measures_both_bases_and_says_which_it_was(tmp_path: Path) -> None:
    coded = quantise_folder(BASE, tmp_path / "example-nf4", "nf4")
    lora = renamed(tmp_path / "lora", "someone/example-bnb-4bit")
    for one, other in ((BASE, coded), (coded, BASE), (BASE, "nf4")):
        (choice,) = surgery.report(lora, base=one, other_base=other).choices
        assert choice.attached == ("nf4" if other == "nf4" else "example-nf4")
        assert choice.weights == len(deltas())
        assert 0.08 < choice.apart < 0.11
        assert choice.both < min(choice.rows, choice.columns) < choice.beside
    text = str(surgery.report(lora, base=BASE, other_base=coded))
    assert "example-nf4 gives the behaviour of training" in text
    (choice,) = surgery.report(LORA, base=BASE, other_base=coded).choices
    assert choice.attached == ""
    assert "do not tell" in str(surgery.report(LORA, base=BASE, other_base=coded))


def test_a_base_without_another_and_a_command(tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="needs a base"):
        surgery.report(LORA, other_base="nf4")
    done = spawn("report", LORA, "--base", BASE, "--other-base", "nf4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["choices"][0]["weights"] == len(deltas())


def test_the_card_says_whose_values_the_base_was_given(tmp_path: Path) -> None:
    surgery.merge(BASE, LORA, output=tmp_path / "out", as_trained="nf4")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| as trained | 42 weights have the values that nf4 gives them" in card
