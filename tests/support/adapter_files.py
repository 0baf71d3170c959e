# SPDX-License-Identifier: Apache-2.0
"""Adapters and bases made with safetensors and json alone, and what they mean by the formats' published equations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray]

GOLDEN = Path(__file__).parents[1] / "golden"


def write_base(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object], name: str = "model.safetensors"
) -> Path:
    """A model with seeded float32 weights."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_peft(folder: Path, tensors: Mapping[str, np.ndarray], **config: object) -> Path:
    """A PEFT folder, whose configuration has the ranks of the tensors unless it states its own."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = {} if "peft_type" in config else {"peft_type": "LORA", "lora_alpha": 8, **_ranks(tensors)}
    (folder / "adapter_config.json").write_text(json.dumps({**lora, **config}))
    return folder


def _ranks(tensors: Mapping[str, np.ndarray]) -> dict[str, object]:
    ranks = {
        key.removeprefix("base_model.model.").rpartition(mark)[0]: value.shape[0]
        for key, value in tensors.items()
        for mark in (".lora_A.", ".lora_embedding_A")
        if mark in key
    }
    common = next(iter(ranks.values()), 8)
    return {"r": common, "rank_pattern": {key: rank for key, rank in ranks.items() if rank != common}}


def write_mlx(folder: Path, tensors: Mapping[str, np.ndarray], **config: object) -> Path:
    """An MLX-LM folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def draw(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """Seeded normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def config_of(folder: Path) -> dict[str, object]:
    """adapter_config.json."""
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return found


def peft_deltas(folder: Path) -> Arrays:
    """``module -> (alpha / r) B A`` in float64, patterns matched as PEFT's ``get_pattern_key`` does."""
    config = config_of(folder)
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    out: Arrays = {}
    for key in tensors:
        for mark, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if not key.endswith(mark):
                continue
            stem = key.removesuffix(mark)
            module = stem.removeprefix("base_model.model.")
            a, b = tensors[key], tensors[stem + other]
            alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
            rank = _pattern(config.get("rank_pattern"), module, config["r"])
            assert a.shape[0] == rank, f"{module}: PEFT would build rank {rank}"
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            delta = scale * (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1))
            out[module] = delta.T if "embedding" in mark else delta
    return out


def _pattern(patterns: object, module: str, default: object) -> float:
    found = patterns if isinstance(patterns, dict) else {}
    return float(next((v for k, v in found.items() if re.match(rf"(.*\.)?({k})$", module)), default))  # type: ignore[arg-type]


def mlx_deltas(folder: Path, embeddings: tuple[str, ...] = ("embed_tokens",)) -> Arrays:
    """``module -> s (a b)^T``, the rank being the configuration's, as mlx-lm insists."""
    parameters = config_of(folder)["lora_parameters"]
    assert isinstance(parameters, dict)
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / "adapters.safetensors").items()}
    out: Arrays = {}
    for key in (k for k in tensors if k.endswith(".lora_a")):
        module = key.removesuffix(".lora_a")
        a, b = tensors[key], tensors[f"{module}.lora_b"]
        assert a.shape[1] == b.shape[-2 if a.ndim == 2 else -1] == parameters["rank"]
        delta = parameters["scale"] * (b @ a if a.ndim == 3 else a @ b)
        out[module] = delta if a.ndim == 3 or module.endswith(embeddings) else delta.T
    return out


def kohya_deltas(file: Path) -> Arrays:
    """``key -> (alpha / rank) up down``, flattened."""
    tensors = {k: v.astype(np.float64) for k, v in load_file(file).items()}
    out: Arrays = {}
    for key in (k for k in tensors if k.endswith(".lora_down.weight")):
        module = key.removesuffix(".lora_down.weight")
        down, up = tensors[key], tensors[f"{module}.lora_up.weight"]
        alpha = float(tensors.get(f"{module}.alpha", np.array(down.shape[0])))
        out[module] = alpha / down.shape[0] * (up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1))
    return out


def assert_close(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], tolerance: float = 1e-6) -> None:
    """Equal names, and values within `tolerance` of the greatest of each."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert np.abs(got[name] - value).max() <= tolerance * np.abs(value).max(), name


UNET = {
    "conv_in.weight": (4, 3, 3, 3),
    "conv_in.bias": (4,),
    "down_blocks.0.attentions.0.proj_in.weight": (4, 4, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (6, 4),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (4, 6),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (4,),
    "down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3),
    "down_blocks.0.resnets.0.norm1.weight": (4,),
}
LLAMA = {
    "model.embed_tokens.weight": (11, 6),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in (("self_attn.q_proj", (6, 6)), ("self_attn.k_proj", (4, 6)), ("mlp.down_proj", (6, 8)))
    },
    "lm_head.weight": (11, 6),
}


def unet(folder: Path) -> Path:
    """A UNet of a few weights."""
    return write_base(folder, UNET, {"_class_name": "UNet2DConditionModel"}, "diffusion_pytorch_model.safetensors")


def llama(folder: Path, *, tied: bool = False) -> Path:
    """A decoder of a few weights."""
    shapes = {name: shape for name, shape in LLAMA.items() if not (tied and name == "lm_head.weight")}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    return write_base(folder, shapes, config)


def llama_lora(folder: Path, **config: object) -> Path:
    """A LoRA of rank 2 on one matrix of `llama`."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 6), f"{stem}.lora_B.weight": draw(2, 6, 2)}
    return write_peft(folder, tensors, **{"r": 2, "lora_alpha": 3, **config})


def unet_lora(folder: Path) -> Path:
    """A LoRA of rank 2 on one convolution of `unet`."""
    stem = "base_model.model.conv_in"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 3, 3, 3), f"{stem}.lora_B.weight": draw(1, 4, 2, 1, 1)}
    return write_peft(folder, tensors, r=2)


def merged(base: Path, adapter: Path, out: Path) -> Arrays:
    """Every weight after a merge, as ``component/name`` for a pipeline."""
    from surgery import merge

    merge(base, adapter, output=out)
    files = sorted(out.rglob("*.safetensors"))
    prefix = {file: f"{file.parent.name}/" if file.parent != out else "" for file in files}
    return {f"{prefix[file]}{name}": value for file in files for name, value in load_file(file).items()}


def assert_expected(
    base: Path, got: Mapping[str, np.ndarray], expected: Path, tolerance: float = 1e-6, share: float = 1.0
) -> None:
    """Golden weights are met within `tolerance` of the greatest change of each, and nothing else changed.

    Args:
        base: A file, or a folder of files.
        got: Every weight, as `merged` names it.
        expected: Weights that change, as they are afterwards; one that is wider than before begins with what it was.
        share: Of the change, which was to be made.
    """
    files = sorted(base.rglob("*.safetensors")) if base.is_dir() else [base]
    before = {
        (f"{file.parent.name}/" if file.parent != base and file != base else "") + name: value.astype(np.float64)
        for file in files
        for name, value in load_file(file).items()
    }
    want = load_file(expected)
    assert want.keys() <= before.keys() == got.keys()
    for name, value in before.items():
        if name not in want:
            assert np.array_equal(got[name], value), name
            continue
        old = np.zeros(want[name].shape)
        old[tuple(slice(size) for size in value.shape)] = value
        step = want[name] - old
        assert got[name].shape == step.shape, name
        assert np.abs(got[name] - old - share * step).max() <= tolerance * np.abs(step).max(), name
