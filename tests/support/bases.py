# SPDX-License-Identifier: Apache-2.0
"""Networks x base layouts x spellings of a LoRA: bases as people have them, and what a merge has to write.

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
from safetensors.numpy import load_file, save_file

from surgery import merge
from surgery_formats.models.layouts.registry import NETWORKS
from tests.support.adapter_files import GOLDEN, Arrays

__all__ = [
    "COMBINATIONS",
    "DIFFUSERS",
    "KINDS",
    "LAYOUTS",
    "MODELS",
    "SPELLINGS",
    "Combination",
    "Outcome",
    "check",
    "compared",
    "in_comfyui",
    "merged",
    "sample",
]

_ROWS: dict[str, Any] = json.loads((GOLDEN / "layouts/rows.json").read_text())
DIFFUSERS: str = _ROWS["diffusers"]
MODELS: dict[str, Any] = _ROWS["models"]
TOLERANCE = 1e-6
WIDTH = 4
RANK = 2
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
SPELLINGS = {
    "kohya": "`lora_unet_`, the release's name with underscores, `.lora_down.weight`; `lora_te1_`",
    "kohya, diffusers' names": "`lora_unet_`, diffusers' name with underscores, `.lora_down.weight`; `lora_te1_`",
    "diffusers": "`transformer.` or `unet.`, diffusers' name, `.lora_A.weight`; `text_encoder.`",
    "ComfyUI": "`diffusion_model.`, ComfyUI's name, `.lora_A.weight`; `text_encoders.clip_l.transformer.`",
    "bare": "the release's name, `.lora_A.weight`",
}


@dataclass(frozen=True, slots=True)
class Combination:
    """A base and a LoRA.

    Attributes:
        network: By its name in the golden rows.
        layout: Of the base.
        spelling: Of the LoRA.
    """

    network: str
    layout: str
    spelling: str

    def __str__(self) -> str:
        return f"{self.network}, {self.layout}, {self.spelling}"


COMBINATIONS = tuple(
    Combination(network, layout, spelling) for network in KINDS for layout in LAYOUTS for spelling in SPELLINGS
)


def sample(every: int) -> tuple[Combination, ...]:
    """Every so many-th combination, another layout and spelling of each network in turn."""
    return COMBINATIONS[::every]


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


def _draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _encoder(name: str, rng: np.random.Generator, dtype: Any) -> Arrays:
    return {f"{module}.weight": _draw(rng, (6, WIDTH), dtype) for module in ENCODERS[name]}


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
    single = {name: _draw(rng, shape, dtype) for name, shape in tensors.single.items()}
    encoders = {name: _encoder(name, rng, dtype) for name in KINDS[network].encoders}
    vae = {"decoder.conv_in.weight": _draw(rng, (6, WIDTH, 3, 3), dtype)}
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


_TYPES = {
    "t5xxl": "t5",
    "umt5xxl": "umt5",
    "pile_t5xl": "umt5",
    "clip_l": "clip_text_model",
    "clip_g": "clip_text_model",
}


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
            own = {"model_type": _TYPES.get(kind.encoders[number], "qwen3")}
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
        if not encoders or encoder not in _TYPES or spelling == "bare":
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
    down = _draw(rng, (RANK, *shape[1:]), np.float32)
    up = _draw(rng, (shape[0], RANK, *(1,) * (len(shape) - 2)), np.float32)
    leaves = ("lora_down.weight", "lora_up.weight") if flat else ("lora_A.weight", "lora_B.weight")
    found |= {f"{stem}.{leaves[0]}": down, f"{stem}.{leaves[1]}": up}
    scale = 1.0
    if flat:
        found[f"{stem}.alpha"] = np.ones((), np.float32)
        scale = 1 / RANK
    change: np.ndarray = scale * (up.reshape(shape[0], RANK).astype(float) @ down.reshape(RANK, -1)).reshape(shape)
    return change


@dataclass(frozen=True)
class Outcome:
    """What is wrong with a merge, if anything, and how far off it is.

    Attributes:
        wrong: What is not as it should be; empty if all is.
        error: The greatest difference from what is wanted beyond one rounding to the stored type, as a share of the
            greatest change of the weight.
        changed: How many weights changed.
    """

    wrong: tuple[str, ...]
    error: float
    changed: int


def merged(combination: Combination, folder: Path) -> Outcome:
    """One merge, held to what diffusers' conversion says."""
    dtype = np.float16 if combination.layout == "variant" else np.float32
    weights = drawn(combination.network, dtype)
    base = written(weights, combination.layout, folder / "base")
    files = files_of(weights, combination.layout)
    whole = combination.layout in WHOLE or (
        combination.layout == "release" and len(KINDS[combination.network].inside) == len(weights.encoders)
    )
    lora = lora_of(weights, combination.spelling, encoders=whole)
    save_file(lora.tensors, folder / "lora.safetensors")
    merge(base, folder / "lora.safetensors", output=folder / "out")
    return compared(files, files_of(lora.added, combination.layout), folder / "base", folder / "out")


def check(combination: Combination, folder: Path) -> float:
    """Assert that a merge is right; how far it is off."""
    found = merged(combination, folder)
    assert not found.wrong
    assert found.error < TOLERANCE
    assert found.changed
    return found.error


def compared(files: Mapping[str, Arrays], added: Mapping[str, Arrays], base: Path, out: Path) -> Outcome:
    """What a merge wrote against what it was to write: same files, names, order, types and metadata; other values."""
    wrong, worst, changed = list[str](), 0.0, 0
    told = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wrong += [
        f"{name}: a file of one side only" for name in sorted(told ^ (made - {"surgery_manifest.json", "README.md"}))
    ]
    for name, tensors in files.items():
        if name not in made:
            continue
        if header(base / name) != header(out / name):
            wrong.append(f"{name}: another header")
        got = load_file(out / name)
        for key, tensor in tensors.items():
            delta = added[name][key]
            wanted = tensor.astype(float) + delta
            if not delta.any() and not np.array_equal(got[key], tensor):
                wrong.append(f"{key}: changed")
            if delta.any() and np.array_equal(got[key], tensor):
                wrong.append(f"{key}: not changed")
            changed += bool(delta.any())
            rounding = np.spacing(np.abs(wanted).astype(tensor.dtype)).astype(float) / 2
            excess = np.abs(got[key].astype(float) - wanted) - rounding
            worst = max(worst, float(excess.max(initial=0) / max(np.abs(delta).max(initial=0), 1e-30)))
    return Outcome(tuple(wrong), worst, changed)


def header(path: Path) -> list[tuple[str, Any]]:
    """Names in the order of the file, types and shapes, metadata."""
    with path.open("rb") as file:
        told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = told.pop("__metadata__", None)
    ordered = sorted(told.items(), key=lambda item: item[1]["data_offsets"])
    return [("__metadata__", metadata), *((name, (each["dtype"], each["shape"])) for name, each in ordered)]
