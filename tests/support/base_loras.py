# SPDX-License-Identifier: Apache-2.0
"""LoRAs of the networks of `bases`, as programs spell them, and what they add to each weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.adapter_files import Arrays
from tests.support.bases import KINDS, MODEL_TYPES, Weights, draw, in_comfyui, tensors_of

__all__ = ["SPELLINGS", "Lora", "lora_of"]

RANK = 2
SPELLINGS = {
    "kohya": "`lora_unet_`, the release's name with underscores, `.lora_down.weight`; `lora_te1_`",
    "kohya, diffusers' names": "`lora_unet_`, diffusers' name with underscores, `.lora_down.weight`; `lora_te1_`",
    "diffusers": "`transformer.` or `unet.`, diffusers' name, `.lora_A.weight`; `text_encoder.`",
    "ComfyUI": "`diffusion_model.`, ComfyUI's name, `.lora_A.weight`; `text_encoders.clip_l.transformer.`",
    "bare": "the release's name, `.lora_A.weight`",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA in a file's spelling, and what it adds to each network, under the names that diffusers has."""

    tensors: Arrays
    added: Weights


def lora_of(weights: Weights, spelling: str, *, encoders: bool, without: str = "") -> Lora:
    """A LoRA of every matrix and convolution, as a program spells it, but for those `without` is in the name of."""
    rng = np.random.default_rng(17)
    tensors = tensors_of(weights.network)
    splits = spelling in ("diffusers", "kohya, diffusers' names")
    own = {n: t.shape for n, t in weights.denoiser.items()} if splits else tensors.single
    flat = spelling.startswith("kohya")
    component = KINDS[weights.network].component
    prefixes = {"diffusers": f"{component}.", "ComfyUI": "diffusion_model.", "bare": ""}
    found: Arrays = {}
    deltas: Arrays = {}
    for name, shape in own.items():
        if name.endswith(".weight") and len(shape) in (2, 4, 5) and not (without and without in name):
            told = in_comfyui(weights.network, name) if spelling == "ComfyUI" else name
            stem = _flat("lora_unet_", name) if flat else prefixes[spelling] + told.removesuffix(".weight")
            deltas[name] = _pair(found, stem, shape, rng, flat)
        else:
            deltas[name] = np.zeros(shape)
    added = tensors.split(deltas) if not splits else deltas
    inside: dict[str, Arrays] = {}
    for number, (encoder, own_weights) in enumerate(weights.encoders.items()):
        inside[encoder] = {name: np.zeros(tensor.shape) for name, tensor in own_weights.items()}
        if not encoders or encoder not in MODEL_TYPES or spelling == "bare":
            continue
        for name, tensor in own_weights.items():
            stem = _encoder_stem(spelling, encoder, number, len(weights.encoders), name)
            inside[encoder][name] = _pair(found, stem, tensor.shape, rng, flat)
    vae = {name: np.zeros(tensor.shape) for name, tensor in weights.vae.items()}
    return Lora(found, Weights(weights.network, added, inside, vae))


def _flat(prefix: str, name: str) -> str:
    return prefix + name.removesuffix(".weight").replace(".", "_")


def _encoder_stem(spelling: str, encoder: str, number: int, count: int, name: str) -> str:
    module = name.removesuffix(".weight")
    if spelling == "ComfyUI":
        return f"text_encoders.{encoder}.transformer.{module}"
    if spelling == "diffusers":
        return f"text_encoder{f'_{number + 1}' if number else ''}.{module}"
    return _flat(f"lora_te{number + 1 if count > 1 else ''}_", name)


def _pair(found: Arrays, stem: str, shape: tuple[int, ...], rng: np.random.Generator, flat: bool) -> np.ndarray:
    """Two factors and an alpha under `stem`; what they add."""
    down = draw(rng, (RANK, *shape[1:]), np.float32)
    up = draw(rng, (shape[0], RANK, *(1,) * (len(shape) - 2)), np.float32)
    leaves = ("lora_down.weight", "lora_up.weight") if flat else ("lora_A.weight", "lora_B.weight")
    found |= {f"{stem}.{leaves[0]}": down, f"{stem}.{leaves[1]}": up}
    scale = 1.0
    if flat:
        found[f"{stem}.alpha"] = np.ones((), np.float32)
        scale = 1 / RANK
    change: np.ndarray = scale * (up.reshape(shape[0], RANK).astype(float) @ down.reshape(RANK, -1)).reshape(shape)
    return change
