# SPDX-License-Identifier: Apache-2.0
"""PEFT's weights without adapter_config.json: with the alpha that they lack they are what they are with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import surgery
from surgery import convert, inspect, merge
from surgery_cli.group import surgery as command
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from tests.oracles import models, peft_oracle
from tests.support.adapter_files import Arrays, config_of, draw, unet, write_base, write_peft

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ranks": ("llama", "Lora", {"target_modules": ["q_proj", "up_proj"], "r": 3, "rank_pattern": {"up_proj": 2}}),
    "dora": ("llama", "Lora", {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_dora": True}),
    "embedding": ("llama", "Lora", {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "saved modules": ("llama", "Lora", {"target_modules": ["q_proj"], "r": 3, "modules_to_save": ["lm_head", "norm"]}),
    "convolutions": ("torch_module", "Lora", {"target_modules": ["conv1", "conv2"], "r": 3}),
    "biases": ("bert", "Lora", {"target_modules": ["query"], "r": 3, "bias": "lora_only"}),
    "lora_bias": ("gpt2", "Lora", {"target_modules": ["c_attn"], "r": 3, "lora_bias": True}),
    "loha": ("llama", "LoHa", {"target_modules": ["q_proj", "up_proj"], "r": 3, "rank_pattern": {"up_proj": 2}}),
    "ia3": ("gpt2", "IA3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
}


def _values(adapter: Adapter) -> dict[str, list[Any]]:
    return {
        str(site): [
            (update.kind, update.scale, {name: factor.load(None).tolist() for name, factor in update.factors().items()})
            for update in chain
        ]
        for site, chain in adapter.updates.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_with_its_alpha_it_is_what_peft_s_folder_is(name: str, tmp_path: Path) -> None:
    arch, kind, fields = CASES[name]
    alpha = {"Lora": {"lora_alpha": 7}, "LoHa": {"alpha": 7}, "IA3": {}}[kind]
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", {**fields, **alpha}, tmp_path / "trained", seed=4)
    whole = read_adapter(tmp_path / "trained")
    shutil.copytree(tmp_path / "trained", tmp_path / "lone")
    (tmp_path / "lone/adapter_config.json").unlink()
    shutil.copy(tmp_path / "lone/adapter_model.safetensors", tmp_path / "renamed.safetensors")
    for path in (tmp_path / "lone", tmp_path / "lone/adapter_model.safetensors", tmp_path / "renamed.safetensors"):
        if alpha:
            with pytest.raises(FitError, match=r"without their adapter_config\.json, which has their scale"):
                surgery.open(path)
        lone = surgery.open(path, alpha=7 if alpha else None)
        assert isinstance(lone, Adapter)
        assert (lone.format, lone.kind, lone.unconsumed()) == ("peft", whole.kind, ())
        assert _values(lone) == _values(whole)
        assert "no adapter_config.json" in lone.known_issues()[-1]
    out = tmp_path / "made"
    report = merge(base, lone, output=out)
    assert len(report.warnings) == 1  # that it was read by its tensors: no configuration promises more than they are
    merge(base, tmp_path / "trained", output=tmp_path / "wanted")
    wanted, made = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "wanted", out))
    assert all(np.array_equal(made[key], value) for key, value in wanted.items())
    assert made.keys() == wanted.keys()


@pytest.mark.parametrize("name", CASES)
def test_converted_it_has_the_configuration_that_peft_reads(name: str, tmp_path: Path) -> None:
    arch, kind, fields = CASES[name]
    alpha = {"Lora": {"lora_alpha": 7}, "LoHa": {"alpha": 7}, "IA3": {}}[kind]
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", {**fields, **alpha}, tmp_path / "trained", seed=4)
    shutil.copy(tmp_path / "trained/adapter_model.safetensors", tmp_path / "x.safetensors")
    lone = surgery.open(tmp_path / "x.safetensors", alpha=7 if alpha else None)
    convert(lone, "peft", output=tmp_path / "written")
    wanted, made = (peft_oracle.merge(arch, base, [(tmp_path / f, 1.0)], "float64") for f in ("trained", "written"))
    for key, value in wanted.tensors.items():
        assert (made.tensors[key] == value).all(), key
    assert (made.attached == wanted.attached).all()


PLAIN = {
    "base_model.model.model.layers.0.q_proj.lora_A.weight": draw(1, 2, 8),
    "base_model.model.model.layers.0.q_proj.lora_B.weight": draw(2, 8, 2),
}


def test_rs_lora_is_the_alpha_times_the_root_of_the_rank(tmp_path: Path) -> None:
    whole = read_adapter(write_peft(tmp_path / "rs", PLAIN, use_rslora=True, lora_alpha=6))
    save_file(PLAIN, tmp_path / "x.safetensors")
    lone = surgery.open(tmp_path / "x.safetensors", alpha=6 * 2**0.5)
    (mine,), (theirs,) = (next(iter(adapter.updates.values())) for adapter in (lone, whole))
    assert mine.scale == pytest.approx(theirs.scale)
    assert "rsLoRA" in lone.known_issues()[-1]


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("base_model.model.", "denoiser"),
        ("unet.base_model.model.", "unet"),
        ("transformer.base_model.model.", "transformer"),
        ("module.base_model.model.", "denoiser"),
    ],
)
def test_a_file_of_a_diffusion_network_meets_its_pipeline(prefix: str, component: str, tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{prefix}{module}.lora_A.weight": draw(1, 2, 4), f"{prefix}{module}.lora_B.weight": draw(2, 6, 2)}
    save_file(factors, tmp_path / "x.safetensors")
    adapter = surgery.open(tmp_path / "x.safetensors", alpha=4)
    ((site, (update,)),) = adapter.updates.items()
    assert (site.component, site.path, update.scale) == (component, f"{module}.weight", 2.0)
    assert adapter.unconsumed() == ()
    pipeline = tmp_path / "pipeline"
    unet(pipeline / "unet")
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    if component == "transformer":
        return
    merge(pipeline, adapter, output=tmp_path / "out")
    before, after = (load_file(next((root / "unet").glob("*.safetensors"))) for root in (pipeline, tmp_path / "out"))
    change = 2.0 * factors[f"{prefix}{module}.lora_B.weight"] @ factors[f"{prefix}{module}.lora_A.weight"]
    assert abs(after[f"{module}.weight"] - before[f"{module}.weight"] - change).max() < 1e-6


def test_two_components_in_one_file_keep_apart(tmp_path: Path) -> None:
    tensors: Arrays = {}
    for seed, component in enumerate(("text_encoder", "text_encoder_2")):
        stem = f"{component}.base_model.model.layers.0.self_attn.q_proj"
        tensors |= {f"{stem}.lora_A.weight": draw(seed, 2 + seed, 8), f"{stem}.lora_B.weight": draw(9, 8, 2 + seed)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = surgery.open(tmp_path / "x.safetensors", alpha=6)
    assert {site.component: chain[0].scale for site, chain in adapter.updates.items()} == {
        "text_encoder": 3.0,
        "text_encoder_2": 2.0,
    }


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": draw(3, 2, 8)}, "whose ids stand there alone"),
        ({"model.layers.0.q_proj.lora_diag": draw(3, 2)}, "KaSA"),
        ({"model.layers.0.q_proj.lora_E": draw(3, 2, 1)}, "type ADALORA"),
        ({"model.layers.0.k_proj.oft_R.weight": draw(3, 2, 6)}, "whose numbers that file explains"),
        ({"model.layers.0.mlp.experts.lora_A.weight": draw(3, 4, 8)}, "stacked experts"),
        ({"model.layers.0.mlp.experts.base_layer.lora_A.weight": draw(3, 4, 8)}, "stacked experts"),
        ({"model.layers.0.k_proj.lora_A.weight": draw(3, 4, 8)}, "lora_A without lora_B"),
        ({"model.layers.0.k_proj.lora_A.weight": draw(3, 0)}, "a factor of shape"),
    ],
)
def test_what_the_configuration_alone_explains_is_refused(more: Arrays, fault: str, tmp_path: Path) -> None:
    save_file(
        {**PLAIN, **{f"base_model.model.{key}": value for key, value in more.items()}}, tmp_path / "x.safetensors"
    )
    with pytest.raises((FitError, MalformedError), match=fault) as caught:
        surgery.open(tmp_path / "x.safetensors", alpha=4)
    assert "Traceback" not in str(caught.value)


def test_an_alpha_is_given_where_one_belongs(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "whole", PLAIN)
    with pytest.raises(FitError, match=r"an alpha of 12 was given, adapter_config\.json says 8"):
        surgery.open(folder, alpha=12)
    assert _values(surgery.open(folder, alpha=8)) == _values(read_adapter(folder))
    with pytest.raises(FitError, match=r"with their adapter_config\.json beside them") as caught:
        surgery.open(folder / "adapter_model.safetensors", alpha=8)
    assert caught.value.hint == "name their folder"
    save_file({"base_model.model.a.ia3_l": draw(1, 8, 1)}, tmp_path / "ia3.safetensors")
    with pytest.raises(FitError, match="has none"):
        surgery.open(tmp_path / "ia3.safetensors", alpha=8)


def test_a_model_saved_with_its_adapters_is_no_adapter(tmp_path: Path) -> None:
    bases = {"base_model.model.model.layers.0.q_proj.base_layer.weight": draw(3, 8, 8)}
    save_file({**PLAIN, **bases}, tmp_path / "x.safetensors")
    assert format_at(tmp_path / "x.safetensors") is None


def test_keys_without_the_prefix_are_peft_s_in_a_file_of_its_name(tmp_path: Path) -> None:
    bare = {key.removeprefix("base_model.model."): value for key, value in PLAIN.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    adapter = surgery.open(tmp_path / "adapter_model.safetensors", alpha=4)
    assert [site.path for site in adapter.updates] == ["model.layers.0.q_proj.weight"]
    assert "prefix" in adapter.known_issues()[0]
    with pytest.raises(FitError, match="which has their scale"):
        surgery.open(tmp_path)


def test_the_command_asks_for_alpha_and_takes_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.layers.0.q_proj.weight": (8, 8)}, {"model_type": "llama"})
    save_file(PLAIN, tmp_path / "x.safetensors")
    run = CliRunner().invoke
    file, out = str(tmp_path / "x.safetensors"), str(tmp_path / "out")
    asked = run(command, ["merge", str(base), file, "-o", out])
    assert (asked.exit_code, asked.output.count("\n")) == (4, 2)
    assert "trained with as --alpha, which" in asked.output
    assert run(command, ["merge", str(base), file, "--alpha", "4", "-o", out]).exit_code == 0
    shown = run(command, ["inspect", file, "--alpha", "4"])
    assert shown.exit_code == 0
    assert "rsLoRA" in shown.output
    assert run(command, ["convert", file, "--alpha", "4", "--to", "peft", "-o", str(tmp_path / "p")]).exit_code == 0
    assert config_of(tmp_path / "p")["lora_alpha"] == 4
    assert inspect(tmp_path / "p").kinds == {"LoRA": 1}


SHARDS = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize("names", [["adapter_model.bin"], SHARDS])
def test_pickles_and_shards_are_told_too(names: list[str], tmp_path: Path) -> None:
    parts = [dict([item]) for item in PLAIN.items()] if len(names) > 1 else [PLAIN]
    for name, part in zip(names, parts, strict=True):
        if name.endswith("bin"):
            torch.save({key: torch.from_numpy(value) for key, value in part.items()}, tmp_path / name)
        else:
            save_file(part, tmp_path / name)
    if len(names) > 1:
        index = {
            "metadata": {},
            "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
        }
        (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FitError, match="which has their scale"):
        surgery.open(tmp_path)
    (chain,) = surgery.open(tmp_path, alpha=4).updates.values()
    assert chain[0].scale == 2.0


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "x.safetensors"
    save_file(PLAIN, whole)
    data = whole.read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    refused = 0
    for at in range(header):
        for byte in (0x00, 0x2E, 0x7B, 0xFF):
            whole.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
            try:
                adapter = surgery.open(whole, alpha=4)
            except SurgeryError:
                refused += 1
                continue
            assert not isinstance(adapter, Adapter) or adapter.unconsumed() == ()
    assert refused > 3 * header
