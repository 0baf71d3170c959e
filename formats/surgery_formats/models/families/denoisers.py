# SPDX-License-Identifier: Apache-2.0
"""Families of diffusion networks, told by the names of the modules that an adapter changes.

Names are compared as kohya flattens them, so that a dotted file and a flat one tell the same. What they are in another
layout (fused projections, single files) is told by `surgery_formats.models.layouts`: readers never map a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["COMPONENTS", "DENOISERS", "Denoiser", "denoiser_of", "of_two_layouts"]

COMPONENTS = ("transformer", "unet", "denoiser", "prior")
"""What pipelines and adapters call the network that removes noise."""


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A family.

    Attributes:
        name: As people call it; several where the names cannot tell them apart.
        marks: Regular expressions, each found in some flattened name.
        without: Expressions that are found in none.
        component: What diffusers' pipelines call the network.
        inputs: Modules that adapters give more channels (control LoRAs).
    """

    name: str
    marks: tuple[str, ...]
    without: tuple[str, ...] = ()
    component: str = "transformer"
    inputs: tuple[str, ...] = ()

    def matches(self, names: str) -> bool:
        """Whether flattened names, one a line, are of this family."""
        found = all(re.search(mark, names, re.MULTILINE) for mark in self.marks)
        return found and not any(re.search(mark, names, re.MULTILINE) for mark in self.without)


_IN_UNET = r"^(down|up|mid)_blocks?_(\d+_)?(attentions|resnets|downsamplers|upsamplers)_"

_FLUX_INPUTS = ("img_in", "x_embedder")

DENOISERS = (
    Denoiser("Stable Diffusion XL", (r"^(input|middle|output)_blocks?_.*transformer_blocks_[1-9]",), component="unet"),
    Denoiser(
        "Stable Diffusion XL", (_IN_UNET, r"attentions_\d+_transformer_blocks_[1-9]|^add_embedding_"), component="unet"
    ),
    Denoiser("Stable Diffusion 1, 2 or XL", (r"^(input|middle|output)_blocks?_\d+_\d+_",), component="unet"),
    Denoiser("Stable Diffusion 1, 2 or XL", (_IN_UNET,), component="unet"),
    Denoiser(
        "Stable Cascade",
        (r"^(down|up)_blocks_\d+_\d+_(channelwise|attention|kv_mapper|mapper)(_|$)",),
        component="prior",
    ),
    Denoiser("Stable Diffusion 3", (r"^joint_blocks_\d+_",)),
    Denoiser("Chroma", (r"^distilled_guidance_layer_",)),
    Denoiser("Flux 2", (r"^(double_stream_modulation|single_stream_modulation)",)),
    Denoiser("Flux 2", (r"^single_transformer_blocks_\d+_attn_to_qkv_mlp_proj",)),
    Denoiser("Flux or HunyuanVideo", (r"^double_blocks_\d+_(img|txt)_",), inputs=_FLUX_INPUTS),
    Denoiser("Flux or HunyuanVideo", (r"^single_blocks_\d+_(linear|modulation|norm)",), inputs=_FLUX_INPUTS),
    Denoiser("Flux", (r"^single_transformer_blocks_\d+_",), inputs=_FLUX_INPUTS),
    Denoiser("Qwen-Image", (r"^transformer_blocks_\d+_(img|txt)_(mlp|mod)_",)),
    Denoiser("Flux, Stable Diffusion 3 or Qwen-Image", (r"^transformer_blocks_\d+_attn_(to|add)_",)),
    Denoiser("HiDream", (r"^(double|single)_stream_blocks_\d+_",)),
    Denoiser("AuraFlow", (r"^((double|single)_layers|joint_transformer_blocks)_\d+_",)),
    Denoiser(
        "Krea 2", (r"^(blocks_\d+_attn_(w[qkvo]|gate)$|txtfusion_|text_fusion_|transformer_blocks_\d+_attn_to_gate$)",)
    ),
    Denoiser("Mochi", (r"^(blocks_\d+_(attn_\w+_[xy]$|mlp_[xy]_|mod_[xy]$)|transformer_blocks_\d+_attn1_(to_)?add_)",)),
    Denoiser(
        "Sana",
        (
            r"^(blocks_\d+_(cross_attn_\w+_linear$|mlp_(inverted|depth|point)_conv)"
            r"|transformer_blocks_\d+_ff_conv_(inverted|depth|point)$)",
        ),
    ),
    Denoiser("Wan", (r"^blocks_\d+_(self|cross)_attn_[qkvo](_img)?$",)),
    Denoiser("Wan", (r"^blocks_\d+_ffn_(\d|net)",)),
    Denoiser("Cosmos-Predict2 or Anima", (r"^blocks_\d+_((self|cross)_attn_\w+_proj$|adaln_modulation_)",)),
    Denoiser("Wan", (r"^blocks_\d+_attn[12]_(to|add)_",)),
    Denoiser("Z-Image or Lumina 2", (r"^(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN)_",)),
    Denoiser("LTX-Video, PixArt, Sana or Mochi", (r"^transformer_blocks_\d+_(attn[12]|ff)_",)),
)
"""In order: of several that match, the first is meant."""


_LAYOUTS = (
    (r"^(input|middle|output)_blocks?_\d", r"^(down|up|mid)_blocks?_"),
    (r"^(double|single)_blocks_\d", r"^(single_)?transformer_blocks_\d"),
    (r"^joint_blocks_\d", r"^transformer_blocks_\d"),
    (r"^(double|single)_layers_\d", r"^(joint|single)_transformer_blocks_\d"),
    (r"^blocks_\d+_(self|cross)_attn_[qkvo]", r"^blocks_\d+_attn[12]_"),
)
"""How the release of a network names its blocks, and how diffusers does."""


def of_two_layouts(a: Iterable[str], b: Iterable[str]) -> bool:
    """Whether one of two adapters has the release's names of a network, and the other diffusers': dotted or flat paths."""
    mine, theirs = ("\n".join(path.replace(".", "_") for path in paths) for paths in (a, b))
    for release, other in _LAYOUTS:
        found = [
            (bool(re.search(release, names, re.M)), bool(re.search(other, names, re.M))) for names in (mine, theirs)
        ]
        if sorted(found) == [(False, True), (True, False)]:
            return True
    return False


def denoiser_of(modules: Iterable[str]) -> Denoiser | None:
    """The family of modules' paths, dotted or flat; None if they tell none."""
    names = "\n".join(module.removeprefix("net.").replace(".", "_") for module in modules)  # of Anima's checkpoint
    return next((denoiser for denoiser in DENOISERS if denoiser.matches(names)), None)
