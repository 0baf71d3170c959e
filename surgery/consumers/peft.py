# SPDX-License-Identifier: Apache-2.0
"""PEFT: every kind it saves is what it loads, from files whose names are its own."""

from __future__ import annotations

from collections import Counter

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, ignored, refused
from surgery.consumers.starts import BY_PEFT
from surgery_formats.models.eras import expert_counts, taken_for_experts

__all__ = ["PEFT", "exceptions_of_peft"]

_DEFAULT_RANK = 8
_FUSED = (frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}))
"""Names that PEFT takes for two halves of one parameter, and not one without the other."""
_DOWN = (frozenset({"down_proj"}), frozenset({"w2"}))


def exceptions_of_peft(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """What depends on more than a trait."""
    if part.trait == "missing fields":
        return _of_missing(part, facts)
    return _of_experts(part, facts)


def _of_missing(part: AdapterPart, facts: AdapterFacts) -> TraitRule | None:
    """Fields that are null are an error; those that are not there have defaults."""
    if part.name in facts.config:
        return refused(f"its '{part.name}' is null, and it computes with it", "rewrite")
    ranks = {other.rank for other in facts.parts if other.rank is not None}
    if part.name == "r" and ranks - {_DEFAULT_RANK}:
        return refused(f"it takes r for {_DEFAULT_RANK}: 'size mismatch'", "rewrite")
    return None


def _of_experts(part: AdapterPart, facts: AdapterFacts) -> TraitRule | None:
    """Experts in dialects of other programs, what PEFT takes for experts, and what it renames twice."""
    if part.trait == "LoRA taken for experts":
        leaves = {other.leaf for other in facts.parts if other.trait == part.trait}
        if half := next((pair - leaves for pair in _FUSED if leaves & pair and not pair <= leaves), None):
            why = f"it takes '{part.leaf}' for experts of an older release, and asks for {min(half)} too"
            return refused(why, "rewrite")
    if facts.is_renamed_again(part):
        return ignored("it renames factors that already have the class's names, and finds no module for them", "drop")
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
    scale = alpha / r if isinstance(alpha, int | float) and isinstance(r, int) and r else None
    return all(count == whole for count in layers.values()) and all(
        part.leaf not in halves or (part.rank == r and part.scale == scale) for part in experts
    )


PEFT = RuledConsumer(
    name="peft",
    title="PEFT",
    version="0.21.2",
    oldest="0.21.2",
    sources=(
        SourceRead("peft", "0.21.2", "peft/peft_model.py", "PeftModel.from_pretrained"),
        SourceRead(
            "peft",
            "0.21.2",
            "peft/utils/transformers_weight_conversion.py",
            "_convert_peft_config_moe, convert_peft_adapter_state_dict_for_transformers",
        ),
        SourceRead("peft", "0.21.2", "peft/utils/save_and_load.py", "load_peft_weights, set_peft_model_state_dict"),
    ),
    dialect="peft",
    exceptions=exceptions_of_peft,
    rules=BY_PEFT,
)
