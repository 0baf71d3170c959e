# SPDX-License-Identifier: Apache-2.0
"""transformers' ``model.load_adapter``: PEFT without its model class, so without what that keeps for the whole model."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.peft import exceptions_of_peft
from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.starts import BY_PEFT

__all__ = ["TRANSFORMERS"]

_NO_NAMES = "its keys are of no module, and the adapter does nothing"
_OPENS = "it opens adapter_model.safetensors"
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
    rules={
        **BY_PEFT,
        "DoRA": ignored("its magnitudes are found under no name of its own", "lora"),
        "added rows": refused("the base has fewer rows: 'ignore_mismatched_sizes'", "drop"),
        "virtual tokens": refused("it knows no prompt learning"),
        "promised modules": honoured,
        "bare names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": ignored(_NO_NAMES, "rewrite"),
        "pickled weights": refused(_OPENS, "rewrite"),
        "other weight files": refused(_OPENS, "rewrite"),
    },
)
