# SPDX-License-Identifier: Apache-2.0
"""Inputs of `same_bytes.py`: the shipped examples, the golden files, and small models and adapters with seeded values."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from same_bytes_models import EXPERTS, HEAD, HIDDEN, KEYS, LAYERS, LM, MLP, MODELS, VOCABULARY, Shape

__all__ = ["write_inputs"]

Tensors = dict[str, torch.Tensor]

RANK = 4


def write_inputs(checkout: Path, folder: Path) -> None:
    """Write all inputs of the jobs; equal bytes each time.

    Args:
        checkout: Whose examples and golden files are copied.
        folder: Where to; it must not exist yet.
    """
    folder.mkdir(parents=True)
    for name in ("base", "tuned", "lora", "dora", "prompt"):
        shutil.copytree(checkout / "examples" / name, folder / "examples" / name)
    shutil.copytree(_golden(checkout), folder / "golden", ignore=shutil.ignore_patterns("expected.*", "*.py", "*.md"))
    _write_models(folder)
    _write_llama_adapters(folder)
    _write_kinds(folder)
    _write_other_adapters(folder)


def _golden(checkout: Path) -> Path:
    """The folder of golden files, wherever in the checkout it lies."""
    for place, folders, _ in os.walk(checkout):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(place).name == "golden" and {"kohya", "mlx"} <= set(folders):
            return Path(place)
    raise FileNotFoundError(f"{checkout}: no folder 'golden' with 'kohya' and 'mlx'")


# --- values -------------------------------------------------------------------------------------------------------------


def _draw(name: str, *shape: int, scale: float = 0.12, mean: float = 0.0) -> torch.Tensor:
    """Normal numbers; the name is the seed, so that one more tensor leaves all others as they were."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy((mean + scale * values).astype(np.float32))


def _weight(name: str, shape: Shape) -> torch.Tensor:
    """Matrices about 0.12, gains about 1, biases about 0."""
    if len(shape) > 1:
        return _draw(name, *shape)
    return _draw(name, *shape, scale=0.05) if name.endswith("bias") else _draw(name, *shape, scale=0.1, mean=1.0)


def _tuned(base: Tensors) -> Tensors:
    """A fine-tune: each matrix moves in three directions and a little in all, each vector a little."""
    tuned = {}
    for name, value in base.items():
        moved = value + _draw(f"{name} noise", *value.shape, scale=0.002)
        if value.ndim == 2:
            for i in range(3):
                rows, columns = (_draw(f"{name} {i} {side}", size, scale=0.2) for side, size in enumerate(value.shape))
                moved = moved + rows[:, None] * columns[None, :]
        tuned[name] = moved
    return tuned


# --- models -------------------------------------------------------------------------------------------------------------


def _base(name: str) -> Tensors:
    return {key: _weight(f"{name} {key}", shape) for key, shape in MODELS[name][1].items()}


def _write_model(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        _write_json(folder / "config.json", {**LM, **config})


def _write_models(folder: Path) -> None:
    for name, (config, _) in MODELS.items():
        base = _base(name)
        _write_model(folder / name, base, config)
        if name in ("llama", "qwen2", "gpt2", "mixtral"):
            _write_model(folder / f"{name}-tuned", _tuned(base), config)
    config, llama = MODELS["llama"][0], _base("llama")
    _write_json(folder / "llama" / "tokenizer_config.json", {"model_max_length": 64})  # a file that is carried along
    _write_model(folder / "llama-bf16", {k: v.bfloat16() for k, v in llama.items()}, {**config, "dtype": "bfloat16"})
    longer = _tuned(llama) | {
        k: _draw(f"longer {k}", VOCABULARY + 3, HIDDEN) for k in (*HEAD, "model.embed_tokens.weight")
    }
    for key in (*HEAD, "model.embed_tokens.weight"):
        longer[key][:VOCABULARY] = llama[key]
    _write_model(folder / "llama-longer-tuned", longer, {**config, "vocab_size": VOCABULARY + 3})

    sharded, pickled = folder / "llama-sharded", folder / "llama-bin"
    for place, ending, count in ((sharded, "safetensors", 3), (pickled, "bin", 2)):
        _write_json(place / "config.json", {**LM, **config})
        stem = "model" if ending == "safetensors" else "pytorch_model"
        where: dict[str, str] = {}
        for i in range(count):
            part = {key: llama[key] for key in sorted(llama)[i::count]}
            file = f"{stem}-{i + 1:05}-of-{count:05}.{ending}"
            if ending == "safetensors":
                save_file(part, place / file, {"format": "pt"})
            else:
                torch.save(part, place / file)
            where |= dict.fromkeys(part, file)
        size = sum(value.nbytes for value in llama.values())
        _write_json(place / f"{stem}.{ending}.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    torch.save(llama, folder / "llama.pt")


# --- adapters -----------------------------------------------------------------------------------------------------------


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _write_peft(folder: Path, tensors: Tensors, *, pickled: bool = False, **config: Any) -> None:
    """Tensors by their names in the model, or by PEFT's own."""
    folder.mkdir(parents=True)
    named = {k if k.startswith("base_model.") else f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = {} if "peft_type" in config else {"peft_type": "LORA", "r": RANK, "lora_alpha": 6}
    _write_json(folder / "adapter_config.json", {**lora, "peft_version": "0.21.2", **config})


def _factors(seed: str, model: str, ranks: Mapping[str, int], *extra: str, transposed: bool = False) -> Tensors:
    """LoRA factors of all modules that end as the keys of `ranks`; `extra`: dora, lora_bias."""
    made: Tensors = {}
    for key, shape in MODELS[model][1].items():
        module = key.removesuffix(".weight")
        rank = next((rank for name, rank in ranks.items() if module == name or module.endswith(f".{name}")), 0)
        if not rank or not key.endswith(".weight"):
            continue
        name = f"{seed} {model} {module}"
        out, rest = (shape[1], shape[:1]) if transposed else (shape[0], shape[1:])
        if module.rpartition(".")[2] in ("embed_tokens", "wte", "embed"):
            made[f"{module}.lora_embedding_A"] = _draw(f"{name} A", rank, shape[0], scale=0.2)
            made[f"{module}.lora_embedding_B"] = _draw(f"{name} B", shape[1], rank, scale=0.2)
            out = shape[1]
        else:
            made[f"{module}.lora_A.weight"] = _draw(f"{name} A", rank, *rest, scale=0.2)
            made[f"{module}.lora_B.weight"] = _draw(f"{name} B", out, rank, *[1] * (len(rest) - 1), scale=0.2)
        if "dora" in extra:
            made[f"{module}.lora_magnitude_vector"] = _draw(f"{name} m", out, scale=0.1, mean=0.8)
        if "lora_bias" in extra:
            made[f"{module}.lora_B.bias"] = _draw(f"{name} bias", out, scale=0.05)
    return made


ALL_LINEAR = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), RANK)


def _write_llama_adapters(folder: Path) -> None:
    """LoRA and what PEFT stores beside it."""
    linear = sorted(ALL_LINEAR)
    _write_peft(folder / "lora", _factors("lora", "llama", ALL_LINEAR), target_modules=linear)
    half = {k: v.half() for k, v in _factors("half", "llama", ALL_LINEAR).items()}
    _write_peft(folder / "lora-fp16", half, target_modules=linear)
    _write_peft(
        folder / "lora-pickled", _factors("bin", "llama", {"q_proj": 3}), pickled=True, r=3, target_modules=["q_proj"]
    )
    patterns = _factors("patterns", "llama", {"q_proj": 4, "v_proj": 6, "up_proj": 2})
    _write_peft(
        folder / "lora-patterns",
        patterns,
        target_modules=["q_proj", "v_proj", "up_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 6, r".*\.mlp\..*": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 11, "up_proj": 3},
    )
    dora = _factors("dora", "llama", {"q_proj": 4, "down_proj": 4, "lm_head": 4, "embed_tokens": 4}, "dora")
    targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    _write_peft(folder / "lora-dora-embedding", dora, target_modules=targets, use_dora=True)
    saved = _factors("saved", "llama", {"q_proj": 4}) | {
        key: _draw(f"saved {key}", *shape, mean=1.0 if len(shape) == 1 else 0.0)
        for key, shape in MODELS["llama"][1].items()
        if "norm" in key or key in HEAD
    }
    _write_peft(folder / "lora-saved-modules", saved, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": _draw("rows", 3, HIDDEN)}
    tokens = _factors("rows", "llama", {"v_proj": 4}) | rows
    _write_peft(
        folder / "lora-tokens", tokens, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [3, 98, 0]}
    )
    resized = _factors("resized", "llama", {"k_proj": 4}) | {
        key: _draw(f"resized {key}", VOCABULARY + 3, HIDDEN) for key in (*HEAD, "model.embed_tokens.weight")
    }
    _write_peft(folder / "lora-resized", resized, target_modules=["k_proj"])
    wrong = {k: v[:, :-1] if "lora_A" in k else v for k, v in _factors("wrong", "llama", {"q_proj": 4}).items()}
    _write_peft(folder / "lora-wrong-base", wrong, target_modules=["q_proj"])


def _write_kinds(folder: Path) -> None:
    """PEFT's other kinds, all for llama, each on modules of its own."""
    layers = [f"model.layers.{i}" for i in range(LAYERS)]

    def drawn(tensors: Mapping[str, Shape], mean: float = 0.0) -> Tensors:
        return {f"{at}.{key}": _draw(f"{at} {key}", *s, mean=mean) for at in layers for key, s in tensors.items()}

    def write(name: str, kind: str, tensors: Tensors, *targets: str, **config: Any) -> None:
        _write_peft(folder / name, tensors, peft_type=kind, target_modules=list(targets), **config)

    ia3 = {"self_attn.k_proj.ia3_l": (KEYS, 1), "self_attn.v_proj.ia3_l": (KEYS, 1), "mlp.down_proj.ia3_l": (1, MLP)}
    write("ia3", "IA3", drawn(ia3, 1.0), "k_proj", "v_proj", "down_proj", feedforward_modules=["down_proj"])
    hada = {"hada_w1_a": (HIDDEN, 4), "hada_w1_b": (4, HIDDEN), "hada_w2_a": (HIDDEN, 4), "hada_w2_b": (4, HIDDEN)}
    write("loha", "LOHA", drawn({f"self_attn.q_proj.{k}": s for k, s in hada.items()}), "q_proj", r=4, alpha=6)
    lokr = {"lokr_w1": (8, 4), "lokr_w2_a": (7, 2), "lokr_w2_b": (2, 8)}
    write("lokr", "LOKR", drawn({f"mlp.up_proj.{k}": s for k, s in lokr.items()}), "up_proj", r=2, alpha=3)
    oft = drawn({"self_attn.o_proj.oft_R.weight": (4, 28)})
    write("oft", "OFT", oft, "o_proj", r=0, oft_block_size=8, use_cayley_neumann=True, num_cayley_neumann_terms=5)
    vera = drawn({"mlp.gate_proj.vera_lambda_b": (MLP,), "mlp.gate_proj.vera_lambda_d": (6,)})
    shared = {"base_model.vera_A": _draw("vera A", 6, HIDDEN), "base_model.vera_B": _draw("vera B", MLP, 6)}
    write("vera", "VERA", vera | shared, "gate_proj", r=6, save_projection=True)
    write("vera-drawn", "VERA", vera, "gate_proj", r=6, save_projection=False, projection_prng_key=7)
    norms = drawn({"input_layernorm.ln_tuning_layers.weight": (HIDDEN,)}, 1.0)
    write("ln-tuning", "LN_TUNING", norms, "input_layernorm")
    rows = {"model.embed_tokens.trainable_tokens_delta": _draw("rows alone", 2, HIDDEN)}
    write("trainable-tokens", "TRAINABLE_TOKENS", rows, "embed_tokens", token_indices=[4, 1])
    prefix = {"num_virtual_tokens": 5, "token_dim": KEYS, "num_attention_heads": 2, "num_layers": LAYERS}
    _write_prompt(folder / "prefix", (5, LAYERS * 2 * KEYS), peft_type="PREFIX_TUNING", **prefix)
    _write_prompt(folder / "prompt", (3, HIDDEN), peft_type="PROMPT_TUNING", num_virtual_tokens=3, token_dim=HIDDEN)


def _write_prompt(folder: Path, shape: Shape, **config: Any) -> None:
    folder.mkdir()
    save_file({"prompt_embeddings": _draw(folder.name, *shape, scale=0.5)}, folder / "adapter_model.safetensors")
    rest = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "peft_version": "0.21.2"}
    _write_json(folder / "adapter_config.json", {**config, **rest})


def _write_other_adapters(folder: Path) -> None:
    """For models other than llama."""
    biases = {k: _draw(f"all {k}", *s, scale=0.05) for k, s in MODELS["qwen2"][1].items() if k.endswith(".bias")}
    qkv = {"q_proj": 4, "v_proj": 4}
    _write_peft(
        folder / "qwen2-bias-all", _factors("all", "qwen2", qkv) | biases, target_modules=sorted(qkv), bias="all"
    )
    with_bias = _factors("own", "qwen2", qkv, "lora_bias")
    _write_peft(folder / "qwen2-lora-bias", with_bias, target_modules=sorted(qkv), lora_bias=True)
    embedding = _factors("embedding", "qwen2", {"embed_tokens": 4, "q_proj": 4})
    _write_peft(folder / "qwen2-embedding", embedding, target_modules=["embed_tokens", "q_proj"])
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": _draw("tied rows", 2, HIDDEN)}
    _write_peft(
        folder / "qwen2-tokens",
        _factors("tied", "qwen2", {"k_proj": 4}) | rows,
        target_modules=["k_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    conv1d = {"c_attn": 4, "c_fc": 4, "wte": 4}
    gpt2 = _factors("gpt2", "gpt2", {"c_attn": 4, "c_fc": 4}, transposed=True) | _factors("gpt2", "gpt2", {"wte": 4})
    _write_peft(folder / "gpt2-lora", gpt2, target_modules=sorted(conv1d), fan_in_fan_out=True)
    gains = {f"transformer.h.{i}.attn.c_attn.ia3_l": _draw(f"gain {i}", 96, 1, mean=1.0) for i in range(LAYERS)}
    _write_peft(folder / "gpt2-ia3", gains, peft_type="IA3", target_modules=["c_attn"], feedforward_modules=[])

    per_expert = _factors("expert", "mixtral", {"q_proj": 4, "w1": 4, "w2": 4, "w3": 4})
    _write_peft(folder / "mixtral-per-expert", per_expert, target_modules=["q_proj", "w1", "w2", "w3"])
    stacked, turned = _factors("stack", "mixtral", {"q_proj": 4}), _factors("turned", "mixtral", {"q_proj": 4})
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts"
        for inner, rows_, columns in ((".base_layer", 48, HIDDEN), ("", HIDDEN, 24)):  # gate_up_proj within down_proj
            for made, (a, b) in ((stacked, (columns, rows_)), (turned, (rows_, columns))):  # PEFT 0.19 turned the axes
                made[f"{at}{inner}.lora_A.weight"] = _draw(f"{at}{inner} A", EXPERTS * RANK, a, scale=0.2)
                made[f"{at}{inner}.lora_B.weight"] = _draw(f"{at}{inner} B", b, EXPERTS * RANK, scale=0.2)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    parameters: dict[str, Any] = {"target_parameters": names, "target_modules": ["q_proj"]}
    _write_peft(folder / "mixtral-parameters", stacked, **parameters)
    _write_peft(folder / "mixtral-parameters-old", turned, **parameters, peft_version="0.18.1")

    fused = {"qkv_proj": 4, "gate_up_proj": 4, "down_proj": 4}
    _write_peft(folder / "phi3-lora", _factors("fused", "phi3", fused), target_modules=sorted(fused))
    head = {"classifier.weight": _draw("classifier", 3, HIDDEN), "classifier.bias": _draw("classifier bias", 3)}
    classifier = _factors("bert", "bert", {"query": 4, "value": 4}) | head
    _write_peft(
        folder / "bert-lora",
        classifier,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    layers = _factors("layers", "layers", {"embed": 2, "conv1": 2, "conv2": 2, "conv3": 2, "head": 2})
    for key, (out, width) in {"attention": (30, 10), "attention.base_layer.out_proj": (10, 10)}.items():
        layers[f"{key}.lora_A.weight"] = _draw(f"{key} A", 2, width, scale=0.2)
        layers[f"{key}.lora_B.weight"] = _draw(f"{key} B", out, 2, scale=0.2)
    everything = ["embed", "conv1", "conv2", "conv3", "head", "attention"]
    _write_peft(folder / "layers-lora", layers, r=2, lora_alpha=3, target_modules=everything)

    inputs = {k.removesuffix(".weight"): s[1] for k, s in MODELS["qwen2"][1].items() if "proj.weight" in k}
    save_file(
        {
            f"{module}.activations": _draw(f"inputs of {module}", 200, width, scale=1.0)
            for module, width in inputs.items()
        },
        folder / "qwen2-inputs.safetensors",
    )
