# SPDX-License-Identifier: Apache-2.0
"""What to do next with a merged diffusion network: the class of diffusers that loads this file, or this variant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery import convert, merge
from tests.support.adapter_files import GOLDEN, draw, write_base, write_peft

UNET = "model.diffusion_model."
CLIP_L, CLIP_G = "text_model.encoder.layers.0.self_attn.q_proj.weight", "transformer.resblocks.0.attn.out_proj.weight"
SD1 = [f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"]
OF_SD1 = f"cond_stage_model.transformer.{CLIP_L}"
OF_XL = (f"conditioner.embedders.0.transformer.{CLIP_L}", f"conditioner.embedders.1.model.{CLIP_G}")
MMDIT = ["joint_blocks.0.x_block.attn.qkv.weight"]
FLUX = ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_mlp.0.weight", "double_blocks.0.img_mod.lin.weight"]
FLUX_ALONE = [*FLUX, "single_blocks.0.linear1.weight", "guidance_in.in_layer.weight", "txt_in.weight"]
WAN = ["blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight"]


@pytest.mark.parametrize(
    ("names", "loader"),
    [
        (SD1, "UNet2DConditionModel"),
        ([*SD1, OF_SD1], "StableDiffusionPipeline"),
        ([*SD1, *OF_XL], "StableDiffusionXLPipeline"),
        ([*SD1, f"conditioner.embedders.0.model.{CLIP_G}"], "StableDiffusionXLImg2ImgPipeline"),
        (MMDIT, "SD3Transformer2DModel"),
        ([f"{UNET}{name}" for name in FLUX_ALONE], "FluxTransformer2DModel"),
        (WAN, "WanTransformer3DModel"),
        ([*WAN, "vace_blocks.0.self_attn.q.weight"], "WanVACETransformer3DModel"),
    ],
)
def test_one_file_is_loaded_by_the_class_of_its_network(tmp_path: Path, names: list[str], loader: str) -> None:
    shapes = dict.fromkeys(names, (24, 8))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "base.safetensors")
    stem = names[0].removeprefix(UNET).removesuffix(".weight")
    factors = {
        f"diffusion_model.{stem}.lora_A.weight": draw(1, 2, 8),
        f"diffusion_model.{stem}.lora_B.weight": draw(2, 24, 2),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    result = merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", output=tmp_path / "out")
    written = tmp_path / "out" / "base.safetensors"
    assert written.is_file()
    assert f'load it with diffusers: {loader}.from_single_file("{written}")' in str(result.summary())


def test_names_of_several_networks_or_of_none_are_not_guessed_at(tmp_path: Path) -> None:
    for number, name in enumerate(("transformer_blocks.0.attn.to_q.weight", "mixer.0.theta.weight")):
        base, lora = tmp_path / f"{number}.safetensors", tmp_path / f"lora{number}.safetensors"
        save_file({name: np.zeros((8, 8), np.float32)}, base)
        stem = name.removesuffix(".weight")
        save_file(
            {f"diffusion_model.{stem}.lora_{x}.weight": draw(1, *shape) for x, shape in (("A", (2, 8)), ("B", (8, 2)))},
            lora,
        )
        result = merge(base, lora, output=tmp_path / f"out{number}")
        assert "look at it: surgery inspect" in str(result.summary())


@pytest.mark.parametrize(("file", "end"), [("fp16.safetensors", '", variant="fp16")'), ("safetensors", '")')])
def test_a_pipeline_is_loaded_by_its_variant(tmp_path: Path, file: str, end: str) -> None:
    pipe, name = tmp_path / "pipe", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    (pipe / "unet").mkdir(parents=True)
    (pipe / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    (pipe / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file({f"{name}.weight": np.zeros((8, 8), np.float16)}, pipe / "unet" / f"diffusion_pytorch_model.{file}")
    save_file(
        {f"unet.{name}.lora_{x}.weight": draw(1, *shape) for x, shape in (("A", (2, 8)), ("B", (8, 2)))},
        tmp_path / "l.safetensors",
    )
    result = merge(pipe, tmp_path / "l.safetensors", output=tmp_path / "out")
    assert f'DiffusionPipeline.from_pretrained("{tmp_path / "out"}{end}' in str(result.summary())


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("peft", 'PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("{base}"), "{out}")'),
        ("mlx", 'mlx_lm.load("{base}", adapter_path="{out}")'),
    ],
)
def test_a_converted_adapter_is_attached_to_a_model_of_its_bases_class(tmp_path: Path, target: str, hint: str) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 1}
    base = write_base(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": (8, 8)}, config)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 8), f"{stem}.lora_B.weight": draw(2, 8, 2)}
    adapter = write_peft(tmp_path / "lora", tensors, r=2, lora_alpha=4, target_modules=["q_proj"])
    if target == "peft":  # from another format
        convert(adapter, "mlx", base=base, output=tmp_path / "mlx")
        adapter = tmp_path / "mlx"
    result = convert(adapter, target, base=base, output=tmp_path / "out")
    assert hint.format(base=base, out=tmp_path / "out") in str(result.summary())


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("gguf", 'llama-cli -m base.gguf --lora "{out}"'),
        ("keras", 'backbone.load_lora_weights("{out}/adapter.lora.h5")'),
        ("litgpt", 'torch.load("{out}/lit_model.pth.lora", weights_only=True)["model"], strict=False)'),
        ("loralib", 'model.load_state_dict(torch.load("{out}", weights_only=True), strict=False)'),
        ("onnx-adapter", 'adapter.Load("{out}")'),
        ("tensorrt-llm", "--lora-path {out}"),
        ("torchtune", 'model.load_state_dict(torch.load("{out}/adapter_model.pt", weights_only=True), strict=False)'),
    ],
)
def test_programs_of_language_models_are_told_by_their_calls(tmp_path: Path, target: str, hint: str) -> None:
    folder, endings = GOLDEN / "gguf/llama", {"gguf": ".gguf", "loralib": ".pt", "onnx-adapter": ".onnx_adapter"}
    out = tmp_path / f"out{endings.get(target, '')}"
    told = str(convert(folder / "lora/peft", target, base=folder / "base", output=out).summary())
    assert hint.format(out=out) in told.replace("\n", "")
    named = re.search(rf"{re.escape(str(out))}[\w./]*", told)
    assert named
    assert Path(named[0]).exists()


@pytest.mark.parametrize("loads", [True, False])
def test_a_file_for_diffusers_is_loaded_by_a_pipeline_if_it_holds_loras(tmp_path: Path, loads: bool) -> None:
    stem, out = "lycoris_transformer_blocks_0_attn_to_q", tmp_path / "k.safetensors"
    loha = {f"{stem}.hada_w{x}_a": draw(x, 8, 2) for x in (1, 2)} | {
        f"{stem}.hada_w{x}_b": draw(x, 2, 8) for x in (1, 2)
    }
    lora = {f"{stem}.lora_down.weight": draw(1, 2, 8), f"{stem}.lora_up.weight": draw(2, 8, 2)}
    save_file(lora if loads else loha, tmp_path / "a.safetensors")
    base = write_base(tmp_path / "base", {"transformer_blocks.0.attn.to_q.weight": (8, 8)}, {})
    result = convert(tmp_path / "a.safetensors", "kohya", base=base, output=out)
    assert (f'pipe.load_lora_weights("{out}")' in str(result.summary())) is loads


def test_a_file_for_comfyui_goes_into_its_folder(tmp_path: Path) -> None:
    stem, out = "transformer.blocks.0.attn1.to_q", tmp_path / "c.safetensors"
    save_file(
        {f"{stem}.lora_{x}.weight": draw(1, *shape) for x, shape in (("A", (2, 8)), ("B", (8, 2)))},
        tmp_path / "a.safetensors",
    )
    base = write_base(tmp_path / "base", {"blocks.0.attn1.to_q.weight": (8, 8)}, {})
    told = str(convert(tmp_path / "a.safetensors", "comfyui", base=base, output=out).summary())
    assert f"models/loras of ComfyUI, for its node LoraLoader: {out}" in told


def test_a_network_of_a_pipeline_is_what_peft_attaches_to(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file(
        {f"{stem}.lora_down.weight": draw(1, 2, 8), f"{stem}.lora_up.weight": draw(2, 8, 2)}, tmp_path / "a.safetensors"
    )
    base = tmp_path / "pipe"
    base.mkdir()
    (base / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    write_base(
        base / "unet", {"down_blocks.0.attentions.0.proj_in.weight": (8, 8)}, {"_class_name": "UNet2DConditionModel"}
    )
    result = convert(tmp_path / "a.safetensors", "peft", base=base, component="unet", output=tmp_path / "out")
    assert f'PeftModel.from_pretrained(pipe.unet, "{tmp_path / "out"}")' in str(result.summary())


def test_what_llama_cpp_is_given_becomes_a_gguf_by_the_command_that_is_shown(tmp_path: Path) -> None:
    folder = GOLDEN / "gguf/llama"
    result = convert(folder / "lora/peft", consumer="llama.cpp", base=folder / "base", output=tmp_path / "out")
    told = next(line for line in str(result.summary()).splitlines() if line.startswith("next: "))
    assert told.endswith(f"surgery convert {tmp_path / 'out'} --to gguf --base {folder / 'base'} -o adapter.gguf")
    convert(tmp_path / "out", "gguf", base=folder / "base", output=tmp_path / "adapter.gguf")
