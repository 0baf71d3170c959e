# SPDX-License-Identifier: Apache-2.0
"""Other spellings of an adapter: each takes ``(config, tensors)`` of a PEFT adapter and returns another pair."""

from __future__ import annotations

import re
from typing import Any

from tests.oracles.cases import Config, Rewrite, Tensors

__all__ = ["adapter_name", "config", "drop", "keep", "minimal", "peft_018", "rename", "vit_v4"]


def config(**fields: Any) -> Rewrite:
    """Set fields of the config."""
    return lambda old, tensors: ({**old, **fields}, tensors)


def minimal(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The four fields that third-party trainers write."""
    return {k: old[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}, tensors


def keep(*names: str) -> Rewrite:
    """Only these fields of the config."""
    return lambda old, tensors: ({name: old[name] for name in names}, tensors)


def drop(*modules: str) -> Rewrite:
    """Remove all tensors of the modules whose path contains one of these."""

    def edit(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        kept = {k: v for k, v in tensors.items() if not any(m in k for m in modules)}
        if len(kept) in (0, len(tensors)):
            raise ValueError(f"{modules} drops {len(tensors) - len(kept)} of {len(tensors)} tensors")
        return old, kept

    return edit


def rename(old_text: str, new_text: str) -> Rewrite:
    """Replace part of every key that has it."""

    def rewrite(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        renamed = {k.replace(old_text, new_text, 1): v for k, v in tensors.items()}
        if renamed.keys() == tensors.keys():
            raise ValueError(f"no key has {old_text!r}: {sorted(tensors)[:3]}")
        targets = (
            [t.replace("lm_head", "embed_out") for t in old["target_modules"]]
            if "embed_out" in new_text
            else old["target_modules"]
        )
        return {**old, "target_modules": targets}, renamed

    return rewrite


_LIVE = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?=\.|$)")


def adapter_name(name: str) -> Rewrite:
    """Keys as in the live state dict, with the adapter's name left in."""

    def rewrite(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        renamed = {}
        for key, value in tensors.items():
            new, hits = _LIVE.subn(rf".\1.{name}", key)
            if not hits:  # modules_to_save: <module>.weight -> <module>.modules_to_save.<name>.weight
                module, leaf = key.rsplit(".", 1)
                new = f"{module}.modules_to_save.{name}.{leaf}"
            elif "magnitude" in new:
                new += ".weight"
            renamed[new] = value
        return old, renamed

    return rewrite


_VIT = (
    (r"\.vit\.layers\.(\d+)\.", r".vit.encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_VIT_TARGETS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def vit_v4(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """ViT module names as transformers 4 had them (and as the checkpoint has them on the disk)."""
    renamed = {}
    for key, value in tensors.items():
        for pattern, new in _VIT:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    if renamed.keys() & tensors.keys():
        raise ValueError(f"not renamed: {sorted(renamed.keys() & tensors.keys())}")
    return {**old, "target_modules": [_VIT_TARGETS[t] for t in old["target_modules"]]}, renamed


def peft_018(old: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Expert adapters in the axis order of PEFT before 0.19.

    For a parameter P (E, P1, P2) the order since 0.19 is A (E*r, P2), B (P1, r*E) with delta[e] = B_e A_e; before, A (E*r, P1),
    B (P2, r*E) with delta[e] = (B_e A_e)^T. The same delta has A_old_e = B_new_e^T and B_old_e = A_new_e^T.
    """
    out = dict(tensors)
    for key in [k for k in tensors if ".experts." in k and k.endswith("lora_A.weight")]:
        key_b = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[key_b]
        experts = 3
        a3 = a.reshape(experts, -1, a.shape[1])  # (E, r, P2)
        b3 = b.reshape(b.shape[0], -1, experts)  # (P1, r, E)
        out[key] = b3.permute(2, 1, 0).reshape(-1, b.shape[0])  # (E*r, P1)
        out[key_b] = a3.permute(2, 1, 0).reshape(a.shape[1], -1)  # (P2, r*E)
    return {**old, "peft_version": "0.18.1"}, out
