# SPDX-License-Identifier: Apache-2.0
"""Adapters of the kinds that people serve, over tiny bases, as PEFT saves them or as files of other eras say the same.

``truth`` says what an adapter means: ``trained``, the logits of the model that was trained, or ``loaded``, what PEFT makes of
the files where they say something else on purpose (rounded, or with fields and tensors removed).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from tests.loaders.loading import IDS
from tests.oracles import disk
from tests.oracles.peft_oracle import quiet, randomise

__all__ = ["ADAPTERS", "BASES", "VOCAB", "Edit", "Sample", "build", "build_base", "fixed_config", "logits_of"]

Edit = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]

VOCAB = 128
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_SIZES,
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,  # as in every published one; llama.cpp does not ask
        },
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Sample:
    """How one adapter comes to be: a PEFT configuration, and what is done to its files afterwards."""

    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "LoraConfig"
    base: str = "llama"
    edit: Edit | None = None
    truth: str = "trained"
    pickled: bool = False
    grow: int = 0  # rows added to the vocabulary before training


def _lora(**config: Any) -> Sample:
    return Sample({"target_modules": ATTENTION, **config})


def _without_optional(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields that PEFT 0.2 wrote."""
    keys = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha")
    more = ("lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "task_type")
    return {k: config[k] for k in (*keys, *more)}, tensors


def _minimal(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {k: config[k] for k in ("lora_alpha", "peft_type", "r", "target_modules")}, tensors


def _default_in_names(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}


def _without_prefix(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}


def _compiled(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in tensors.items()}


def _renamed(old: str, new: str) -> Edit:
    return lambda config, tensors: (config, {k.replace(old, new): v for k, v in tensors.items()})


def _unset(field: str) -> Edit:
    return lambda config, tensors: ({k: v for k, v in config.items() if k != field}, tensors)


def _set(**fields: Any) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**config, **fields}, tensors

    return edit


def _stored(dtype: torch.dtype) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return config, {k: v.to(dtype) for k, v in tensors.items()}

    return edit


def _without(*parts: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return config, {k: v for k, v in tensors.items() if not any(part in k for part in parts)}

    return edit


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, Sample] = {
    # scales and ranks
    "plain": _lora(),
    "rslora": _lora(use_rslora=True),
    "alpha-float": _lora(lora_alpha=5.5),
    "rank-odd": _lora(r=3),
    "rank-24": _lora(r=24),
    "rank-pattern": _lora(rank_pattern={"layers.1.self_attn.q_proj": 2, "o_proj": 6}),
    "alpha-pattern": _lora(alpha_pattern={"v_proj": 17, "layers.0.self_attn.o_proj": 1}),
    "patterns-rslora": _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}, use_rslora=True),
    # which modules
    "query-value": _lora(target_modules=["q_proj", "v_proj"]),
    "query-only": _lora(target_modules=["q_proj"]),
    "query-key": _lora(target_modules=["q_proj", "k_proj"]),
    "value-only": _lora(target_modules=["v_proj"]),
    "up-down": _lora(target_modules=["up_proj", "down_proj"]),
    "gate-down": _lora(target_modules=["gate_proj", "down_proj"]),
    "regex": _lora(target_modules=r".*\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"),
    "all-linear": _lora(target_modules="all-linear"),
    "full-names": _lora(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]),
    "layers-to-transform": _lora(target_modules=LINEAR, layers_to_transform=[1], layers_pattern="layers"),
    "exclude": _lora(target_modules=LINEAR, exclude_modules=["k_proj"]),
    "embedding": _lora(target_modules=["embed_tokens", *ATTENTION]),
    "head": _lora(target_modules=["lm_head", *ATTENTION]),
    # more than factors
    "dora": _lora(use_dora=True),
    "head-saved": _lora(modules_to_save=["lm_head"]),
    "embedding-saved": _lora(modules_to_save=["embed_tokens"]),
    "norm-saved": _lora(modules_to_save=["input_layernorm"]),
    "token-rows": _lora(trainable_token_indices=[3, 99]),
    "added-tokens": Sample({"target_modules": ATTENTION}, grow=2),
    "lora-bias": _lora(lora_bias=True),
    "layer-replication": _lora(layer_replication=[[0, 2], [1, 2]]),
    "bdlora": _lora(
        target_modules=["q_proj", "v_proj", "o_proj"],
        use_bdlora={"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2},
    ),
    "activated": _lora(alora_invocation_tokens=[64, 127], task_type="CAUSAL_LM"),
    # drawn from the base's weights
    "pissa": _lora(init_lora_weights="pissa"),
    "olora": _lora(init_lora_weights="olora"),
    "gaussian": _lora(init_lora_weights="gaussian"),
    # files
    "bfloat16": Sample({"target_modules": ATTENTION}, edit=_stored(torch.bfloat16), truth="loaded"),
    "float16": Sample({"target_modules": ATTENTION}, edit=_stored(torch.float16), truth="loaded"),
    "pickled": Sample({"target_modules": ATTENTION}, pickled=True),
    "config-early": Sample({"target_modules": ATTENTION}, edit=_without_optional),
    "config-minimal": Sample({"target_modules": ATTENTION}, edit=_minimal),
    "config-newer": Sample({"target_modules": ATTENTION}, edit=_set(use_tomorrow=False)),
    "fan-in-fan-out": Sample({"target_modules": ATTENTION}, edit=_set(fan_in_fan_out=True)),
    "alpha-null": Sample({"target_modules": ATTENTION}, edit=_set(rank_pattern=None, alpha_pattern=None)),
    "rank-contradicts": Sample({"target_modules": ATTENTION}, edit=_set(r=8), truth="trained"),
    "names-default": Sample({"target_modules": ATTENTION}, edit=_default_in_names),
    "names-bare": Sample({"target_modules": ATTENTION}, edit=_without_prefix),
    "names-compiled": Sample({"target_modules": ATTENTION}, edit=_compiled),
    "factor-missing": Sample({"target_modules": ATTENTION}, edit=_without("layers.1.self_attn.o_proj.lora_B")),
    "layer-missing": Sample({"target_modules": ATTENTION}, edit=_without("layers.1.self_attn.o_proj"), truth="loaded"),
    "names-parallel": Sample(
        {"target_modules": ATTENTION}, edit=_renamed("base_model.model.", "base_model.model.module.")
    ),
    "names-doubled": Sample(
        {"target_modules": ATTENTION}, edit=_renamed("base_model.model.", "base_model.model.base_model.model.")
    ),
    # configurations that say less or more than the file
    "targets-fewer": Sample({"target_modules": ATTENTION}, edit=_set(target_modules=["q_proj", "v_proj"])),
    "layers-fewer": Sample({"target_modules": ATTENTION}, edit=_set(layers_to_transform=[0])),
    "excluded-later": Sample({"target_modules": ATTENTION}, edit=_set(exclude_modules=["q_proj"])),
    "targets-null": Sample({"target_modules": ["q_proj", "v_proj"]}, edit=_set(target_modules=None)),
    "no-alpha": Sample({"target_modules": ATTENTION, "lora_alpha": 8}, edit=_unset("lora_alpha")),
    "no-r": Sample({"target_modules": ATTENTION, "r": 8}, edit=_unset("r")),
    "bias-promised": _lora(bias="all"),
    "head-promised": Sample({"target_modules": ATTENTION}, edit=_set(modules_to_save=["lm_head"])),
    "last-norm-saved": _lora(modules_to_save=["model.norm"]),
    # other kinds
    "loha": Sample({"r": 2, "alpha": 3, "target_modules": ATTENTION}, "LoHaConfig"),
    "lokr": Sample({"r": 2, "alpha": 3, "target_modules": ATTENTION}, "LoKrConfig"),
    "ia3": Sample(
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "IA3Config"
    ),
    "oft": Sample({"oft_block_size": 8, "r": 0, "target_modules": ATTENTION}, "OFTConfig"),
    "vera": Sample({"r": 8, "target_modules": ["q_proj", "o_proj"]}, "VeraConfig"),
    "adalora": Sample(
        {"init_r": 4, "target_r": 4, "total_step": 10, "lora_alpha": 6, "target_modules": ATTENTION}, "AdaLoraConfig"
    ),
    "prompt": Sample({"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, "PromptTuningConfig"),
    "prefix": Sample({"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, "PrefixTuningConfig"),
    "layernorm": Sample({"target_modules": ["input_layernorm"]}, "LNTuningConfig"),
    # other bases
    "qwen2-plain": Sample({"target_modules": LINEAR}, base="qwen2"),
    "qwen2-bias-lora-only": Sample({"target_modules": ATTENTION, "bias": "lora_only"}, base="qwen2"),
    "qwen2-bias-all": Sample({"target_modules": ATTENTION, "bias": "all"}, base="qwen2"),
    "qwen2-tied-embedding": Sample({"target_modules": ["embed_tokens", *ATTENTION]}, base="qwen2"),
    "qwen2-tied-head": Sample({"target_modules": ["lm_head", *ATTENTION]}, base="qwen2"),
    "moe-attention": Sample({"target_modules": ATTENTION}, base="qwen3_moe"),
    "moe-experts": Sample({"target_modules": ATTENTION, "target_parameters": EXPERTS}, base="qwen3_moe"),
    "moe-down-only": Sample({"target_modules": ATTENTION, "target_parameters": EXPERTS[1:]}, base="qwen3_moe"),
    "moe-router": Sample(
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.gate.weight"]}, base="qwen3_moe"
    ),
}


def build_base(name: str, folder: Path) -> Path:
    """Write the base ``name``, every parameter random."""
    kind, fields = BASES[name]
    torch.manual_seed(zlib.crc32(name.encode()) % 1000)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields))
        for parameter in model.parameters():
            mean = 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0
            parameter.data = mean + 0.15 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_experts",):  # of models on the hub, which transformers 5 renames when it saves
        if key in fields:
            config[key] = fields[key]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def fixed_config(base: Path, folder: Path) -> Path:
    """Give a model that transformers saved the fields of its base's configuration that it renames."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config, indent=2))
    return folder


def _load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits_of(model: Any) -> Tensor:
    """Logits of ``IDS``, the last positions where virtual tokens were put before them."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits[0]
    return logits[-len(IDS) :, :VOCAB].double()


def build(name: str, base: Path, folder: Path, samples: Mapping[str, Sample] = ADAPTERS) -> tuple[Tensor, Tensor]:
    """Write the adapter ``name`` and say what it means: the logits of the base, and of the base with it."""
    sample = samples[name]
    seed = zlib.crc32(name.encode())
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6} if sample.kind == "LoraConfig" else {}
    with quiet():
        torch.manual_seed(seed)
        model = _load(base)
        before = logits_of(model)
        if sample.grow:
            model.resize_token_embeddings(VOCAB + sample.grow, mean_resizing=False)
        wrapped = peft.get_peft_model(model, getattr(peft, sample.kind)(**{**fields, **sample.config}))
        randomise(wrapped, torch.Generator().manual_seed(seed))
        wrapped.save_pretrained(folder)
        meant = logits_of(wrapped)
        config, tensors = disk.adapter(folder)
        for key in ("rank_pattern", "alpha_pattern"):  # PEFT sorts them when it saves
            if config.get(key):
                config[key] = dict(sample.config[key])
        if sample.edit is not None:
            config, tensors = sample.edit(config, tensors)
        config["base_model_name_or_path"] = base.name
        disk.write_adapter(folder, config, tensors, pickled=sample.pickled)
        if sample.grow:
            (folder / "added_tokens.json").write_text(json.dumps({f"<new{i}>": VOCAB + i for i in range(sample.grow)}))
        if sample.truth == "loaded":
            meant = logits_of(peft.PeftModel.from_pretrained(_load(base), folder))
    if float((meant - before).abs().max()) < 0.05 * float(before.abs().max()):
        raise AssertionError(f"{name} changes next to nothing")
    return before, meant
