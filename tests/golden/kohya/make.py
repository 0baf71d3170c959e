# SPDX-License-Identifier: Apache-2.0
"""Makes the kohya (sd-scripts) golden files: two tiny diffusion pipelines, LoRA files for them, their effect.

Run it from this folder, in an environment with torch, diffusers, transformers and peft (see ../README.md)::

    python make.py

It rewrites ``sd1/``, ``sdxl/`` and ``expected.json``. Every expected weight is W' = W + delta by the
equations of the format, computed in float64 from the files on disk; the block table is written out below, not
derived from any library. Then diffusers loads and fuses the same file: where it agrees within 1e-6 of
max|delta| the weight *diffusers* made is what is stored, elsewhere the formula's, and ``expected.json`` says
which, and how far diffusers is off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]

UNETS: dict[str, dict[str, Any]] = {
    # SD1: 1x1 convolutions as proj_in/proj_out, attention in the first level.
    "sd1": {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    # SDXL: linear proj_in/proj_out, no attention in the first level, added conditioning.
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 24,
        "attention_head_dim": (1, 2),
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
    },
}
# What sits where in the SDXL UNet above (layers_per_block 2) under the names of the original (sgm) code.
SGM = {
    "conv_in": "input_blocks_0_0",
    "down_blocks_0_resnets_0": "input_blocks_1_0",
    "down_blocks_0_resnets_1": "input_blocks_2_0",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op",
    "down_blocks_1_resnets_0": "input_blocks_4_0",
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_resnets_1": "input_blocks_5_0",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "mid_block_resnets_0": "middle_block_0",
    "mid_block_attentions_0": "middle_block_1",
    "mid_block_resnets_1": "middle_block_2",
    "up_blocks_0_resnets_0": "output_blocks_0_0",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_resnets_1": "output_blocks_1_0",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
    "up_blocks_0_resnets_2": "output_blocks_2_0",
    "up_blocks_0_attentions_2": "output_blocks_2_1",
    "up_blocks_0_upsamplers_0_conv": "output_blocks_2_2_conv",
    "up_blocks_1_resnets_0": "output_blocks_3_0",
    "up_blocks_1_resnets_1": "output_blocks_4_0",
    "up_blocks_1_resnets_2": "output_blocks_5_0",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
    "conv_out": "out_2",
}
SGM_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def sgm_name(flat: str) -> str:
    """``down_blocks_1_resnets_0_conv1`` -> ``input_blocks_4_0_in_layers_2``."""
    for ours, theirs in SGM.items():
        if flat == ours:
            return theirs
        if flat.startswith(f"{ours}_"):
            rest = flat.removeprefix(f"{ours}_")
            return f"{theirs}_{SGM_RESNET.get(rest, rest) if 'resnets' in ours else rest}"
    raise KeyError(flat)


def fill(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """The same names and shapes with seeded values (norm weights near 1); position_ids are left out."""
    out: Tensors = {}
    for key in sorted(tensors):
        if key.endswith("position_ids"):
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(tensors[key].shape)))
        is_norm = "norm" in key and key.endswith(".weight")
        out[key] = (1 + 0.1 * noise if is_norm else 0.3 * noise).float()
    return out


def make_pipeline(name: str) -> None:
    """Writes ``<name>/base``, a diffusers pipeline folder; text encoders have the names found in the wild."""
    rng = np.random.default_rng(sum(name.encode()))
    base = HERE / name / "base"
    unet = UNet2DConditionModel(**UNETS[name])
    unet.load_state_dict(fill(unet.state_dict(), rng))
    unet.save_pretrained(base / "unet")
    text: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 22,
        "eos_token_id": 23,
        "pad_token_id": 23,
    }
    encoders: dict[str, Any] = {"text_encoder": CLIPTextModel(CLIPTextConfig(**text, projection_dim=16))}
    if name == "sdxl":
        wide = text | {"hidden_size": 8, "intermediate_size": 12, "hidden_act": "gelu", "projection_dim": 16}
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**wide))
    for component, model in encoders.items():
        model.save_pretrained(base / component)
        # transformers 5 writes CLIPTextModel without the level every published checkpoint has.
        named = {
            k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
            for k, v in model.state_dict().items()
        }
        save_file(fill(named, rng), base / component / "model.safetensors", metadata={"format": "pt"})
    scheduler: Any = DDIMScheduler
    scheduler().save_pretrained(base / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
        "tokenizer": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    index |= {c: ["transformers", type(m).__name__] for c, m in encoders.items()}
    if name == "sdxl":
        index |= {"tokenizer_2": [None, None], "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (base / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for config in base.glob("*/*.json"):  # drop what depends on the machine
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def base_weights(name: str) -> Tensors:
    """``component/tensor`` -> weight on disk."""
    out: Tensors = {}
    for folder in sorted((HERE / name / "base").iterdir()):
        for file in folder.glob("*.safetensors"):
            out |= {f"{folder.name}/{k}": v for k, v in load_file(file).items()}
    return out


@dataclass(frozen=True)
class Module:
    """One adapted module: where it is in the base and what it is called in the file."""

    target: str  # component/tensor name of the weight
    key: str  # lora_unet_..., lora_te_...
    rank: int
    alpha: float | None  # None: no alpha tensor, which means alpha = rank
    mid: bool = False  # LoCon: a lora_mid core holds the kernel
    magnitude: str = ""  # "out" or "in": a dora_scale along that axis


def modules(
    name: str,
    wanted: Callable[[str], bool],
    *,
    rank: int,
    alpha: float | None,
    sgm: bool = False,
    **extra: Any,
) -> list[Module]:
    """Every Linear/Conv weight of the base whose ``component/module`` is wanted, with its sd-scripts key."""
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if name == "sdxl" else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    out = []
    for full, weight in base_weights(name).items():
        component, tensor = full.split("/")
        module = tensor.removesuffix(".weight")
        if weight.ndim < 2 or not tensor.endswith(".weight") or not wanted(f"{component}/{module}"):
            continue
        flat = module.replace(".", "_")
        flat = sgm_name(flat) if sgm and component == "unet" else flat
        out.append(Module(full, f"{prefixes[component]}_{flat}", rank, alpha, **extra))
    if not out:
        raise ValueError("nothing matched")
    return out


def make_file(name: str, parts: list[Module], seed: int, dtype: torch.dtype) -> Tensors:
    """Random factors under sd-scripts' keys, seeded per target: two spellings hold the same numbers."""
    base, out = base_weights(name), Tensors()
    for part in parts:
        weight = base[part.target]
        digest = hashlib.sha256(f"{seed} {part.target}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))

        def draw(*shape: int, rng: np.random.Generator = rng) -> torch.Tensor:
            return torch.from_numpy(0.5 * rng.standard_normal(shape)).to(dtype)

        rows, columns, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
        ones = (1,) * len(kernel)
        if part.alpha is not None:
            out[f"{part.key}.alpha"] = torch.tensor(part.alpha, dtype=dtype)
        if part.mid:
            out[f"{part.key}.lora_mid.weight"] = draw(part.rank, part.rank, *kernel)
            out[f"{part.key}.lora_down.weight"] = draw(part.rank, columns, *ones)
        else:
            out[f"{part.key}.lora_down.weight"] = draw(part.rank, columns, *kernel)
        out[f"{part.key}.lora_up.weight"] = draw(rows, part.rank, *ones)
        if part.magnitude:
            length = rows if part.magnitude == "out" else columns
            size = (rows, 1, *ones) if part.magnitude == "out" else (1, columns, *ones)
            over = tuple(d for d in range(weight.ndim) if d != (0 if part.magnitude == "out" else 1))
            norm = torch.linalg.vector_norm(weight.double(), dim=over).float()
            out[f"{part.key}.dora_scale"] = (norm * (1 + 0.3 * draw(length).float())).reshape(size).to(dtype)
    return out


def formula(name: str, parts: list[Module], tensors: Tensors) -> Tensors:
    """W' in float64: W + (alpha/r) up.down, with a core up.mid.down, with a magnitude m V / ||V||."""
    base, out = base_weights(name), Tensors()
    for part in parts:
        weight = base[part.target].double()
        down, up = (tensors[f"{part.key}.lora_{n}.weight"].double() for n in ("down", "up"))
        rank = down.shape[0]
        alpha = tensors.get(f"{part.key}.alpha")
        scale = (float(alpha) if alpha is not None else rank) / rank
        if part.mid:
            mid = tensors[f"{part.key}.lora_mid.weight"].double()
            delta = torch.einsum("mn...,im,nj->ij...", mid, up.flatten(1), down.flatten(1))
        else:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        new = weight + scale * delta
        if part.magnitude:
            m = tensors[f"{part.key}.dora_scale"].double()
            over = tuple(d for d in range(weight.ndim) if d != (0 if part.magnitude == "out" else 1))
            new = m * new / torch.linalg.vector_norm(new, dim=over, keepdim=True)
        out[part.target] = new
    return out


def save_stable(tensors: Tensors, file: Path, notes: dict[str, str]) -> None:
    """Like ``save_file``, but with the metadata in one order: the library's changes from run to run."""
    blob = save(tensors, notes)
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + size :])


def metadata(name: str, tensors: Tensors, dim: int, alpha: float, module: str, args: dict[str, str]) -> dict[str, str]:
    """The ss_* notes sd-scripts leaves, with its two hashes of the bytes after the header."""
    notes = {
        "ss_base_model_version": "sdxl_base_v1-0" if name == "sdxl" else "sd_v1",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(args),
        "ss_network_dim": str(dim),
        "ss_network_module": module,
        "ss_output_name": "golden",
        "ss_tag_frequency": json.dumps({"10_golden": {'a "quoted" tag': 3, "wörter": 1}}),
        "ss_v2": "False",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if name == 'sdxl' else 'v1'}/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "golden",
    }
    blob = save(tensors, notes)
    data = blob[8 + int.from_bytes(blob[:8], "little") :]
    notes["sshs_model_hash"] = hashlib.sha256(data).hexdigest()
    notes["sshs_legacy_hash"] = hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    return notes


def attention(path: str) -> bool:
    """What sd-scripts trains by default: Linear and 1x1 of the transformers, the text encoders' layers."""
    return (path.startswith("unet/") and "attentions" in path) or ".encoder.layers." in path


def small(path: str) -> bool:
    """A few modules of each kind."""
    return path in {
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet/down_blocks.0.attentions.0.proj_in",
        "unet/down_blocks.0.resnets.0.conv1",
        "unet/down_blocks.1.resnets.0.conv_shortcut",
        "unet/mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "text_encoder/text_model.encoder.layers.1.mlp.fc2",
        # diffusers takes the attention of a text encoder only if some out_proj is there (measured)
        "text_encoder/text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder/text_model.encoder.layers.0.self_attn.out_proj",
    }


def convolution(path: str) -> bool:
    """3x3 convolutions of one level and its resampler."""
    return path in {
        "unet/down_blocks.0.resnets.0.conv1",
        "unet/down_blocks.0.resnets.1.conv2",
        "unet/down_blocks.0.downsamplers.0.conv",
        "unet/up_blocks.0.upsamplers.0.conv",
    }


def outside(path: str) -> bool:
    """SDXL: what lies outside the numbered blocks, and one of every kind inside them."""
    return path in {
        "unet/conv_in",
        "unet/conv_out",
        "unet/time_embedding.linear_1",
        "unet/time_embedding.linear_2",
        "unet/add_embedding.linear_1",
        "unet/add_embedding.linear_2",
    }


def blocks(path: str) -> bool:
    """SDXL: resnets, resamplers and attention of every numbered block, the light half of them."""
    return path.startswith("unet/") and any(
        part in path
        for part in (
            "conv_shortcut",
            "time_emb_proj",
            "samplers.0.conv",
            "attn1.to_q",
            "attn2.to_out",
            "proj_in",
            "mid_block.resnets.0.conv1",
            "down_blocks.0.resnets.1.conv2",
        )
    )


def cases() -> dict[str, tuple[str, list[Module], torch.dtype]]:
    """File -> (pipeline, modules, dtype)."""

    def te(path: str) -> bool:
        return path.startswith("text_encoder")

    def linear(path: str) -> bool:
        return small(path) and "resnets" not in path and "proj_in" not in path

    f32, f16 = torch.float32, torch.float16
    mixed = modules("sd1", linear, rank=3, alpha=1.5) + modules("sd1", convolution, rank=2, alpha=4.0)
    mixed += modules("sd1", lambda p: p == "unet/down_blocks.0.attentions.0.proj_in", rank=4, alpha=None)
    mixed += modules("sd1", lambda p: p.endswith("layers.0.mlp.fc1"), rank=4, alpha=None)
    mixed += modules("sd1", lambda p: p.endswith("layers.0.self_attn.k_proj"), rank=2, alpha=8.0)
    partial = modules("sd1", lambda p: te(p) and p.endswith(("q_proj", "v_proj")), rank=2, alpha=1.0)
    xl_te = modules("sdxl", lambda p: te(p) and "layers.1" in p, rank=2, alpha=1.0)
    xl_mixed = modules("sdxl", lambda p: p.endswith("attentions.0.transformer_blocks.1.attn2.to_v"), rank=3, alpha=6.0)
    xl_mixed += modules(
        "sdxl", lambda p: p.endswith("attentions.0.transformer_blocks.1.attn1.to_q"), rank=2, alpha=None
    )
    xl_mixed += modules("sdxl", lambda p: te(p) and p.endswith("layers.0.mlp.fc1"), rank=2, alpha=0.5)
    xl_mixed += modules("sdxl", lambda p: te(p) and p.endswith("layers.0.mlp.fc2"), rank=3, alpha=2.0)
    xl_mixed += modules("sdxl", lambda p: p == "text_encoder_2/text_projection", rank=2, alpha=1.0)
    return {
        "sd1/lora": ("sd1", modules("sd1", attention, rank=2, alpha=1.0), f32),
        "sd1/lora-fp16": ("sd1", modules("sd1", linear, rank=2, alpha=1.0), f16),
        "sd1/lora-noalpha": ("sd1", modules("sd1", linear, rank=2, alpha=None), f32),
        "sd1/conv": (
            "sd1",
            modules("sd1", lambda p: convolution(p) or (small(p) and "unet/" in p), rank=2, alpha=3.0),
            f32,
        ),
        "sd1/mixed": ("sd1", mixed, f32),
        "sd1/te-partial": ("sd1", partial, f32),
        "sd1/mid": (
            "sd1",
            modules("sd1", convolution, rank=3, alpha=1.0, mid=True) + modules("sd1", linear, rank=2, alpha=1.0),
            f32,
        ),
        "sd1/dora": ("sd1", modules("sd1", small, rank=2, alpha=1.0, magnitude="out"), f32),
        "sd1/dora-in": ("sd1", modules("sd1", small, rank=2, alpha=1.0, magnitude="in"), f32),
        "sdxl/sgm-names": (
            "sdxl",
            modules("sdxl", blocks, rank=2, alpha=1.0, sgm=True)
            + modules("sdxl", outside, rank=2, alpha=1.0, sgm=True)
            + xl_te,
            f32,
        ),
        "sdxl/diffusers-names": (
            "sdxl",
            modules("sdxl", blocks, rank=2, alpha=1.0) + modules("sdxl", outside, rank=2, alpha=1.0) + xl_te,
            f32,
        ),
        "sdxl/mixed": ("sdxl", xl_mixed, f32),
    }


def make_peft(folder: Path, component: str) -> None:
    """A PEFT adapter for one component of sd1, made and merged by PEFT; one module has its own rank.

    In the UNet it has its own alpha too: diffusers loses those of a text encoder with transformers 5.

    The text encoder's module names are transformers 5's (no ``text_model.``): what PEFT writes with it.
    """
    base = base_weights("sd1")
    home = HERE / "sd1/base" / component
    if component == "unet":
        model: Any = UNet2DConditionModel.from_pretrained(home)
        targets, special = (
            ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut"],
            "mid_block.attentions.0.proj_in",
        )
    else:
        model = CLIPTextModel.from_pretrained(home)
        targets, special = ["q_proj", "out_proj", "fc2"], "encoder.layers.1.mlp.fc2"
    torch.manual_seed(3)
    alphas = {special: 1} if component == "unet" else {}
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets,
        rank_pattern={special: 3},
        alpha_pattern=alphas,
        init_lora_weights=False,
    )
    tuned: Any = get_peft_model(model, config)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = "sd1/base"
    values["target_modules"] = sorted(values["target_modules"])  # PEFT keeps a set
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    stored, tensors = Tensors(), load_file(folder / "adapter_model.safetensors")
    for name, value in tuned.merge_and_unload().state_dict().items():
        target = f"{component}/{name}" if f"{component}/{name}" in base else f"{component}/text_model.{name}"
        if torch.equal(value, base[target]):
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = tensors[f"{stem}A.weight"].double(), tensors[f"{stem}B.weight"].double()
        scale = alphas.get(special, 3) / 3 if special in name else 3 / 2
        delta = scale * (b.flatten(1) @ a.flatten(1)).reshape(value.shape)
        error = (value.double() - base[target].double() - delta).abs().max() / delta.abs().max()
        if error > 1e-6:
            sys.exit(f"{folder}: PEFT's {name} differs from the formula by {error:.1e}")
        stored[target] = value
    if 2 * len(stored) != len(tensors):
        sys.exit(f"{folder}: {len(stored)} weights changed by {len(tensors)} tensors")
    save_file(stored, folder.with_name(f"{folder.name}-expected.safetensors"), metadata={"format": "pt"})
    print(folder.name, len(tensors), "tensors,", len(stored), "weights")


def make_case(case: str, name: str, parts: list[Module], dtype: torch.dtype) -> dict[str, Any]:
    """Writes one LoRA file and what it does; returns its entry for expected.json."""
    sys.path.insert(0, str(HERE.parent))
    from peer_check import fuse_diffusers  # the code that later judges converted files

    folder = HERE / case
    folder.mkdir(parents=True)
    tensors = make_file(name, parts, 7 if name == "sd1" else 11, dtype)
    network = "lycoris.kohya" if any(p.magnitude or p.mid for p in parts) else "networks.lora"
    notes = metadata(name, tensors, parts[0].rank, parts[0].alpha or parts[0].rank, network, {})
    save_stable(tensors, folder / "adapter.safetensors", notes)
    wanted = formula(name, parts, load_file(folder / "adapter.safetensors"))
    base = base_weights(name)
    try:
        fused, said = fuse_diffusers(HERE / name / "base", folder / "adapter.safetensors")
    except ValueError as refusal:  # what the peer refuses is a fact worth recording
        fused, said = {}, [f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:160]}"]
    stored, off = Tensors(), dict[str, float]()
    for target, value in wanted.items():
        size = (value - base[target].double()).abs().max()
        got = torch.from_numpy(fused[target].copy()) if target in fused else None
        error = float((got.double() - value).abs().max() / size) if got is not None else float("inf")
        stored[target] = got if got is not None and error <= 1e-6 else value.float()
        if got is not None and error > 1e-6:
            off[target] = round(error, 3)
    also = sorted(k for k, v in fused.items() if k not in wanted and not np.array_equal(v, base[k].numpy()))
    if also:
        sys.exit(f"{case}: diffusers changed more: {also}")
    expected = folder / "expected.safetensors"
    if case == "sdxl/diffusers-names":  # the same numbers as sdxl/sgm-names under other keys: stored once
        expected = HERE / "sdxl/sgm-names/expected.safetensors"
        other = load_file(expected)
        for target, value in wanted.items():
            size = (value - base[target].double()).abs().max()
            if (other[target].double() - value).abs().max() > 1e-6 * size:
                sys.exit(f"{case}: {target} differs from sgm-names")
    else:
        save_file(stored, expected, metadata={"format": "pt"})
    print(
        case,
        len(tensors),
        "tensors,",
        len(stored),
        "weights, diffusers:",
        "refuses" if not fused else f"wrong for {len(off)}",
        said[:1],
    )
    return {
        "base": f"{name}/base",
        "expected": expected.relative_to(HERE).as_posix(),
        "weights": len(stored),
        "source": "diffusers" if fused and not off else "formula" if not fused or len(off) == len(stored) else "both",
        "diffusers_refuses": not fused,
        "diffusers_wrong": off,
        "diffusers_said": said,
    }


def main() -> None:
    """Makes everything anew."""
    for name in UNETS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        make_pipeline(name)
    make_peft(HERE / "sd1/peft-unet", "unet")
    make_peft(HERE / "sd1/peft-text-encoder", "text_encoder")
    files = {case: make_case(case, *arguments) for case, arguments in cases().items()}
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    report = {"versions": {p: version(p) for p in packages}, "files": files}
    (HERE / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
