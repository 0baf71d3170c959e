# SPDX-License-Identifier: Apache-2.0
"""SGLang: one rank and one scale, ``lora_alpha / r``, for all modules; query, key and value go together."""

from __future__ import annotations

from surgery.consumers.consumer import ModuleGroup, RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.scales import alpha_over_r
from surgery.consumers.starts import BY_NAMES

__all__ = ["SGLANG"]

_SKIPPED = "it is of no target module, and skipped"
_NO_TARGET = "'Cannot find target module name'"
_NAMES = (
    "q_proj k_proj v_proj qkv_proj o_proj out_proj in_proj gate_proj up_proj gate_up_proj down_proj embed_tokens lm_head "
    "q_a_proj kv_a_proj_with_mqa q_b_proj kv_b_proj wq_b wk weights_proj in_proj_qkvz fc1_latent_proj fc2_latent_proj w1 w2 w3"
)


_TOGETHER = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def _exceptions(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """What depends on more than a trait."""
    if part.trait == "beyond the targets":
        return _beyond(part, facts)
    if part.trait == "missing fields" and part.name in facts.config:
        return refused(f"its '{part.name}' is null", "rewrite")
    if part.trait == "saved norm" and not any(segment.isdecimal() for segment in part.module.split(".")):
        return ignored(_SKIPPED, "drop")
    return _of_experts(part, facts)


def _beyond(part: AdapterPart, facts: AdapterFacts) -> TraitRule:
    """It goes by the last names of targets, and by no choice of layers."""
    listed = facts.config.get("target_modules")
    names = {str(name).rpartition(".")[2] for name in listed} if isinstance(listed, list) else set()
    if isinstance(listed, str) or _TOGETHER.get(part.leaf, part.leaf) in {_TOGETHER.get(name, name) for name in names}:
        return honoured
    outside = part.leaf in ("embed_tokens", "lm_head")
    return ignored(_SKIPPED, "rewrite") if outside else refused(_NO_TARGET, "rewrite")


_UP, _DOWN = frozenset(["gate_proj", "up_proj", "gate_up_proj", "w1", "w3"]), frozenset(["down_proj", "w2"])


def _of_experts(part: AdapterPart, facts: AdapterFacts) -> TraitRule | None:
    """Stacks of experts by projection, which are called as single experts are, without a number; both halves, or neither acts."""
    if part.trait not in ("LoRA of one expert", "LoRA of stacked experts"):
        return None
    named = part.trait == "LoRA of one expert" or facts.dialect in ("sglang", "tinker")
    leaves = {module.rpartition(".")[2] for module in facts.modules}
    if not (leaves & _UP and leaves & _DOWN):
        why = "its experts have LoRA only where gate_up_proj and down_proj are both targets"
        return ignored(why, "drop") if named else refused(why, "drop")
    return honoured if named else None


SGLANG = RuledConsumer(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    oldest="0.5.23",
    sources=(
        SourceRead("sglang", "0.5.23", "sglang/srt/lora/lora_config.py", "LoRAConfig"),
        SourceRead("sglang", "0.5.23", "sglang/srt/lora/lora.py", "LoRAAdapter"),
        SourceRead("sglang", "0.5.23", "sglang/srt/lora/lora_manager.py", "LoRAManager.validate_new_adapter"),
        SourceRead("sglang", "0.5.23", "sglang/srt/lora/mem_pool.py", "LoRAMemoryPool.load_lora_weight_to_buffer"),
    ),
    scale=alpha_over_r,
    dialect="sglang",
    exceptions=_exceptions,
    one_rank=refused("its buffers have r rows: 'LoRA buffer shape does not match weight shape'", "pad"),
    leaves=frozenset(_NAMES.split()),
    other_leaf=refused("it has no buffer for a module of this name", "drop"),
    groups=(
        ModuleGroup("q_proj", "v_proj", refused("it puts q, k and v together, and v has no LoRA", "partners")),
        ModuleGroup("k_proj", "q_proj", refused("it puts q, k and v together, beginning at q", "partners")),
        ModuleGroup("v_proj", "q_proj", refused("it puts q, k and v together, beginning at q", "partners")),
        ModuleGroup("up_proj", "gate_proj", refused("it puts gate and up together, beginning at gate", "partners")),
    ),
    rules={
        **BY_NAMES,
        "LoRA of stacked experts": refused("its targets are parameters, and it reads lists of modules", "dialect"),
        "LoRA of a turned weight": refused("it has no buffer for a module of this name", "drop"),
        "LoRA of a convolution": refused("it has no buffer for a module of this name", "drop"),
        "DoRA": refused("'LoRA serving currently doesn't support DoRA adapters'", "lora"),
        "other kind": refused("it asserts that peft_type is LORA", "lora"),
        "bias of a LoRA": ignored("lora_B.weight comes after lora_B.bias and takes its place", "drop"),
        "trained bias": ignored("the factors of its module take its place", "drop"),
        "saved norm": refused(_NO_TARGET, "drop"),
        "saved head": ignored(_SKIPPED, "drop"),
        "saved module": refused(_NO_TARGET, "saved"),
        "saved vocabulary": ignored(_SKIPPED, "saved"),
        "added rows": ignored(_SKIPPED, "drop"),
        "token rows": ignored(_SKIPPED, "drop"),
        "virtual tokens": refused("it asserts that peft_type is LORA"),
        "pattern of targets": refused(
            "'Only all or all-linear can be used as the string for target module'", "rewrite"
        ),
        "no targets": refused("it asks null for targets", "rewrite"),
        "missing fields": refused("it asks for r and lora_alpha", "rewrite"),
        "block-diagonal factors": refused("its buffers have the sizes of whole factors", "rewrite"),
        "wrapped names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": honoured,
        "added tokens": refused("'LoRA serving currently doesn't support adapters that add tokens'", "drop"),
        "pickled weights": honoured,
        "other weight files": honoured,
    },
)
