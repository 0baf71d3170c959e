# SPDX-License-Identifier: Apache-2.0
"""Spellings of diffusion adapters that are found by their names alone: text encoders of ComfyUI, prefixes, fused weights' parts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import convert, merge
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError
from tests.support.adapter_files import Arrays, draw

H = 16
Modules = dict[str, tuple[int, int]]
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
QWEN = ("qwen3", {"model.layers.0.self_attn.q_proj": (H, H), "model.layers.1.mlp.up_proj": (2 * H, H)})
CLIP = ("clip_text_model", {"text_model.encoder.layers.0.self_attn.q_proj": (H, H)})
NEW_CLIP = ("clip_text_model", {"encoder.layers.0.self_attn.q_proj": (H, H)})  # as transformers 5 calls it
T5 = ("t5", {"encoder.block.0.layer.0.SelfAttention.q": (H, H)})
UMT5 = ("umt5", {"encoder.block.0.layer.0.SelfAttention.q": (H, H)})
WAN = {"blocks.0.self_attn.q": (H, H), "blocks.0.ffn.0": (2 * H, H)}
ANIMA = {"blocks.0.self_attn.q_proj": (H, H), "blocks.0.mlp.layer1": (2 * H, H), "blocks.0.cross_attn.k_proj": (H, H)}
HIDREAM = {"double_stream_blocks.0.block.attn1.to_q": (H, H), "single_stream_blocks.0.block.attn1.to_q": (H, H)}
HUNYUAN = {
    "txt_in.input_embedder": (H, H),
    "txt_in.t_embedder.mlp.0": (H, H),
    "final_layer.linear": (4, H),
    "time_in.mlp.0": (H, H),
    "vector_in.in_layer": (H, H),
    "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.0.modulation.linear": (3 * H, H),
    **{f"double_blocks.0.{s}_attn_qkv": (3 * H, H) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_attn_proj": (H, H) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_mlp.fc1": (4 * H, H) for s in ("img", "txt")},
    **{f"double_blocks.0.{s}_mlp.fc2": (H, 4 * H) for s in ("img", "txt")},
}
TRAINED = ("double_blocks.0.img_attn_qkv", "double_blocks.0.txt_mlp.fc1", "single_blocks.0.linear1")
QWEN_IMAGE_21 = {
    "transformer_blocks.0.img_mlp.gate_up": (4 * H, H),
    "transformer_blocks.0.txt_mlp.gate_up": (4 * H, H),
    "transformer_blocks.0.img_mlp.down": (H, 2 * H),
    "transformer_blocks.0.attn.to_q": (H, H),
}


def _pair(seed: int, out: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(seed, 2, inputs), draw(seed + 50, out, 2)


def _named(stem: str, leaves: Iterable[str], pair: tuple[np.ndarray, np.ndarray]) -> Arrays:
    return {f"{stem}.{leaf}": value for leaf, value in zip(leaves, pair, strict=True)}


def _pipeline(folder: Path, encoders: dict[str, tuple[str, Modules]]) -> Path:
    index: dict[str, object] = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    parts: dict[str, tuple[dict[str, str], Modules]] = {"transformer": ({"_class_name": "WanTransformer3DModel"}, WAN)}
    for name, (kind, modules) in encoders.items():
        parts[name] = ({"model_type": kind}, modules)
        index[name] = ["transformers", "Model"]
    for seed, (name, (config, modules)) in enumerate(parts.items()):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        file = "diffusion_pytorch_model.safetensors" if name == "transformer" else "model.safetensors"
        weights = {f"{module}.weight": draw(seed * 10 + i, *shape) for i, (module, shape) in enumerate(modules.items())}
        save_file(weights, folder / name / file)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _single(folder: Path, modules: Modules, prefix: str = "") -> Path:
    weights = {f"{prefix}{module}.weight": draw(i, *shape) for i, (module, shape) in enumerate(modules.items())}
    save_file(weights, folder / "base.safetensors")
    return folder / "base.safetensors"


def _weights(path: Path) -> Arrays:
    if path.is_file():
        return load_file(path)
    files = {file.parent.relative_to(path).as_posix(): file for file in path.rglob("*.safetensors")}
    return {f"{part}/{k}".removeprefix("./"): v for part, file in files.items() for k, v in load_file(file).items()}


def _merge(base: Path, tensors: Arrays, out: Path) -> tuple[Arrays, str]:
    """What a merge adds to weights, and the family that the file tells."""
    save_file(tensors, out.with_suffix(".safetensors"))
    adapter = read_adapter(out.with_suffix(".safetensors"))
    merge(base, adapter, output=out)
    before, after = _weights(base), _weights(out)
    assert before.keys() == after.keys()
    return {k: after[k] - v for k, v in before.items() if not np.array_equal(after[k], v)}, adapter.provenance.family


def _same(got: Arrays, wanted: Arrays) -> bool:
    return got.keys() == wanted.keys() and all(np.allclose(got[k], value, atol=1e-5) for k, value in wanted.items())


ENCODERS: dict[str, tuple[dict[str, tuple[str, Modules]], dict[str, str]]] = {
    "qwen": ({"text_encoder": QWEN}, {"text_encoders.qwen3_06b.transformer.": "text_encoder"}),
    "an encoder of any name": ({"text_encoder": QWEN}, {"text_encoders.new_llm_9b.transformer.": "text_encoder"}),
    "t5 of Flux": (
        {"text_encoder": CLIP, "text_encoder_2": T5},
        {"text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.t5xxl.transformer.": "text_encoder_2"},
    ),
    "t5 of SD3": (
        {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
        {"text_encoders.clip_g.transformer.": "text_encoder_2", "text_encoders.t5xxl.transformer.": "text_encoder_3"},
    ),
    "umt5 of Wan": ({"text_encoder": UMT5}, {"text_encoders.umt5xxl.transformer.": "text_encoder"}),
}


@pytest.mark.parametrize("with_denoiser", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_of_comfyui(name: str, with_denoiser: bool, tmp_path: Path) -> None:
    encoders, keys = ENCODERS[name]
    base = _pipeline(tmp_path / "base", encoders)
    tensors: Arrays = {}
    wanted: Arrays = {}
    for seed, (prefix, component) in enumerate(keys.items()):
        for module, shape in encoders[component][1].items():
            down, up = _pair(seed, *shape)
            tensors |= _named(f"{prefix}{module}", AB, (down, up))
            wanted[f"{component}/{module}.weight"] = up @ down
    if with_denoiser:
        down, up = _pair(9, H, H)
        tensors |= _named("diffusion_model.blocks.0.self_attn.q", AB, (down, up))
        wanted["transformer/blocks.0.self_attn.q.weight"] = up @ down
    got, _ = _merge(base, tensors, tmp_path / "out")
    assert _same(got, wanted)


FILES: dict[str, tuple[Modules, str, dict[str, str], tuple[str, str], str]] = {
    "Anima, net. in the file": (ANIMA, "", {"net.blocks.0.self_attn.q_proj": "blocks.0.self_attn.q_proj"}, AB, "Anima"),
    "Anima, net. in the base": (ANIMA, "net.", {"diffusion_model.blocks.0.self_attn.q_proj": "blocks.0.self_attn.q_proj"}, AB, "Anima"),
    "Anima, net. in both": (ANIMA, "net.", {f"net.{m}": m for m in ("blocks.0.mlp.layer1", "blocks.0.self_attn.q_proj")}, AB, "Anima"),
    "HiDream O1": (HIDREAM, "", {f"model.{m}": m for m in HIDREAM}, AB, ""),
    "HiDream O1's base": (HIDREAM, "model.", {m: m for m in HIDREAM}, AB, "HiDream"),
    "diffusion-pipe's HunyuanVideo": (HUNYUAN, "", {f"transformer.{m}": m for m in TRAINED}, AB, "Flux or HunyuanVideo"),
    "VideoX-Fun": (WAN, "", {"lora_unet__blocks_0_self_attn_q": "blocks.0.self_attn.q"}, DOWN_UP, "Wan"),
    "SimpleTuner": (WAN, "", {"lycoris_blocks_0_ffn_0": "blocks.0.ffn.0"}, DOWN_UP, "Wan"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_prefixes_and_original_names(name: str, tmp_path: Path) -> None:
    modules, prefix, stems, leaves, family = FILES[name]
    base = _single(tmp_path, modules, prefix)
    tensors: Arrays = {}
    wanted: Arrays = {}
    for seed, (stem, module) in enumerate(stems.items()):
        down, up = _pair(seed, *modules[module])
        tensors |= _named(stem, leaves, (down, up))
        wanted[f"{prefix}{module}.weight"] = up @ down
    got, told = _merge(base, tensors, tmp_path / "out")
    assert _same(got, wanted)
    assert family in told


def test_halves_of_a_fused_weight_have_names_of_their_own(tmp_path: Path) -> None:
    base = _single(tmp_path, QWEN_IMAGE_21)
    stem = "diffusion_model.transformer_blocks.0.img_mlp"
    gate, up = _pair(1, 2 * H, H), _pair(2, 2 * H, H)
    got, _ = _merge(base, _named(f"{stem}.gate_layer", AB, gate) | _named(f"{stem}.proj", AB, up), tmp_path / "out")
    wanted = {"transformer_blocks.0.img_mlp.gate_up.weight": np.concatenate([gate[1] @ gate[0], up[1] @ up[0]])}
    assert _same(got, wanted)


@pytest.mark.parametrize("clip", [CLIP, NEW_CLIP], ids=["published names", "names of transformers 5"])
@pytest.mark.parametrize(
    ("target", "prefixes"),
    [
        ("comfyui", ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")),
        ("omi", ("clip_l.", "t5.")),
    ],
)
def test_text_encoders_are_written_by_their_types(
    target: str, prefixes: tuple[str, str], clip: tuple[str, Modules], tmp_path: Path
) -> None:
    base = _pipeline(tmp_path / "base", {"text_encoder": clip, "text_encoder_2": T5})
    stems = (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    )
    tensors = {k: v for seed, stem in enumerate(stems) for k, v in _named(stem, DOWN_UP, _pair(seed, H, H)).items()}
    save_file(tensors, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", target, output=tmp_path / "x.safetensors", base=base)
    modules = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "x.safetensors") if ".lora_" in key}
    assert modules == {f"{prefix}{next(iter(kind[1]))}" for prefix, kind in zip(prefixes, (CLIP, T5), strict=True)}
    for file in ("kohya", "x"):
        merge(base, tmp_path / f"{file}.safetensors", output=tmp_path / file)
    one, two = _weights(tmp_path / "kohya"), _weights(tmp_path / "x")
    assert all(np.array_equal(one[key], value) for key, value in two.items())


def test_omi_numbers_the_parts_of_hunyuan_videos_fused_weights(tmp_path: Path) -> None:
    base = _single(tmp_path, HUNYUAN)
    key, first, mlp = _pair(1, H, H), _pair(2, 4 * H, H), _pair(3, 4 * H, H)
    tensors = _named("transformer.double_blocks.0.img_attn_qkv.1", DOWN_UP, key)
    tensors |= _named("transformer.double_blocks.0.txt_mlp.fc0", DOWN_UP, first)  # OMI's name of fc1
    tensors |= _named("transformer.single_blocks.0.linear1.3", DOWN_UP, mlp)
    time = _pair(4, H, H)
    tensors |= _named("transformer.txt_in.t_embedder.linear_1", DOWN_UP, time)  # and of mlp.0
    got, _ = _merge(base, tensors, tmp_path / "out")
    of_key, of_mlp = np.zeros((3 * H, H)), np.zeros((7 * H, H))
    of_key[H : 2 * H], of_mlp[3 * H :] = key[1] @ key[0], mlp[1] @ mlp[0]
    wanted = {
        "double_blocks.0.img_attn_qkv.weight": of_key,
        "double_blocks.0.txt_mlp.fc1.weight": first[1] @ first[0],
        "txt_in.t_embedder.mlp.0.weight": time[1] @ time[0],
        "single_blocks.0.linear1.weight": of_mlp,
    }
    assert _same(got, wanted)
    convert(tmp_path / "out.safetensors", "omi", output=tmp_path / "again.safetensors", base=base)
    assert load_file(tmp_path / "again.safetensors").keys() >= tensors.keys()


def test_a_number_beyond_the_parts_is_no_name(tmp_path: Path) -> None:
    base = _single(tmp_path, HUNYUAN)
    save_file(_named("transformer.double_blocks.0.img_attn_qkv.3", DOWN_UP, _pair(1, H, H)), tmp_path / "x.safetensors")
    with pytest.raises(FitError, match="has no parameter"):
        merge(base, tmp_path / "x.safetensors", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "prefixes"),
    [
        ("comfyui", ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")),
        ("diffusers", ("text_encoder.", "text_encoder_2.")),
        ("kohya", ("lora_te1_", "lora_te3_")),
        ("omi", ("clip_l.", "t5.")),
    ],
)
def test_text_encoders_in_one_file_are_written_by_its_names(
    target: str, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    """sd-scripts numbers T5 the third; Flux has it second, and a file that ComfyUI saved has no configuration that says so."""
    stored = {
        f"text_encoders.{name}.transformer.{module}.weight": np.ones(shape, np.float32)
        for name, (_, modules) in (("clip_l", CLIP), ("t5xxl", T5))
        for module, shape in modules.items()
    }
    denoiser = {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": np.ones((H, H), np.float32)}
    save_file({**stored, **denoiser}, tmp_path / "base.safetensors")
    modules = [next(iter(modules)) for _, modules in (CLIP, T5)]
    tensors = {
        key: value
        for seed, (prefix, module) in enumerate(zip(("lora_te1_", "lora_te3_"), modules, strict=True))
        for key, value in _named(f"{prefix}{module.replace('.', '_')}", DOWN_UP, _pair(seed, H, H)).items()
    }
    source, out = tmp_path / "kohya.safetensors", tmp_path / "x.safetensors"
    save_file(tensors, source)
    convert(source, target, output=out, base=tmp_path / "base.safetensors")
    written = {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key}
    flat = target == "kohya"
    assert written == {
        f"{prefix}{module.replace('.', '_') if flat else module}"
        for prefix, module in zip(prefixes, modules, strict=True)
    }
    for file in (source, out):
        merge(tmp_path / "base.safetensors", file, output=tmp_path / file.stem)
    one, two = (load_file(tmp_path / file.stem / "base.safetensors") for file in (source, out))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert sum(not np.array_equal(one[key], value) for key, value in stored.items()) == 2
