# SPDX-License-Identifier: Apache-2.0
"""Olive's convert-adapters: one scale for all, patterns are not looked at; every tensor of the file becomes an input."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused, remedy_of_kind
from surgery.consumers.scales import alpha_over_r_or_root
from surgery.consumers.starts import BY_NAMES, lora_alone

__all__ = ["OLIVE"]

_UNBOUND = "it is written, and no input of the graph has its name"


def _of_kind(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """Configurations of other kinds, of which AdaLoRA's has all that is asked for."""
    if facts.adapter.kind != "LORA" and "lora_alpha" not in facts.config:
        return refused("its configuration has no 'lora_alpha'", remedy_of_kind(part))
    if facts.adapter.kind == "ADALORA" and part.trait == "other kind":
        return ignored("its factors have other names than the graph's inputs", "lora")
    return None


OLIVE = RuledConsumer(
    name="olive",
    title="Olive convert-adapters",
    version="0.13.0",
    oldest="0.13.0",
    sources=(SourceRead("olive-ai", "0.13.0", "olive/cli/convert_adapters.py", "ConvertAdaptersCommand.run"),),
    scale=alpha_over_r_or_root,
    exceptions=_of_kind,
    rules={
        **BY_NAMES,
        **lora_alone(ignored, _UNBOUND),
        "LoRA of an embedding": ignored(_UNBOUND, "drop"),
        "LoRA of the head": ignored("the file calls it 'base_model.model.lm_head', the graph 'lm_head'", "drop"),
        "LoRA of stacked experts": ignored(_UNBOUND, "drop"),
        "LoRA of a convolution": ignored("it turns the factors as matrices", "drop"),
        "DoRA": refused("'DoRA adapters are not supported for export'", "lora"),
        "other kind": refused("its configuration is not one of LoRA", "lora"),
        "bias of a LoRA": ignored("it is scaled as B is, and no input of the graph has its name", "drop"),
        "saved vocabulary": ignored(_UNBOUND, "drop"),
        "virtual tokens": refused("its configuration is not one of LoRA"),
        "block-diagonal factors": refused("its factors have the sizes of blocks", "rewrite"),
        "wrapped names": ignored(_UNBOUND, "rewrite"),
        "doubled prefix": ignored(_UNBOUND, "rewrite"),
        "names of an adapter": ignored(_UNBOUND, "rewrite"),
        "pickled weights": honoured,
        "other weight files": refused("PEFT opens adapter_model.safetensors or adapter_model.bin", "rewrite"),
    },
)
