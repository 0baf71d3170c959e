# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter was trained on a quantised base, as far as its own files tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import SurgeryError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["QuantisedBase", "quantised_base_of"]

_NAMES: tuple[tuple[str, str, str], ...] = (
    (r"bnb[-_]4bit|nf4", "bitsandbytes NF4", "nf4"),
    (r"bnb[-_]8bit|int8|[-_]8bit", "8 bits", ""),
    (r"gptq", "GPTQ", ""),
    (r"awq", "AWQ", ""),
    (r"gguf", "GGUF", ""),
    (r"nvfp4", "NVFP4", ""),
    (r"mxfp4", "MXFP4", ""),
    (r"fp8", "FP8", ""),
    (r"hqq", "HQQ", ""),
    (r"w4a16|int4|4[-_]?bit", "4 bits", ""),
)
"""In the last part of a base's name: a pattern, what it says, and the rule of bitsandbytes where it says that."""
_CARD = 1 << 18  # bytes of a model card that are looked at
_TRUE = r"\W+true\b"


@dataclass(frozen=True, slots=True)
class QuantisedBase:
    """A quantised base that an adapter was trained on.

    Attributes:
        method: What quantised it.
        rule: ``nf4``, ``nf4-double``, ``fp4``, ``fp4-double`` where bitsandbytes did, on the fly: what it made of a
            release follows from that; empty where only the quantised files tell, such as those of unsloth.
        evidence: Where that is said, for people.
    """

    method: str
    rule: str
    evidence: str


def quantised_base_of(adapter: Adapter) -> QuantisedBase | None:
    """What the adapter's own files say; None if they say nothing of quantisation.

    Looked at are its configuration, the name of its base, and the card that PEFT writes beside it.
    """
    found = _of_config(adapter) or _of_card(adapter) or _of_name(adapter.base_name)
    if found is not None and re.match(r"unsloth/.*bnb[-_]4bit", adapter.base_name, re.IGNORECASE):
        return replace(found, rule="")  # its models have other modules in 16 bits each, which no rule tells
    return found


def _of_config(adapter: Adapter) -> QuantisedBase | None:
    named = adapter.config.get("quantization_config")
    if not isinstance(named, Mapping):
        return None
    return _of_fields(named, "quantization_config in its configuration")


def _of_fields(named: Mapping[str, Any], evidence: str) -> QuantisedBase | None:
    if named.get("load_in_4bit") or named.get("_load_in_4bit"):
        quant_type = named.get("bnb_4bit_quant_type")
        kind = "nf4" if quant_type == "nf4" else "fp4"  # which is bitsandbytes' default
        double = bool(named.get("bnb_4bit_use_double_quant"))
        method = f"bitsandbytes {kind.upper()}{' with nested scales' if double else ''}"
        return QuantisedBase(method, f"{kind}{'-double' if double else ''}", evidence)
    if named.get("load_in_8bit") or named.get("_load_in_8bit"):
        return QuantisedBase("bitsandbytes int8", "", evidence)
    by = named.get("quant_method")
    return QuantisedBase(show(by, 40), "", evidence) if isinstance(by, str) and by != "bitsandbytes" else None


def _of_card(adapter: Adapter) -> QuantisedBase | None:
    card = adapter.path / "README.md" if adapter.path.is_dir() else None
    if card is None or not card.is_file():
        return None
    try:
        file = open_file(card)
        text = file.read(0, min(file.size, _CARD)).decode("utf-8", "replace").lower()
    except SurgeryError:
        return None  # a card is no part of an adapter
    flags = {
        key: re.search(rf"\b{key}{_TRUE}", text) is not None
        for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant")
    }
    quant_type = re.search(r"\bbnb_4bit_quant_type\W+(nf4|fp4)\b", text)
    named: dict[str, Any] = {**flags, "bnb_4bit_quant_type": quant_type[1] if quant_type else None}
    if flags["load_in_4bit"] and quant_type is None:
        named["bnb_4bit_quant_type"] = "nf4"  # what training programs choose that do not say so
    return _of_fields(named, "its README.md")


def _of_name(base_name: str) -> QuantisedBase | None:
    last = base_name.rstrip("/").rpartition("/")[2].lower()
    for pattern, method, rule in _NAMES:
        if re.search(rf"(?:^|[^a-z0-9])(?:{pattern})(?:$|[^a-z0-9])", last):
            return QuantisedBase(method, rule, f"its base is called '{show(base_name, 80)}'")
    return None
