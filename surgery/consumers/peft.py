# SPDX-License-Identifier: Apache-2.0
"""PEFT: every kind it saves is what it loads, from files whose names are its own."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, TraitRule, honoured, ignored, refused
from surgery.consumers.facts import AdapterFacts, AdapterPart
from surgery.consumers.traits import TRAITS

__all__ = ["PEFT", "TAKEN", "of_experts"]

TAKEN = (
    "in this model type it takes every module of this name for experts of an older release, and attaches nothing here"
)

_NO_NAMES = "its keys are of no module: 'Found missing adapter keys', and the adapter does nothing"


_FUSED = (frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}))
"""Names that PEFT takes for two halves of one parameter, and not one without the other."""


def of_experts(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """Experts in dialects of other programs, what PEFT takes for experts, and what it renames twice."""
    if part.trait == "LoRA taken for experts":
        leaves = {other.leaf for other in facts.parts if other.trait == part.trait}
        if half := next((pair - leaves for pair in _FUSED if leaves & pair and not pair <= leaves), None):
            why = f"it takes '{part.leaf}' for experts of an older release, and asks for {min(half)} too"
            return refused(why, "rewrite")
    if facts.is_renamed_again(part):
        return ignored("it renames factors that already have the class's names, and finds no module for them", "drop")
    experts = part.trait in ("LoRA of stacked experts", "LoRA of one expert")
    if not experts or facts.dialect in ("", "peft", "peft-0.18", "unsloth-linears"):
        return None
    return ignored(
        f"its experts are in the dialect {facts.dialect}, which PEFT reads otherwise or not at all", "dialect"
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
