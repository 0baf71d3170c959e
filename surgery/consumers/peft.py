# SPDX-License-Identifier: Apache-2.0
"""PEFT: every kind it saves is what it loads, from files whose names are its own."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, TraitRule, honoured, ignored, refused
from surgery.consumers.facts import AdapterFacts, AdapterPart
from surgery.consumers.traits import TRAITS

__all__ = ["PEFT", "of_experts"]

_NO_NAMES = "its keys are of no module: 'Found missing adapter keys', and the adapter does nothing"


def of_experts(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """Experts in dialects of other programs."""
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
        SourceRead("peft", "0.21.2", "peft/utils/save_and_load.py", "load_peft_weights, set_peft_model_state_dict"),
    ),
    dialect="peft",
    exceptions=of_experts,
    rules=dict.fromkeys(TRAITS, honoured)
    | {
        "added rows": refused("the base has fewer rows, until somebody resizes it: 'size mismatch'", "drop"),
        "null patterns": refused("it asks null for its keys: 'NoneType' object has no attribute 'keys'", "rewrite"),
        "bare names": ignored(_NO_NAMES, "rewrite"),
        "wrapped names": ignored(_NO_NAMES, "rewrite"),
        "other weight files": refused(
            "it opens adapter_model.safetensors or adapter_model.bin, and no other file", "rewrite"
        ),
    },
)
