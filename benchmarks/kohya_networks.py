# SPDX-License-Identifier: Apache-2.0
"""Make small Flux, Stable Diffusion 3 and XL with LoRAs by sd-scripts' own classes; for `kohya_run.py`, in its environment.

Weights are random, names and their order those of the published files. Beside each network's files ``NETWORK.json`` says which rows of
which tensor a LoRA's module belongs to: a text encoder of OpenCLIP holds three of them in one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

__all__ = ["NETWORKS", "shrink_sdxl"]

WIDTH, TEXT = 64, 32
Places = dict[str, list[tuple[str, int, int]]]  # by a LoRA's name of a weight: tensor, first row, last
_CLIP = {
    "vocab_size": 99,
    "hidden_size": TEXT,
    "intermediate_size": 2 * TEXT,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": TEXT,
}


def _randomise(*models: torch.nn.Module) -> None:
    for model in models:
        for value in model.state_dict().values():
            if value.is_floating_point():
                torch.nn.init.normal_(value, std=0.1)


def _flat(prefix: str, tensors: Mapping[str, torch.Tensor], inside: str = "") -> Places:
    """The places of a network whose modules a LoRA names as the file does, with underscores."""
    return {
        f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}.weight": [(f"{inside}{name}", 0, len(value))]
        for name, value in tensors.items()
        if name.endswith(".weight")
    }


def _save(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    held = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(held, str(folder / f"{name}.safetensors"), metadata)


def _save_loras(folder: Path, name: str, create: Callable[..., Any], of: Mapping[str, dict[str, str]]) -> None:
    """LoRAs of rank 8 and alpha 4, by what its script's arguments were, with the metadata that its trainer writes."""
    for number, (title, arguments) in enumerate(of.items()):
        torch.manual_seed(number + 1)
        network, parts = create(**arguments)
        network.apply_to(*parts)
        for module in network.text_encoder_loras + network.unet_loras:
            for value in module.parameters():
                torch.nn.init.normal_(value, std=0.05)
        said = {"ss_network_module": f"networks.lora_{name}", "ss_network_dim": "8", "ss_network_alpha": "4.0"}
        _save(folder, f"{name}-{title}.lora", network.state_dict(), **said, ss_network_args=json.dumps(arguments))


def flux(folder: Path) -> None:
    """Flux with two double and two single blocks, CLIP L and T5 in files of their own."""
    import lora_flux
    from library import flux_models

    torch.manual_seed(5)
    sizes = {"hidden_size": WIDTH, "num_heads": 4, "axes_dim": [4, 6, 6], "depth": 2, "depth_single_blocks": 2}
    fixed = {"in_channels": 16, "mlp_ratio": 4.0, "theta": 10_000, "qkv_bias": True, "guidance_embed": True}
    model = flux_models.Flux(flux_models.FluxParams(**sizes, **fixed, vec_in_dim=TEXT, context_in_dim=TEXT))
    clip = CLIPTextModel(CLIPTextConfig(**_CLIP))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=99,
            d_model=TEXT,
            d_kv=8,
            d_ff=2 * TEXT,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    _randomise(model, clip, t5)
    held = model.state_dict()
    _save(folder, "flux", held, **{"modelspec.title": "a base"})
    _save(folder, "flux-bf16", {key: value.bfloat16() for key, value in held.items()}, **{"modelspec.title": "a base"})
    _save(folder, "flux-clip_l", clip.state_dict())
    _save(folder, "flux-t5xxl", {key: value for key, value in t5.state_dict().items() if "embed_tokens" not in key})
    whole = {f"model.diffusion_model.{name}": value for name, value in held.items()}
    for name, part in (("clip_l", clip), ("t5xxl", t5)):
        whole |= {f"text_encoders.{name}.transformer.{key}": value for key, value in part.state_dict().items()}
    _save(folder, "flux-whole", whole)
    places = _flat("lora_unet", held) | _flat("lora_te1", clip.state_dict()) | _flat("lora_te3", t5.state_dict())
    (folder / "flux.json").write_text(json.dumps(places))

    def create(**arguments: str) -> Any:
        return lora_flux.create_network(1.0, 8, 4.0, None, [clip, t5], model, **arguments), ([clip, t5], model)

    texts = {"train_t5xxl": "True"}
    dims = {"img_attn_dim": "4", "txt_mlp_dim": "2", "single_mod_dim": "6", "in_dims": "[4,2,2,2,4]"}
    _save_loras(folder, "flux", create, {"one": texts, "other": texts, "dims": dims})
    split = partial(patch.object, lora_flux.LoRANetwork, "get_qkv_mlp_split_dims")
    with split(classmethod(lambda _: [WIDTH] * 3 + [4 * WIDTH])):
        _save_loras(folder, "flux", create, {"split": {"split_qkv": "True", "train_blocks": "single"}})


def sd3(folder: Path) -> None:
    """Stable Diffusion 3.5 medium with three blocks, alone, and its three text encoders for the names of their LoRAs."""
    import lora_sd3
    from library import sd3_models

    torch.manual_seed(6)
    model = sd3_models.create_sd3_mmdit(
        sd3_models.SD3Params(
            patch_size=2,
            depth=3,
            num_patches=64,
            pos_embed_max_size=8,
            adm_in_channels=TEXT,
            qk_norm="rms",
            x_block_self_attn_layers=[0, 1],
            context_embedder_in_features=TEXT,
            context_embedder_out_features=3 * WIDTH,
            model_type="3-5-medium",
        )
    )
    texts = [CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP)) for _ in range(2)]
    _randomise(model, *texts)
    held = {f"model.diffusion_model.{name}": value for name, value in model.state_dict().items()}
    for number, name in enumerate(("clip_l", "clip_g")):
        held |= {f"text_encoders.{name}.transformer.{key}": value for key, value in texts[number].state_dict().items()}
    _save(folder, "sd3", held, **{"modelspec.title": "a base"})
    places = _flat("lora_unet", model.state_dict(), "model.diffusion_model.")
    for number, name in enumerate(("clip_l", "clip_g")):
        places |= _flat(f"lora_te{number + 1}", texts[number].state_dict(), f"text_encoders.{name}.transformer.")
    (folder / "sd3.json").write_text(json.dumps(places))

    def create(**arguments: str) -> Any:
        return lora_sd3.create_network(1.0, 8, 4.0, None, texts, model, **arguments), (texts, model)

    dims = {"context_attn_dim": "4", "x_mlp_dim": "2", "emb_dims": "[4,2,4,2,2,4]"}
    split = {"split_qkv": "True"}
    _save_loras(folder, "sd3", create, {"one": {}, "other": {}, "dims": dims, "split": split})


def sdxl(folder: Path) -> None:
    """Stable Diffusion XL with a tenth of the width and one layer in each of its transformers."""
    import lora
    from library import model_util, sdxl_model_util

    torch.manual_seed(7)
    unet = sdxl_model_util.sdxl_original_unet.SdxlUNet2DConditionModel()
    small = sdxl_model_util.CLIPTextConfig
    texts = [CLIPTextModel(small()), CLIPTextModelWithProjection(small())]
    vae = sdxl_model_util.AutoencoderKL(**model_util.create_vae_diffusers_config())
    _randomise(unet, *texts, vae)
    save = sdxl_model_util.save_stable_diffusion_checkpoint
    said = {"modelspec.title": "a base"}
    save(str(folder / "sdxl.safetensors"), *texts, unet, 0, 0, None, vae, torch.tensor(4.6), said, torch.float32)
    places = _flat("lora_unet", unet.state_dict(), "model.diffusion_model.")
    places |= _flat("lora_te1", texts[0].state_dict(), "conditioner.embedders.0.transformer.")
    places |= _converted("lora_te2", texts[1].state_dict(), "conditioner.embedders.1.model.")
    (folder / "sdxl.json").write_text(json.dumps(places))

    def create(**arguments: str) -> Any:
        return lora.create_network(1.0, 8, 4.0, None, texts, unet, **arguments), (texts, unet)

    # convolutions last: afterwards the class has them as targets for good
    _save_loras(folder, "sdxl", create, {"one": {}, "other": {}, "conv": {"conv_dim": "4", "conv_alpha": "2"}})


def _converted(prefix: str, tensors: Mapping[str, torch.Tensor], inside: str) -> Places:
    """The places of OpenCLIP, told by what sd-scripts' conversion does to tensors that hold their number."""
    from library import sdxl_model_util

    names = [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2]
    marked = {name: torch.zeros_like(value) for name, value in tensors.items()}
    marked |= {name: torch.full_like(tensors[name], float(number + 1)) for number, name in enumerate(names)}
    places: Places = {}
    for key, value in sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(marked, None).items():
        rows = value.reshape(len(value), -1)[:, 0].long()
        for number in set(rows[rows > 0].tolist()):
            at = (rows == number).nonzero().flatten()
            flat = names[number - 1].removesuffix(".weight").replace(".", "_")
            places[f"{prefix}_{flat}.weight"] = [(f"{inside}{key}", int(at[0]), int(at[-1]) + 1)]
    return places


def shrink_sdxl() -> None:
    """Set the sizes of Stable Diffusion XL: constants of its module, and those that stand in calls."""
    from library import sdxl_model_util, sdxl_original_unet

    sdxl_original_unet.MODEL_CHANNELS, sdxl_original_unet.TIME_EMBED_DIM = TEXT, 4 * TEXT
    sdxl_original_unet.ADM_IN_CHANNELS = 2 * TEXT
    block, config = sdxl_original_unet.Transformer2DModel, sdxl_model_util.CLIPTextConfig
    few: Iterable[tuple[str, int]] = (("cross_attention_dim", 2 * TEXT), ("num_transformer_layers", 1))
    small = type(
        block.__name__, (block,), {"__init__": lambda self, **given: block.__init__(self, **given | dict(few))}
    )
    sdxl_original_unet.Transformer2DModel = small
    sdxl_model_util.CLIPTextConfig = lambda **given: config(**given | _CLIP)


NETWORKS = {"flux": flux, "sd3": sd3, "sdxl": sdxl}
