# SPDX-License-Identifier: Apache-2.0
"""Bases of diffusion networks as people have them: networks x layouts of their files.

Names and rows are those of diffusers' own conversions (``tests/golden/layouts``), so that what is wanted is worked out
without a rule of ours: a weight of a single file is the rows of diffusers' parameters, one below the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from surgery_formats.models.layouts.registry import NETWORKS
from tests.support.adapter_files import GOLDEN, Arrays

__all__ = [
    "DIFFUSERS",
    "KINDS",
    "LAYOUTS",
    "MODELS",
    "MODEL_TYPES",
    "WHOLE",
    "Kind",
    "Tensors",
    "Weights",
    "draw",
    "drawn",
    "files_of",
    "in_comfyui",
    "tensors_of",
    "written",
]

_ROWS: dict[str, Any] = json.loads((GOLDEN / "layouts/rows.json").read_text())
DIFFUSERS: str = _ROWS["diffusers"]
MODELS: dict[str, Any] = _ROWS["models"]
WIDTH = 4
Span = tuple[str, int, int]

_CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
CLIP_L = tuple(f"text_model.encoder.layers.{layer}.{module}" for layer in (0, 1) for module in _CLIP)
T5 = tuple(
    f"encoder.block.{layer}.layer.{place}.{module}"
    for layer in (0, 1)
    for place, module in ((0, "SelfAttention.q"), (0, "SelfAttention.o"), (1, "DenseReluDense.wi_0"))
)
LLM = tuple(f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.up_proj"))
_OF_LLM = (
    *("llama", "qwen25_7b", "qwen3vl_8b", "qwen3vl_4b", "qwen3_4b", "qwen3_06b"),
    *("gemma2_2b", "gemma3_12b", "mistral3_24b"),
)
ENCODERS: dict[str, tuple[str, ...]] = {
    "clip_l": CLIP_L,
    "clip_g": CLIP_L,
    "t5xxl": T5,
    "umt5xxl": T5,
    "pile_t5xl": T5,
    **dict.fromkeys(_OF_LLM, LLM),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What the bases of a network have beside it.

    Attributes:
        title: As people call it.
        encoders: ComfyUI's names of the text encoders, in the order of diffusers' pipeline.
        prefix: What every name of the release's file begins with.
        inside: Prefixes of the text encoders in the release's file, in the same order; none if they are not in it.
        vae: Prefix of the VAE in the release's file, if it is there.
        component: The folder of the denoiser in a pipeline.
        saved: The prefix that ComfyUI saves it under.
    """

    title: str
    encoders: tuple[str, ...]
    prefix: str = ""
    inside: tuple[str, ...] = ()
    vae: str = ""
    component: str = "transformer"
    saved: str = "model.diffusion_model."


_LDM = "model.diffusion_model."
KINDS: dict[str, Kind] = {
    "sd15": Kind(
        "Stable Diffusion 1.5", ("clip_l",), _LDM, ("cond_stage_model.transformer.",), "first_stage_model.", "unet"
    ),
    "sdxl": Kind(
        "Stable Diffusion XL",
        ("clip_l", "clip_g"),
        _LDM,
        ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
        "first_stage_model.",
        "unet",
    ),
    "sd3": Kind("Stable Diffusion 3.5", ("clip_l", "clip_g", "t5xxl"), _LDM, (), "first_stage_model."),
    "flux": Kind("Flux", ("clip_l", "t5xxl")),
    "chroma": Kind("Chroma", ("t5xxl",)),
    "flux2": Kind("Flux 2", ("mistral3_24b",)),
    "wan": Kind("Wan 2.1 I2V", ("umt5xxl",)),
    "wan-vace": Kind("Wan VACE", ("umt5xxl",)),
    "qwen-image": Kind("Qwen-Image", ("qwen25_7b",)),
    "qwen-image-2.1": Kind("Qwen-Image 2.1", ("qwen3vl_8b",)),
    "z-image": Kind("Z-Image", ("qwen3_4b",)),
    "hunyuan-video": Kind("HunyuanVideo", ("llama", "clip_l"), saved="model.model."),
    "ltx": Kind("LTX-Video", ("t5xxl",), _LDM, (), "vae."),
    "ltx2": Kind("LTX-2", ("gemma3_12b",), _LDM, (), "vae."),
    "lumina2": Kind("Lumina 2", ("gemma2_2b",)),
    "cosmos2": Kind("Anima (Cosmos-Predict2)", ("qwen3_06b",), "net."),
    "wan-animate": Kind("Wan 2.2 Animate", ("umt5xxl",)),
    "hidream": Kind("HiDream", ("clip_l", "clip_g", "t5xxl", "llama")),
    "mochi": Kind("Mochi", ("t5xxl",)),
    "sana": Kind("Sana", ("gemma2_2b",)),
    "auraflow": Kind("AuraFlow", ("pile_t5xl",), "model."),
    "krea2": Kind("Krea 2", ("qwen3vl_4b",)),
}
LAYOUTS = {
    "release": "the file that was published, with the networks and under the prefix that it has",
    "ComfyUI": "one file of denoiser, text encoders and VAE, as ComfyUI saves a checkpoint",
    "folder": "the folder of the denoiser in a pipeline of diffusers",
    "pipeline": "a pipeline of diffusers",
    "variant": "the same in float16, `*.fp16.safetensors`, the denoiser in shards with `*.index.fp16.json`",
}
WHOLE = ("ComfyUI", "pipeline", "variant")
"""Layouts with all networks of a pipeline."""


@dataclass(frozen=True)
class Tensors:
    """A network in a single file's names, and which of its rows diffusers' parameters are.

    Attributes:
        single: Shapes by the names of the release.
        spans: For every parameter of diffusers its rows: tensors of the file, from row to row.
    """

    single: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, tuple[Span, ...]]

    def split(self, single: Arrays) -> Arrays:
        """What diffusers makes of a file."""
        return {name: np.concatenate([single[t][a:b] for t, a, b in some]) for name, some in self.spans.items()}

    def joined(self, split: Arrays) -> Arrays:
        """The file that diffusers would make these of; zeros where they lack a parameter."""
        found = {name: np.zeros(shape) for name, shape in self.single.items()}
        for name, tensor in split.items():
            row = 0
            for t, a, b in self.spans[name]:
                found[t][a:b] += tensor[row : row + b - a]
                row += b - a
        return found


@cache
def tensors_of(network: str) -> Tensors:
    """Small shapes: heights divided by what divides all of them, four columns, kernels as they are."""
    model = MODELS[network]
    heights: dict[str, int] = model["heights"]
    whole: dict[str, list[Span]] = {
        name: [(entry, 0, heights[entry])] if isinstance(entry, str) else [(t, a, b) for t, a, b in entry]
        for name, entry in model["rows"].items()
    }
    unit = math.gcd(*heights.values(), *(edge for some in whole.values() for _, a, b in some for edge in (a, b)))
    spans = {name: tuple((t, a // unit, b // unit) for t, a, b in some) for name, some in whole.items()}
    tails: dict[str, tuple[int, ...]] = {}
    for name, some in spans.items():
        tail = model["tails"].get(name)
        small = (WIDTH,) if tail is None else (WIDTH, *tail[1:]) if len(tail) > 2 else (1,) * max(0, len(tail) - 1)
        small = small if tail is None or len(tail) != 2 else (2, WIDTH)
        tails |= {tensor: small for tensor, _, _ in some}
    return Tensors({name: (rows // unit, *tails[name]) for name, rows in heights.items()}, spans)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _encoder(name: str, rng: np.random.Generator, dtype: Any) -> Arrays:
    return {f"{module}.weight": draw(rng, (6, WIDTH), dtype) for module in ENCODERS[name]}


_OPEN_CLIP = {"attn.in_proj_weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")} | {
    f"{new}.weight": (old,)
    for new, old in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))
}


def _as_open_clip(encoder: Arrays) -> Arrays:
    """CLIP as files of Stable Diffusion XL hold its second: queries, keys and values are one weight."""
    return {
        f"transformer.resblocks.{layer}.{new}": np.concatenate(
            [encoder[f"text_model.encoder.layers.{layer}.{part}.weight"] for part in old]
        )
        for layer in (0, 1)
        for new, old in _OPEN_CLIP.items()
    }


@dataclass(frozen=True)
class Weights:
    """All networks of a base, under the names that diffusers and transformers have."""

    network: str
    denoiser: Arrays
    encoders: Mapping[str, Arrays]
    vae: Arrays

    def single(self) -> Arrays:
        """The denoiser's tensors in a single file."""
        tensors = tensors_of(self.network)
        return {name: tensor.astype(_type(self.denoiser)) for name, tensor in tensors.joined(self.denoiser).items()}


def _type(tensors: Arrays) -> Any:
    return next(iter(tensors.values())).dtype


def drawn(network: str, dtype: Any) -> Weights:
    """Random weights."""
    rng = np.random.default_rng(11)
    tensors = tensors_of(network)
    single = {name: draw(rng, shape, dtype) for name, shape in tensors.single.items()}
    encoders = {name: _encoder(name, rng, dtype) for name in KINDS[network].encoders}
    vae = {"decoder.conv_in.weight": draw(rng, (6, WIDTH, 3, 3), dtype)}
    return Weights(network, tensors.split(single), encoders, vae)


METADATA = {"modelspec.title": "A base", "modelspec.sai_model_spec": "1.0.0", "format": "pt"}


_RENAMED = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
    (".q_norm.weight", ".norm.query_norm.weight"),
    (".k_norm.weight", ".norm.key_norm.weight"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)
"""What ComfyUI calls HunyuanVideo's modules, in its own order."""


def in_comfyui(network: str, name: str) -> str:
    """What ComfyUI calls a tensor of the release once it is loaded, and as it saves it."""
    if network in ("flux", "flux2", "chroma"):
        return re.sub(r"_norm\.scale$", "_norm.weight", name)
    for old, new in _RENAMED if network == "hunyuan-video" else ():
        name = name.replace(old, new)
    return name


def _prefixed(prefix: str, tensors: Arrays) -> Arrays:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _one_file(weights: Weights, layout: str) -> Arrays:
    kind = KINDS[weights.network]
    encoders: Arrays = {}
    if layout == "release":
        found = _prefixed(kind.prefix, weights.single())
        for prefix, encoder in zip(kind.inside, weights.encoders.values(), strict=False):
            encoders |= _prefixed(prefix, _as_open_clip(encoder) if prefix.endswith(".model.") else encoder)
        return found | encoders | (_prefixed(kind.vae, weights.vae) if kind.vae else {})
    single = {in_comfyui(weights.network, name): tensor for name, tensor in weights.single().items()}
    found = _prefixed(kind.saved, single)
    for name, encoder in weights.encoders.items():
        encoders |= _prefixed(f"text_encoders.{name}.transformer.", encoder)
    return found | encoders | _prefixed(kind.vae or "vae.", weights.vae)


def _folders(weights: Weights) -> dict[str, Arrays]:
    kind = KINDS[weights.network]
    numbered = {
        "text_encoder" if n == 0 else f"text_encoder_{n + 1}": e for n, e in enumerate(weights.encoders.values())
    }
    return {kind.component: weights.denoiser, **numbered, "vae": weights.vae}


def files_of(weights: Weights, layout: str) -> dict[str, Arrays]:
    """The weight files of a base, each with its tensors."""
    kind = KINDS[weights.network]
    if layout in ("release", "ComfyUI"):
        return {"base.safetensors": _one_file(weights, layout)}
    if layout == "folder":
        return {"diffusion_pytorch_model.safetensors": weights.denoiser}
    found: dict[str, Arrays] = {}
    middle = ".fp16" if layout == "variant" else ""
    for name, tensors in _folders(weights).items():
        stem = f"{name}/{'model' if name.startswith('text') else 'diffusion_pytorch_model'}{middle}"
        if name == kind.component and layout == "variant":
            for number in (0, 1):
                half = dict(sorted(tensors.items())[number::2])
                found[f"{stem}-0000{number + 1}-of-00002.safetensors"] = half
        else:
            found[f"{stem}.safetensors"] = tensors
    return found


MODEL_TYPES = {
    "t5xxl": "t5",
    "umt5xxl": "umt5",
    "pile_t5xl": "umt5",
    "clip_l": "clip_text_model",
    "clip_g": "clip_text_model",
}
"""transformers' `model_type` of the text encoders that LoRAs have keys for; the others are language models."""


def written(weights: Weights, layout: str, folder: Path) -> Path:
    """The base in a layout; what is given to the command."""
    kind = KINDS[weights.network]
    for name, tensors in files_of(weights, layout).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name, METADATA if name == "base.safetensors" else {"format": "pt"})
    if layout in ("release", "ComfyUI"):
        return folder / "base.safetensors"
    told: dict[str, Any] = {"_class_name": _class_of(weights.network)}
    if layout == "folder":
        (folder / "config.json").write_text(json.dumps(told))
        return folder
    index: dict[str, Any] = {"_class_name": "Pipeline"}
    for name in _folders(weights):
        index[name] = ["diffusers", "X"]
        own = told if name == kind.component else {"_class_name": "AutoencoderKL"}
        if name.startswith("text"):
            number = int(name.rpartition("_")[2]) - 1 if name[-1].isdigit() else 0
            own = {"model_type": MODEL_TYPES.get(kind.encoders[number], "qwen3")}
        (folder / name / "config.json").write_text(json.dumps(own))
    (folder / "model_index.json").write_text(json.dumps(index))
    if layout == "variant":
        shards = {n: t for n, t in files_of(weights, layout).items() if "-of-" in n}
        weight_map = {key: name.rpartition("/")[2] for name, tensors in shards.items() for key in sorted(tensors)}
        size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
        (folder / kind.component / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)
    return folder


def _class_of(network: str) -> str:
    classes = next(each for each in NETWORKS if each.name == MODELS[network]["family"]).classes
    return classes[{"wan-vace": 1, "wan-animate": 2}.get(network, 0)]
