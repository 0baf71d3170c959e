# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of diffusers, adapters of them, and the dense weights; run by the Python of an environment with diffusers.

``python denoisers.py FOLDER NAME ...`` writes, into FOLDER/NAME: ``pipeline``, with the denoiser and text encoders; ``peft``, a LoRA of
the denoiser that PEFT saved, and ``dense-peft``, the pipeline with it merged by PEFT; ``single.safetensors``, the denoiser in its
release's names, and ``original.safetensors``, a LoRA file in these names, with ``dense-original``. What tensors a release has, and how
high they are, our layouts say; which rows of which of them a parameter is, diffusers' own conversion of them. Where that has the widths
of the published model in it, there is none.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["FAMILIES", "Family", "denoiser_of", "given"]

TOKENS = 5


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        pipeline: Its class.
        model: The denoiser's class.
        sizes: Its configuration.
        given: What it is run on.
        network: Its family in the rules for names, and the function of diffusers' that converts a release.
    """

    pipeline: str
    model: str
    sizes: Mapping[str, Any]
    given: Callable[[Any], Mapping[str, Any]]
    network: tuple[str, str] | None = None


def draw(*sizes: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def _ids(count: int, axes: int) -> torch.Tensor:
    return torch.arange(count * axes).reshape(count, axes).float() % 4


def _unet(model: Any) -> Mapping[str, Any]:
    given: dict[str, Any] = {"sample": draw(1, 4, 8, 8), "timestep": 7}
    given["encoder_hidden_states"] = draw(1, TOKENS, model.config.cross_attention_dim, seed=2)
    if model.config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": draw(1, 16, seed=3), "time_ids": draw(1, 6, seed=4).abs()}
    return given


def _sd3(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, 4, 8, 8),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "pooled_projections": draw(1, c.pooled_projection_dim, seed=3),
        "timestep": torch.tensor([7.0]),
    }


def _flux(model: Any) -> Mapping[str, Any]:
    c, axes = model.config, len(model.config.axes_dims_rope)
    found = {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "timestep": torch.tensor([0.7]),
        "img_ids": _ids(16, axes),
        "txt_ids": _ids(TOKENS, axes),
    }
    if "pooled_projection_dim" in c:
        found["pooled_projections"] = draw(1, c.pooled_projection_dim, seed=3)
    if c.get("guidance_embeds"):
        found["guidance"] = torch.tensor([3.0])
    return found


def _wan(model: Any) -> Mapping[str, Any]:
    c = model.config
    found = {"hidden_states": draw(1, c.in_channels, 2, 4, 4), "timestep": torch.tensor([7])}
    found["encoder_hidden_states"] = draw(1, TOKENS, c.text_dim, seed=2)
    if c.image_dim:
        found["encoder_hidden_states_image"] = draw(1, 3, c.image_dim, seed=3)
    return found


def _qwen(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.joint_attention_dim, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 4, 4)]],
    }


def _z_image(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "x": [draw(c.in_channels, 1, 8, 8)],
        "t": torch.tensor([0.7]),
        "cap_feats": [draw(TOKENS, c.cap_feat_dim, seed=2)],
    }


def _hunyuan(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, c.in_channels, 1, 4, 4),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": draw(1, TOKENS, c.text_embed_dim, seed=2),
        "encoder_attention_mask": torch.ones(1, TOKENS),
        "pooled_projections": draw(1, c.pooled_projection_dim, seed=3),
        "guidance": torch.tensor([3.0]),
    }


def _ltx(model: Any) -> Mapping[str, Any]:
    c = model.config
    found = {
        "hidden_states": draw(1, 16, c.in_channels),
        "encoder_hidden_states": draw(1, TOKENS, c.caption_channels, seed=2),
        "timestep": torch.tensor([7]),
        "encoder_attention_mask": torch.ones(1, TOKENS),
    }
    return found | {"num_frames": 1, "height": 4, "width": 4}


def _lumina(model: Any) -> Mapping[str, Any]:
    c = model.config
    return {
        "hidden_states": draw(1, c.in_channels, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": draw(1, TOKENS, c.cap_feat_dim, seed=2),
        "encoder_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
    }


_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_XL: Mapping[str, Any] = {
    **_UNET,
    "block_out_channels": (32, 64, 64),
    "cross_attention_dim": 48,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
_FLUX: Mapping[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_STABLE = ("Stable Diffusion 1, 2 or XL", "convert_ldm_unet_checkpoint")
_LAYERS: Mapping[str, Any] = {"num_layers": 2, "num_attention_heads": 2}

FAMILIES: Mapping[str, Family] = {
    "sd15": Family("StableDiffusionPipeline", "UNet2DConditionModel", _UNET, _unet, _STABLE),
    "sdxl": Family("StableDiffusionXLPipeline", "UNet2DConditionModel", _XL, _unet, _STABLE),
    "sd3": Family(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            **_LAYERS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        _sd3,
        ("Stable Diffusion 3", "convert_sd3_transformer_checkpoint_to_diffusers"),
    ),
    "flux": Family(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 16, "guidance_embeds": True},
        _flux,
    ),
    "chroma": Family(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        _flux,
    ),
    "flux2": Family(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        _flux,
        ("Flux 2", "convert_flux2_transformer_checkpoint_to_diffusers"),
    ),
    "wan": Family(
        "WanPipeline",
        "WanTransformer3DModel",
        {
            **_LAYERS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 48,
            "rope_max_seq_len": 32,
        },
        _wan,
        ("Wan", "convert_wan_transformer_to_diffusers"),
    ),
    "wan-i2v": Family(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {
            **_LAYERS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 48,
            "rope_max_seq_len": 32,
            "image_dim": 24,
            "added_kv_proj_dim": 32,
        },
        _wan,
        ("Wan", "convert_wan_transformer_to_diffusers"),
    ),
    "qwen-image": Family(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            **_LAYERS,
            "in_channels": 16,
            "out_channels": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen,
        ("Qwen-Image", ""),
    ),
    "z-image": Family(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 64, 64],
        },
        _z_image,
        ("Z-Image", "convert_z_image_transformer_checkpoint_to_diffusers"),
    ),
    "hunyuan-video": Family(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan,
    ),
    "ltx": Family(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            **_LAYERS,
            "in_channels": 8,
            "out_channels": 8,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
        _ltx,
        ("LTX-Video", "convert_ltx_transformer_checkpoint_to_diffusers"),
    ),
    "lumina2": Family(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 24,
        },
        _lumina,
    ),
}
_ENCODERS = {
    "sd15": (("text_encoder", CLIPTextModel, 32),),
    "sdxl": (("text_encoder", CLIPTextModel, 32), ("text_encoder_2", CLIPTextModelWithProjection, 16)),
}


def denoiser_of(pipe: Any) -> str:
    """Which part of a pipeline it is."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def given(model: Any) -> Mapping[str, Any]:
    """What a denoiser of one of the families is run on."""
    family = next(one for one in FAMILIES.values() if one.model == type(model).__name__)
    return family.given(model)


def seeded(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, of sizes that keep a signal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = noise / 10 + float(bool((parameter == 1).all()))
    return model.eval()


def components_of(name: str) -> dict[str, torch.nn.Module]:
    family = FAMILIES[name]
    part = "unet" if family.model.startswith("UNet") else "transformer"
    found = {part: seeded(getattr(diffusers, family.model)(**family.sizes), 1)}
    for number, (encoder, kind, width) in enumerate(_ENCODERS.get(name, ())):
        config = CLIPTextConfig(
            vocab_size=60,
            hidden_size=width,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=0,
            eos_token_id=2,
        )
        found[encoder] = seeded(kind(config), 2 + number)
    return found


def pipeline_of(name: str, components: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, FAMILIES[name].pipeline)
    wanted, _ = kind._get_signature_keys(kind)
    return kind(**dict.fromkeys(wanted) | dict(components))


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Of attention and of the MLP behind it: what everyone trains."""
    inside = ("attn", "attention", "ff", "mlp")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "embed" not in name and any(part in name for part in inside)
    ]


def _lora(targets: list[str], **more: Any) -> peft.PeftConfig:
    """Of several ranks and alphas."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **more)
    config.rank_pattern, config.alpha_pattern = {targets[0]: 2}, {targets[-1]: 3}
    return config


KINDS: Mapping[str, Callable[[list[str]], peft.PeftConfig]] = {
    "peft": _lora,
    "dora": lambda targets: _lora(targets, use_dora=True),
    "loha": lambda targets: peft.LoHaConfig(r=2, alpha=3, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=2, alpha=3, target_modules=targets),
}


def train(model: torch.nn.Module, folder: Path, targets: list[str]) -> torch.nn.Module:
    """Save an adapter of the kind that `folder` is called after as PEFT does, and merge it."""
    wrapped = peft.get_peft_model(model, KINDS[folder.name](targets))
    generator = torch.Generator().manual_seed(7)
    for key, parameter in wrapped.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
        elif parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    for file in folder.glob("README.md"):
        file.unlink()
    return wrapped.merge_and_unload().eval()


def rows_of(name: str, model: torch.nn.Module) -> dict[str, list[tuple[str, int, int]]]:
    """By parameter: the rows of a release's tensors that diffusers makes it of."""
    from diffusers.loaders import single_file_utils as peer

    from surgery_formats.models.layouts.index import LayoutIndex
    from surgery_formats.models.layouts.registry import NETWORKS
    from tests.golden.layouts.make import STEP, single_file

    family = FAMILIES[name]
    assert family.network is not None
    title, conversion = family.network
    heights = {key: tensor.shape[0] for key, tensor in model.state_dict().items()}
    network = next(network for network in NETWORKS if network.name == title)
    tensors = single_file(LayoutIndex.of(network, list(heights)), heights)
    names = list(tensors)
    numbered = {
        key: (torch.arange(rows, dtype=torch.float64) + STEP * at).reshape(rows, 1)
        for at, (key, rows) in enumerate(tensors.items())
    }
    if family.model.startswith("UNet"):
        within = {f"{peer.LDM_UNET_KEY}{key}": value for key, value in numbered.items()}
        converted = peer.convert_ldm_unet_checkpoint(within, dict(model.config))
    else:
        converted = getattr(peer, conversion)(dict(numbered)) if conversion else numbered
    assert converted.keys() == heights.keys()
    return {
        key: [(names[int(value) // STEP], int(value) % STEP, at) for at, value in enumerate(tensor.flatten())]
        for key, tensor in converted.items()
    }


def released(
    state: Mapping[str, torch.Tensor], rows: Mapping[str, list[tuple[str, int, int]]]
) -> dict[str, torch.Tensor]:
    """The tensors of a release that diffusers would convert to these."""
    heights: dict[str, int] = {}
    for places in rows.values():
        for source, row, _ in places:
            heights[source] = max(heights.get(source, 0), row + 1)
    found: dict[str, torch.Tensor] = {}
    for key, places in rows.items():
        for source, row, at in places:
            if source not in found:
                found[source] = torch.zeros(heights[source], *state[key].shape[1:])
            found[source][row] = state[key][at]
    return found


def write(name: str, folder: Path) -> None:
    components = components_of(name)
    part = next(iter(components))
    pipeline_of(name, components).save_pretrained(folder / "pipeline")
    state = {key: value.clone() for key, value in components[part].state_dict().items()}
    targets = linear_modules(components[part])
    for kind in KINDS if name == "sd15" else ("peft",):
        trained = train(copy.deepcopy(components[part]), folder / kind, targets)
        pipeline_of(name, {**components, part: trained}).save_pretrained(folder / f"dense-{kind}")
    if FAMILIES[name].network is None:
        return
    model = getattr(diffusers, FAMILIES[name].model)(**FAMILIES[name].sizes)
    rows = rows_of(name, model)
    release = released(state, rows)
    prefix = "model.diffusion_model." if part == "unet" else ""
    save_file({f"{prefix}{key}": value.contiguous() for key, value in release.items()}, folder / "single.safetensors")
    model.load_state_dict(state)
    trained = {f"{target}.weight" for target in targets}
    parts: dict[str, set[str]] = {}
    for key, places in rows.items():
        for source, _, _ in places:
            parts.setdefault(source, set()).add(key)
    factors: dict[str, torch.Tensor] = {}
    after = {key: value.clone() for key, value in release.items()}
    for number, (source, keys) in enumerate(parts.items()):
        if keys <= trained and release[source].ndim == 2:
            out, inputs = release[source].shape
            stem, alpha = source.removesuffix(".weight"), 3.0
            a, b = 0.3 * draw(4, inputs, seed=number), 0.3 * draw(out, 4, seed=1000 + number)
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(alpha)}
            after[source] = release[source] + alpha / 4 * (b @ a)
    save_file({f"diffusion_model.{key}": value for key, value in factors.items()}, folder / "original.safetensors")
    for key, places in rows.items():
        state[key] = torch.stack([after[source][row] for source, row, _ in places]).reshape(state[key].shape)
    model.load_state_dict(state)
    components[part] = model.eval()
    pipeline_of(name, components).save_pretrained(folder / "dense-original")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path += [str(root), str(root / "formats")]
    for family in sys.argv[2:]:
        write(family, Path(sys.argv[1]) / family)
