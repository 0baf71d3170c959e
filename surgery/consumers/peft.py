# SPDX-License-Identifier: Apache-2.0
"""PEFT: every kind it saves is what it loads, from files whose names are its own."""

from __future__ import annotations

from collections import Counter

from surgery.consumers.consumer import RuledConsumer, SourceRead, TraitRule, honoured, ignored, refused
from surgery.consumers.facts import AdapterFacts, AdapterPart
from surgery.consumers.traits import TRAITS
from surgery_formats.models.eras import expert_counts, taken_for_experts

__all__ = ["PEFT", "TAKEN", "of_experts"]

TAKEN = (
    "in this model type it takes every module of this name for experts of an older release, and attaches nothing here"
)

_NO_NAMES = "its keys are of no module: 'Found missing adapter keys', and the adapter does nothing"


_FUSED = (frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}))
"""Names that PEFT takes for two halves of one parameter, and not one without the other."""
_DOWN = (frozenset({"down_proj"}), frozenset({"w2"}))


def of_experts(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """Experts in dialects of other programs, and what PEFT takes for experts."""
    if part.trait == "LoRA taken for experts":
        leaves = {other.leaf for other in facts.parts if other.trait == part.trait}
        if half := next((pair - leaves for pair in _FUSED if leaves & pair and not pair <= leaves), None):
            why = f"it takes '{part.leaf}' for experts of an older release, and asks for {min(half)} too"
            return refused(why, "rewrite")
    experts = part.trait in ("LoRA of stacked experts", "LoRA of one expert")
    if not experts or facts.dialect in ("", "peft", "peft-0.18", "unsloth-linears") or _stacked_as_loaded(facts):
        return None
    return ignored(
        f"its experts are in the dialect {facts.dialect}, which PEFT reads otherwise or not at all", "dialect"
    )


def _stacked_as_loaded(facts: AdapterFacts) -> bool:
    """Whether PEFT stacks these LoRAs of single experts rightly as it loads them (``_convert_peft_config_moe``).

    It joins gate and up with twice the configured rank and alpha, which is another scale under rsLoRA and for halves of a
    rank or scale of their own; without the down projection it looks for gate and up under names that they do not have.
    """
    experts = [part for part in facts.parts if part.trait == "LoRA of one expert"]
    leaves = {part.leaf for part in experts}
    halves = next((pair for pair in _FUSED if pair <= leaves), frozenset[str]())
    known = taken_for_experts(facts.main.config)
    if (
        facts.dialect != "per-expert"
        or facts.config.get("use_rslora")
        or leaves - halves not in _DOWN
        or leaves - known
    ):
        return False
    whole = len(leaves) * max(expert_counts(facts.main.config), default=0)
    layers = Counter(part.module.partition(".experts.")[0] for part in experts)
    r, alpha = facts.config.get("r"), facts.config.get("lora_alpha")
    if halves and not (r and alpha):
        return False
    return all(count == whole for count in layers.values()) and all(
        part.leaf not in halves or (part.rank == r and part.scale == alpha / r) for part in experts
    )


PEFT = RuledConsumer(
    name="peft",
    title="PEFT",
    version="0.21.2",
    oldest="0.21.2",
    sources=(
        SourceRead("peft", "0.21.2", "peft/peft_model.py", "PeftModel.from_pretrained"),
        SourceRead("peft", "0.21.2", "peft/utils/transformers_weight_conversion.py", "_convert_peft_config_moe"),
        SourceRead("peft", "0.21.2", "peft/utils/save_and_load.py", "load_peft_weights, set_peft_model_state_dict"),
    ),
    dialect="peft",
    exceptions=of_experts,
    rules=dict.fromkeys(TRAITS, honoured)
    | {
        "added rows": refused("the base has fewer rows, until somebody resizes it: 'size mismatch'", "drop"),
        "null patterns": refused("it asks null for its keys: 'NoneType' object has no attribute 'keys'", "rewrite"),
        "LoRA taken for experts": ignored(TAKEN, "rewrite"),
        "bare names": ignored(_NO_NAMES, "rewrite"),
        "wrapped names": ignored(_NO_NAMES, "rewrite"),
        "other weight files": refused(
            "it opens adapter_model.safetensors or adapter_model.bin, and no other file", "rewrite"
        ),
    },
)
