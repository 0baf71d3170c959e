# SPDX-License-Identifier: Apache-2.0
"""transformers' ``model.load_adapter``: PEFT without its model class, so without what that keeps for the whole model."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, TraitRule, honoured, ignored, refused
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.peft import BEYOND, TAKEN, exceptions_of_peft
from surgery.consumers.traits import TRAITS

__all__ = ["TRANSFORMERS"]

_NO_NAMES = "its keys are of no module, and the adapter does nothing"
_SHARED = frozenset({"VERA"})
"""Kinds with factors that all layers share, as far as they were tried."""


def _exceptions(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    if part.trait == "other kind" and facts.adapter.kind in _SHARED:
        return refused("'inject_adapter_in_model' has no place for what layers share", "lora")
    return exceptions_of_peft(part, facts, version)


TRANSFORMERS = RuledConsumer(
    name="transformers",
    title="transformers load_adapter",
    version="5.23.0",
    oldest="5.23.0",
    sources=(
        SourceRead("transformers", "5.23.0", "transformers/integrations/peft.py", "PeftAdapterMixin.load_adapter"),
        SourceRead("peft", "0.21.2", "peft/mapping.py", "inject_adapter_in_model"),
    ),
    dialect="peft",
    exceptions=_exceptions,
    rules=dict.fromkeys(TRAITS, honoured)
    | {
        "DoRA": ignored("its magnitudes are found under no name of its own", "lora"),
        "LoRA taken for experts": ignored(TAKEN, "rewrite"),
        "added rows": refused("the base has fewer rows: 'ignore_mismatched_sizes'", "drop"),
        "virtual tokens": refused("it knows no prompt learning"),
        "beyond the targets": ignored(BEYOND, "rewrite"),
        "null patterns": refused("it asks null for its keys: 'NoneType' object has no attribute 'keys'", "rewrite"),
        "wrapped names": ignored(_NO_NAMES, "rewrite"),
        "names of an adapter": ignored(_NO_NAMES, "rewrite"),
        "pickled weights": refused("it opens adapter_model.safetensors", "rewrite"),
        "other weight files": refused("it opens adapter_model.safetensors", "rewrite"),
    },
)
