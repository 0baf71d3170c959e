# SPDX-License-Identifier: Apache-2.0
"""Networks inside one file, told by how their names begin: denoiser, text encoders and VAE of an all-in-one checkpoint.

Adapters call the text encoders by the order that a diffusers pipeline of the family has them in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from surgery_formats.models.layouts.registry import indexes_of

__all__ = ["Part", "encoder_name", "parts_of"]

_DENOISERS = ("model.diffusion_model.", "diffusion_model.", "net.", "model.model.", "model.", "")
_SAY_SO = _DENOISERS[:2]  # whatever the family
_BESIDE = {"first_stage_model.": "vae", "vae.": "vae", "audio_vae.": "audio_vae", "vocoder.": "vocoder"}
_OF_LDM = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
_INNER = ("transformer.", "model.")
_COMFYUI = re.compile(r"((?:text_encoders|cond_stage_model)\.([^.]+)\.(?:transformer|model)\.).")
_ORDERS = (  # of the text encoders in diffusers' pipelines, by ComfyUI's names
    ("llama", "clip_l"),
    ("llava_llama3", "clip_l"),
    ("clip_l", "clip_g", "t5xxl", "llama"),
    ("qwen25_7b", "byt5_small"),
    ("qwen25_7b", "byt5_small_glyphxl"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a file.

    Attributes:
        component: What adapters call it: ``denoiser``, ``text_encoder``, ``text_encoder_2``, ``vae``.
        prefix: How its names begin.
    """

    component: str
    prefix: str


def parts_of(names: Collection[str]) -> tuple[Part, ...]:
    """The networks in a file with these names; none if there is no network that removes noise among them."""
    denoiser = next((prefix for prefix in _DENOISERS if _denoises(names, prefix)), None)
    if denoiser is None:
        return ()
    parts = [Part("denoiser", denoiser)]
    if denoiser:
        parts += (Part(component, prefix) for component, prefix in _text_encoders(names))
        parts += (Part(component, prefix) for prefix, component in _BESIDE.items() if _has(names, prefix))
    return tuple(parts)


def encoder_name(prefix: str) -> str:
    """ComfyUI's name of the text encoder behind a prefix (``t5xxl``), or empty."""
    match = _COMFYUI.match(f"{prefix}x")
    return match[2] if match else ""


def _denoises(names: Collection[str], prefix: str) -> bool:
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if prefix in _SAY_SO and below:
        return True
    return any(index.network.denoises for index in indexes_of(below, {}))


def _text_encoders(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each with its prefix; numbered in the order of the pipeline."""
    found = [prefix for outer in _OF_LDM for inner in _INNER if _has(names, prefix := f"{outer}{inner}")]
    if not found:
        named = {match[2]: match[1] for name in names if (match := _COMFYUI.match(name))}
        order = next((order for order in _ORDERS if named.keys() <= set(order)), tuple(sorted(named)))
        found = [named[name] for name in order if name in named]
    refiner = found == ["conditioner.embedders.0.model."]  # it has the second encoder of Stable Diffusion XL alone
    for number, prefix in enumerate(found, 2 if refiner else 1):
        yield "text_encoder" if number == 1 else f"text_encoder_{number}", prefix


def _has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
