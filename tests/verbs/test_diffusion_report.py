# SPDX-License-Identifier: Apache-2.0
"""Reports of diffusion networks: what of them lies where, in models and adapters, or that it is not told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import extract_lora, inspect, report
from surgery.reports.adapter_report import AdapterReport
from surgery.reports.checkpoint_report import CheckpointReport
from tests.support.adapter_files import draw, write_base, write_peft

WAN = {
    "patch_embedding.weight": (8, 4, 1, 2, 2),
    "head.head.weight": (16, 8),
    **{
        f"blocks.{i}.{side}_attn.{part}.weight": (8, 8) for i in (0, 1) for side in ("self", "cross") for part in "qkvo"
    },
    **{f"blocks.{i}.self_attn.norm_q.weight": (8,) for i in (0, 1)},
    **{f"blocks.{i}.ffn.{part}.weight": shape for i in (0, 1) for part, shape in ((0, (32, 8)), (2, (8, 32)))},
    **{f"blocks.{i}.modulation": (1, 6, 8) for i in (0, 1)},
}
ATTENTION, MLP, MODULATION = 2 * 8 * 64, 2 * 2 * 256, 2 * 48


def _base(path: Path, prefix: str = "", **more: tuple[int, ...]) -> Path:
    shapes = {**{f"{prefix}{name}": shape for name, shape in WAN.items()}, **more}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_that_removes_noise_is_told_apart_by_its_own_words(tmp_path: Path, prefix: str) -> None:
    file = _base(tmp_path / "wan.safetensors", prefix)
    cost = report(file).base
    assert cost is not None
    assert (cost.split.attention, cost.split.mlp, cost.split.modulation) == (ATTENTION, MLP, MODULATION)
    assert cost.split.untold == 0
    assert cost.split.total == cost.parameters == sum(int(np.prod(shape)) for shape in WAN.values())
    found = inspect(file)
    assert isinstance(found, CheckpointReport)
    assert "Wan, by its names" in str(found.summary())
    assert "other" not in found.components[0].roles


def test_parts_of_one_file_are_told_by_the_words_of_each(tmp_path: Path) -> None:
    text = "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    file = _base(tmp_path / "all.safetensors", "model.diffusion_model.", **{text: (8, 8)})
    found = inspect(file)
    assert isinstance(found, CheckpointReport)
    assert found.components[0].networks == {"denoiser": "Wan", "text_encoder": "umt5xxl"}
    assert found.components[0].roles["attention"].parameters == ATTENTION + 64


def test_what_headers_say_of_models_and_adapters_is_shown_with_its_field(tmp_path: Path) -> None:
    says = {"modelspec.architecture": "wan2.1", "prompt": '{"9": {"class_type": "CheckpointSave"}}'}
    model = tmp_path / "wan.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in WAN.items()}, model, says)
    shown = str(inspect(model).summary())
    assert "wan2.1 (modelspec.architecture)" in shown
    assert "ComfyUI (prompt)" in shown
    stem = "lora_unet_blocks_0_self_attn_q"
    factors = {f"{stem}.lora_down.weight": draw(1, 2, 8), f"{stem}.lora_up.weight": draw(2, 8, 2)}
    save_file(
        factors,
        tmp_path / "a.safetensors",
        {"modelspec.architecture": "wan2.1/lora", "ss_network_module": "networks.lora_wan"},
    )
    found = inspect(tmp_path / "a.safetensors")
    assert isinstance(found, AdapterReport)
    assert (found.made_for, found.family) == ("wan2.1 (modelspec.architecture)", "Wan")
    assert found.tool == "musubi-tuner (ss_network_module)"


def test_what_latent_diffusion_keeps_beside_its_networks_is_told_too(tmp_path: Path) -> None:
    clip = "conditioner.embedders.1.model."
    shapes = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        f"{clip}token_embedding.weight": (10, 8),
        f"{clip}positional_embedding": (4, 8),
        f"{clip}ln_final.weight": (8,),
        f"{clip}transformer.resblocks.0.attn.in_proj_weight": (24, 8),
        f"{clip}text_projection": (8, 8),
        "alphas_cumprod": (1000,),
    }
    file = tmp_path / "xl.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
    found = inspect(file)
    assert isinstance(found, CheckpointReport)
    told = {role: total.parameters for role, total in found.components[0].roles.items()}
    assert told == {"embedding": 112, "attention": 64 + 192, "other": 64, "norm": 8, "buffer": 0}


def test_both_in_one_matrix_is_neither_and_flux_has_none_untold(tmp_path: Path) -> None:
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (24, 8),
        "double_blocks.0.txt_mlp.0.weight": (32, 8),
        "single_blocks.0.linear1.weight": (56, 8),
        "single_blocks.0.linear2.weight": (8, 40),
        "double_blocks.0.img_mod.lin.weight": (48, 8),
    }
    file = tmp_path / "flux.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
    cost = report(file).base
    assert cost is not None
    split = cost.split
    assert (split.attention, split.mlp, split.both, split.modulation) == (192, 256, 448 + 320, 384)
    assert (split.rest, split.untold) == (0, 0)


def test_an_adapter_lies_where_its_base_does_with_and_without_it(tmp_path: Path) -> None:
    base = _base(tmp_path / "wan.safetensors")
    stems = {"blocks_0_self_attn_q": (8, 8), "blocks_1_cross_attn_o": (8, 8), "blocks_1_ffn_0": (32, 8)}
    tensors = {}
    for stem, (out, inputs) in stems.items():
        tensors[f"lora_unet_{stem}.lora_down.weight"] = draw(1, 2, inputs)
        tensors[f"lora_unet_{stem}.lora_up.weight"] = draw(2, out, 2)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    alone, beside = report(file).adapters[0].split, report(file, base=base).adapters[0].split
    assert alone == beside
    assert (alone.attention, alone.mlp, alone.rest, alone.untold) == (2 * 2 * 16, 2 * 40, 0, 0)
    found = inspect(file)
    assert isinstance(found, AdapterReport)
    assert {group.role for group in found.targets} == {"attention", "mlp"}


def test_a_peft_folder_of_a_denoiser_is_told_by_the_words_of_denoisers(tmp_path: Path) -> None:
    modules = {"single_transformer_blocks.0.proj_mlp": "mlp", "single_transformer_blocks.0.attn.to_q": "attention"}
    tensors = {}
    for number, module in enumerate(modules):
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw(number, 2, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw(number + 5, 8, 2)
    folder = write_peft(tmp_path / "lora", tensors, r=2, target_modules=["proj_mlp", "to_q"])
    found = inspect(folder)
    assert isinstance(found, AdapterReport)
    assert {module.name.removesuffix(".weight"): module.role for module in found.modules} == modules


def test_what_no_name_tells_is_said_not_to_be_told(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"mixer.0.theta.weight": np.zeros((4, 4), np.float32)}, file)
    cost = report(file).base
    assert cost is not None
    assert cost.split.untold == 16
    shown = str(report(file).summary())
    assert "0 (0.0%)" not in shown
    assert shown.count("not told") >= 3  # attention, MLP and the column of what is not told


def test_the_table_of_an_extraction_knows_attention_of_a_denoiser(tmp_path: Path) -> None:
    names = [f"blocks.0.{part}.weight" for part in ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")]
    base = write_base(tmp_path / "base", dict.fromkeys(names, (8, 8)), {"_class_name": "WanTransformer3DModel"})
    before = load_file(base / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_bytes((base / "config.json").read_bytes())
    after = {name: value + np.outer(draw(1, 8), draw(2, 8)).astype(np.float32) for name, value in before.items()}
    save_file(after, tmp_path / "tuned" / "model.safetensors")
    result = extract_lora(base, tmp_path / "tuned", output=tmp_path / "out", rank=1, table=True)
    numbers = {choice.layers: choice.parameters for choice in result.table if choice.rank == 4}
    assert numbers["attention"] == numbers["mlp"] > 0
    assert numbers["all"] == numbers["attention"] + numbers["mlp"]


def test_an_adapter_under_other_leading_names_is_told_by_the_bases(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.language_model.layers.0.self_attn.q_proj.weight": (8, 8)}, {})
    stem = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 8), f"{stem}.lora_B.weight": draw(2, 8, 2)}
    cost = report(write_peft(tmp_path / "lora", tensors, r=2, target_modules=["q_proj"]), base=base).adapters[0]
    assert cost.split.attention == cost.trained == 32
