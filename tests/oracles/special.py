# SPDX-License-Identifier: Apache-2.0
"""Oracles and adapters for cases where PEFT's own merge is wrong or cannot be had."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from tests.oracles import disk, models, peft_oracle
from tests.oracles.cases import Answer, Trained

__all__ = ["converted", "in_order", "linear_formula", "partway", "per_expert", "untied"]

EMBEDDINGS = {
    "qwen2": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
    "whisper": ("model.decoder.embed_tokens.weight", "proj_out.weight"),
}


def untied(trained: Trained) -> Answer:
    """Tied embeddings: what the *attached* model computes, from a merge into a copy whose head is a tensor of its own.

    The logits are those of PEFT's attached model on the tied base (there PEFT is right). Where both halves end equal the answer is
    tied again, otherwise it holds both tensors and says so in the config.
    """
    tensors = disk.read_tensors(trained.base)
    embed, head = EMBEDDINGS[trained.arch]
    if head in tensors:
        raise AssertionError(f"{trained.base} is not tied")
    copy = trained.scratch / "untied"
    copy.mkdir()
    fields = json.loads((trained.base / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    disk.write_safetensors(copy / "model.safetensors", {**tensors, head: tensors[embed]})
    adapters = []
    for i, (path, weight) in enumerate(trained.adapters):
        config, weights = disk.adapter(path)
        if config.get("ensure_weight_tying"):  # on the copy both halves are ordinary targets
            config = {**config, "ensure_weight_tying": False, "target_modules": [*config["target_modules"], "lm_head"]}
        adapters.append((disk.write_adapter(trained.scratch / f"untied-adapter{i}", config, weights), weight))
    merged = peft_oracle.merge(trained.arch, copy, adapters).tensors
    with peft_oracle.quiet():
        attached = models.run(trained.arch, peft_oracle.attach(trained.arch, trained.base, trained.adapters, "float64"))
    if torch.allclose(merged[embed], merged[head], rtol=0, atol=1e-14):
        del merged[head]
        return Answer(merged, attached, {"tie_word_embeddings": True})
    return Answer(merged, attached, {"tie_word_embeddings": False})


def linear_formula(trained: Trained) -> Answer:
    """W + alpha / r * B A per pair in float64; for adapters of linear layers whose keys are on-disk names."""
    merged = {k: v.double() if v.is_floating_point() else v for k, v in disk.read_tensors(trained.base).items()}
    for path, weight in trained.adapters:
        config, tensors = disk.adapter(path)
        for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            alpha = config["lora_alpha"]
            for pattern, value in config["alpha_pattern"].items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    alpha = value
                    break
            scale = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + weight * scale * (b @ a)
    return Answer(merged, None, {})


def in_order(trained: Trained) -> Answer:
    """PEFT's merge, one adapter after the other, where the attached adapters act in another order."""
    return Answer(peft_oracle.merge(trained.arch, trained.base, trained.adapters).tensors, None, {})


def partway(trained: Trained) -> Answer:
    """``W + w (W' - W)`` with PEFT's own merge W': what a weight means for one adapter of a kind that PEFT cannot weigh."""
    [(path, weight)] = trained.adapters
    whole = peft_oracle.merge(trained.arch, trained.base, [(path, 1.0)]).tensors
    base = {k: v.double() if v.is_floating_point() else v for k, v in disk.read_tensors(trained.base).items()}
    return Answer(
        {k: base[k] + weight * (v - base[k]) if v.is_floating_point() else v for k, v in whole.items()}, None, {}
    )


def per_expert(
    module: str, parts: Sequence[str], experts: Sequence[int] = (0, 1, 2), **config: Any
) -> Callable[[Path, Path, torch.Generator], None]:
    """An adapter as PEFT wrote it under transformers 4: one LoRA per expert and projection, and one on q_proj."""

    def make(base: Path, folder: Path, generator: torch.Generator) -> None:
        weights = disk.read_tensors(base)
        fields = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", *parts],
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            **config,
        }
        paths = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        paths += [f"model.layers.{i}.{module}.experts.{e}.{part}" for i in (0, 1) for e in experts for part in parts]
        tensors = {}
        for path in paths:
            rank = next(
                (r for p, r in fields["rank_pattern"].items() if re.match(rf"(.*\.)?({p})$", path)), fields["r"]
            )
            out, width = weights[f"{path}.weight"].shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = 0.2 * torch.randn(rank, width, generator=generator)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
        disk.write_adapter(folder, fields, tensors)

    return make


def converted(init: str) -> Callable[[Path, Path, torch.Generator], None]:
    """A PiSSA or OLoRA adapter saved as plain LoRA of twice the rank, as PEFT's guide tells to."""

    def make(base: Path, folder: Path, generator: torch.Generator) -> None:
        with peft_oracle.quiet():
            model = models.load("llama", base, "float32")
            config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
            wrapped = peft.get_peft_model(model, config)
            initial = folder.parent / "initial"
            wrapped.peft_config["default"].init_lora_weights = True  # or loading it would take the base apart again
            wrapped.save_pretrained(initial)
            wrapped.peft_config["default"].init_lora_weights = init
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and "lora_" in name:
                    parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            trained = models.run("llama", wrapped.eval())
            wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
            again = models.run("llama", peft_oracle.attach("llama", base, [(folder, 1.0)], "float32"))
        torch.testing.assert_close(again, trained, rtol=0, atol=1e-4)

    return make
