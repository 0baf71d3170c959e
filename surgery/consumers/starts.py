# SPDX-License-Identifier: Apache-2.0
"""Where tables of rules start: what all programs that load adapters in one way make of traits.

A consumer names the start that it was read against and states what differs. A start lists its traits one by one and
takes none for granted: a new trait is in none of them, and is a question to every consumer until a start or the consumer
itself answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.traits import Trait
from surgery.consumers.verdict import Remedy

__all__ = ["BY_NAMES", "BY_PEFT", "NO_FOLDERS", "lora_alone"]

Rules = Mapping[Trait, TraitRule]

_PLACES: Rules = {
    "LoRA of an embedding": honoured,
    "LoRA of the head": honoured,
    "LoRA of a convolution": honoured,
    "LoRA of one expert": honoured,
    "LoRA of stacked experts": honoured,
    "LoRA of a turned weight": honoured,
}
"""A LoRA, wherever it is."""

BY_NAMES: Rules = {
    **_PLACES,
    "LoRA taken for experts": honoured,
    "LoRA on a changed base": ignored("it takes the factors for a LoRA of the base as it is", "lora"),
    "carried weight": honoured,
    "pattern of targets": honoured,
    "no targets": honoured,
    "beyond the targets": honoured,
    "unusable targets": honoured,
    "missing fields": honoured,
    "bias setting": honoured,
    "promised modules": honoured,
    "null patterns": honoured,
    "bare names": honoured,
    "targeted parameters": honoured,
    "added tokens": honoured,
}
"""Programs that find LoRAs by the names of their tensors, and ask the configuration for their scale alone."""

NO_FOLDERS: Rules = {
    **BY_NAMES,
    "block-diagonal factors": honoured,
    "wrapped names": honoured,
    "doubled prefix": honoured,
    "names of an adapter": honoured,
    "pickled weights": honoured,
    "other weight files": honoured,
}
"""Programs of another format, in which none of PEFT's fields, names and files is: a folder of PEFT they refuse whole."""

_BY_PEFT = "PEFT finds no module for its keys, and the adapter does nothing"
BY_PEFT: Rules = {
    **_PLACES,
    "LoRA taken for experts": ignored(
        "in this model type PEFT takes every module of this name for experts of an older release, and attaches nothing",
        "rewrite",
    ),
    "LoRA on a changed base": honoured,  # it takes the part away as it attaches the adapter
    "DoRA": honoured,
    "other kind": honoured,
    "bias of a LoRA": honoured,
    "trained bias": honoured,
    "saved norm": honoured,
    "saved head": honoured,
    "saved module": honoured,
    "saved vocabulary": honoured,
    "added rows": refused("the base has fewer rows, until somebody resizes it: 'size mismatch'", "drop"),
    "carried weight": honoured,
    "token rows": honoured,
    "virtual tokens": honoured,
    "pattern of targets": honoured,
    "no targets": honoured,
    "beyond the targets": ignored(
        "its configuration does not choose this module: PEFT gives it no LoRA, and leaves its factors out", "rewrite"
    ),
    "unusable targets": refused("PEFT cannot use it, or finds no module that it chooses", "rewrite"),
    "missing fields": honoured,
    "bias setting": honoured,
    "promised modules": refused(
        "PEFT asks the file for every module that the configuration names: 'KeyError'", "rewrite"
    ),
    "null patterns": refused("PEFT asks null for its keys: 'NoneType' object has no attribute 'keys'", "rewrite"),
    "block-diagonal factors": honoured,
    "bare names": ignored(_BY_PEFT, "rewrite"),
    "wrapped names": ignored(_BY_PEFT, "rewrite"),
    "doubled prefix": ignored(_BY_PEFT, "rewrite"),
    "names of an adapter": honoured,
    "targeted parameters": honoured,
    "added tokens": honoured,  # not looked at
    "pickled weights": honoured,
    "other weight files": refused("PEFT opens adapter_model.safetensors or adapter_model.bin", "rewrite"),
}
"""Programs that let PEFT load the adapter: every kind that it saves, from files whose names are its own."""


def lora_alone(outcome: Callable[[str, Remedy], TraitRule], why: str) -> Rules:
    """What a program that holds factors of LoRA and nothing else makes of all else, in one way and for one reason.

    Args:
        outcome: `ignored` or `refused`.
        why: See `TraitRule`.
    """
    return {
        "DoRA": outcome(why, "lora"),
        "other kind": outcome(why, "lora"),
        "bias of a LoRA": outcome(why, "drop"),
        "trained bias": outcome(why, "drop"),
        "saved norm": outcome(why, "drop"),
        "saved head": outcome(why, "drop"),
        "saved module": outcome(why, "saved"),
        "saved vocabulary": outcome(why, "saved"),
        "added rows": outcome(why, "drop"),
        "token rows": outcome(why, "drop"),
        "virtual tokens": outcome(why, ""),
    }
