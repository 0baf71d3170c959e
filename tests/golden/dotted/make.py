# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files with dotted names: diffusers old and new, Lightning, LightX2V, DiffSynth; and what their readers do.

Run it from this folder, in an environment with torch, diffusers and peft (see ../README.md)::

    python make.py            # rewrites the folders and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here

diffusers 0.42 (PEFT for DiffSynth) loads each file into a tiny network; expected weights are then measured: every layer with an
adapter is given the unit vectors, in float32. What diffusers drops on the way (differences of norms) is not in its files.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.lora_pipeline import (
    FluxLoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    WanLoraLoaderMixin,
)
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]

FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
QWEN = {
    "in_channels": 4, "out_channels": 1, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16,
    "num_layers": 1, "cross_attn_norm": True,
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 2,
    "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
# Wan's own names of what diffusers calls otherwise, in files of LightX2V and ComfyUI
WAN_NAMES = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


def seeded(kind: type[nn.Module], config: dict[str, object]) -> nn.Module:
    """A tiny network with seeded weights."""
    torch.manual_seed(3)
    model = kind(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def pair(out: int, inputs: int, rank: int) -> Tensors:
    return {"down": 0.5 * torch.randn(rank, inputs), "up": 0.5 * torch.randn(out, rank)}


def measured(model: nn.Module) -> Tensors:
    """Weights and biases of the layers with an adapter, by what they answer to unit inputs."""
    found: Tensors = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.base_layer
        linear = isinstance(base, nn.Linear)
        shape = (base.in_features,) if linear else (base.in_channels, *base.kernel_size)
        size = math.prod(shape)
        zero = layer(torch.zeros(1, *shape)).reshape(-1)
        answers = layer(torch.eye(size).reshape(size, *shape)).reshape(size, len(zero))
        found[f"{path}.weight"] = (answers - zero).T.reshape(base.weight.shape)
        if base.bias is not None and not torch.allclose(zero, base.bias, atol=1e-6):
            found[f"{path}.bias"] = zero
    return {name: value.detach() for name, value in found.items()}


def linears(model: nn.Module, *ends: str) -> Iterator[tuple[str, nn.Linear]]:
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(ends):
            yield path, layer


def diffusers_new(folder: Path) -> tuple[Tensors, Tensors]:
    """Saved by diffusers itself: lora_A and lora_B, ranks and alphas with patterns in the header."""
    model = seeded(FluxTransformer2DModel, FLUX)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "ff.net.0.proj", "proj_out"],
        rank_pattern={"single_transformer_blocks.0.proj_out": 2}, alpha_pattern={"single_transformer_blocks.0.proj_out": 6},
    )  # fmt: skip
    model.add_adapter(config, adapter_name="default")
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.5 * torch.randn_like(parameter))
    expected = measured(model)
    layers = get_peft_model_state_dict(model)
    meta = {"transformer_lora_adapter_metadata": config.to_dict()}
    meta["transformer_lora_adapter_metadata"]["target_modules"] = sorted(config.target_modules)
    FluxLoraLoaderMixin.save_lora_weights(folder, transformer_lora_layers=layers, **meta)
    return base_of(FluxTransformer2DModel, FLUX), expected


def diffusers_old(folder: Path, spell: Callable[[str], tuple[str, str]]) -> tuple[Tensors, Tensors]:
    """Keys of older releases, which diffusers still reads."""
    model = seeded(UNet2DConditionModel, UNET)
    torch.manual_seed(12)
    tensors: Tensors = {}
    for path, layer in linears(model, "attn1.to_q", "attn2.to_k", "attn2.to_out.0"):
        factors = pair(layer.out_features, layer.in_features, 2)
        down, up = spell(f"unet.{path}")
        tensors |= {down: factors["down"], up: factors["up"]}
    save(tensors, folder / "pytorch_lora_weights.safetensors")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=model.config)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, model)
    return base_of(UNet2DConditionModel, UNET), measured(model)


def lora_down(folder: Path) -> tuple[Tensors, Tensors]:
    return diffusers_old(folder, lambda stem: (f"{stem}.lora.down.weight", f"{stem}.lora.up.weight"))


def processors(folder: Path) -> tuple[Tensors, Tensors]:
    def spell(stem: str) -> tuple[str, str]:
        block, _, part = stem.removesuffix(".0").rpartition(".")
        return f"{block}.processor.{part}_lora.down.weight", f"{block}.processor.{part}_lora.up.weight"

    return diffusers_old(folder, spell)


def lightning(folder: Path) -> tuple[Tensors, Tensors]:
    """Bare names, lora_down and lora_up, an alpha of 8 at rank 4."""
    model = seeded(QwenImageTransformer2DModel, QWEN)
    torch.manual_seed(13)
    tensors: Tensors = {}
    for path, layer in linears(model, "attn.to_q", "attn.add_k_proj", "img_mlp.net.0.proj", "txt_mod.1"):
        factors = pair(layer.out_features, layer.in_features, 4)
        tensors |= {f"{path}.lora_down.weight": factors["down"], f"{path}.lora_up.weight": factors["up"]}
        tensors[f"{path}.alpha"] = torch.tensor(8.0)
    save(tensors, folder / "adapter.safetensors")
    state = QwenImageLoraLoaderMixin.lora_state_dict(dict(tensors))
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, model)
    return base_of(QwenImageTransformer2DModel, QWEN), measured(model)


def lightx2v(folder: Path) -> tuple[Tensors, Tensors]:
    """diffusion_model., lora_down and lora_up beside diff_b, under Wan's own names; the base has them as well."""
    model = seeded(WanTransformer3DModel, WAN)
    torch.manual_seed(14)
    tensors: Tensors = {}
    names = {}
    for path, layer in model.named_modules():
        theirs = next((path.replace(a, b) for a, b in WAN_NAMES.items() if path.endswith(a)), None)
        if theirs is None or not isinstance(layer, nn.Linear):
            continue
        names[path] = theirs
        factors = pair(layer.out_features, layer.in_features, 3)
        stem = f"diffusion_model.{theirs}"
        tensors |= {f"{stem}.lora_down.weight": factors["down"], f"{stem}.lora_up.weight": factors["up"]}
        tensors[f"{stem}.diff_b"] = 0.3 * torch.randn(layer.out_features)
    save(tensors, folder / "adapter.safetensors")
    state = WanLoraLoaderMixin.lora_state_dict(dict(tensors))
    WanLoraLoaderMixin.load_lora_into_transformer(state, model)

    def renamed(found: Tensors) -> Tensors:
        return {
            f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": v
            for n, v in found.items()
            if n.rpartition(".")[0] in names
        }

    return renamed(base_of(WanTransformer3DModel, WAN)), renamed(measured(model))


class Rows(nn.Module):
    """Layers under Wan's names: what DiffSynth wraps is a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"self_attn": nn.ModuleDict({"q": nn.Linear(12, 12), "o": nn.Linear(12, 12)})})]
        )


def diffsynth(folder: Path) -> tuple[Tensors, Tensors]:
    """PEFT's adapter name left in the keys, as DiffSynth's trainer exports them."""
    torch.manual_seed(15)
    model = Rows().requires_grad_(False)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["q", "o"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.5 * torch.randn_like(parameter))
    save({n: p.data for n, p in model.named_parameters() if "lora_" in n}, folder / "adapter.safetensors")
    return base, measured(model)


CASES = {
    "diffusers": diffusers_new,
    "diffusers-lora-down": lora_down,
    "diffusers-processors": processors,
    "lightning": lightning,
    "lightx2v": lightx2v,
    "diffsynth": diffsynth,
}


def base_of(kind: type[nn.Module], config: dict[str, object]) -> Tensors:
    return seeded(kind, config).state_dict()


def save(tensors: Tensors, path: Path) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def write(folder: Path) -> None:
    """Make everything in `folder`; of a base only the weights that change, and a few that do not."""
    for name, case in CASES.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        base, expected = case(place)
        for left in place.glob("pytorch_lora_weights.safetensors"):
            left.rename(place / "adapter.safetensors")
        kept = {key: value for key, value in base.items() if key in expected or "norm" in key or key.endswith("bias")}
        save(kept, place / "base.safetensors")
        save(expected, place / "expected.safetensors")
    report = {
        "versions": {p: version(p) for p in ("torch", "diffusers", "peft", "safetensors")},
        "files": sorted(CASES),
    }
    (folder / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


def differences(folder: Path) -> Iterator[str]:
    """Files in `folder` that are not those here."""
    for path in sorted(folder.rglob("*.safetensors")):
        mine, theirs = load_file(HERE / path.relative_to(folder)), load_file(path)
        if mine.keys() != theirs.keys() or not all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine):
            yield str(path.relative_to(folder))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as fresh:
            write(Path(fresh))
            sys.exit("\n".join(differences(Path(fresh))) or 0)
    write(HERE)
