# SPDX-License-Identifier: Apache-2.0
"""``lora_adapter_metadata`` in a header: each component's LoraConfig, as diffusers writes and reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.scales import ADAPTER_METADATA
from surgery_formats.adapters.writing import commonest
from surgery_formats.canonical.adapter import Adapter

__all__ = ["header_of"]


def header_of(adapter: Adapter, ranks: Mapping[tuple[str, str], tuple[int, float]], dialect: Dialect) -> dict[str, str]:
    """The header's field that states ranks and alphas.

    Args:
        adapter: What is written; fields of its own header that still hold are kept.
        ranks: Rank and alpha of modules, by component and path.
        dialect: Of the format, for the components' names.
    """
    before = json.loads(adapter.metadata.get(ADAPTER_METADATA, "{}"))
    fields: dict[str, Any] = {}
    for component in dict.fromkeys(component for component, _ in ranks):
        mine = {module: pair for (owner, module), pair in ranks.items() if owner == component}
        name = (dialect.prefix_for(component) or "").rstrip(".")
        dotted = f"{name}." if name else ""
        rank, alpha = commonest(r for r, _ in mine.values()), commonest(a for _, a in mine.values())
        fields |= {key: value for key, value in before.items() if key.startswith(dotted)}
        fields |= {
            f"{dotted}r": rank,
            f"{dotted}lora_alpha": _number(alpha),
            f"{dotted}rank_pattern": {_whole(m): r for m, (r, _) in sorted(mine.items()) if r != rank},
            f"{dotted}alpha_pattern": {_whole(m): _number(a) for m, (_, a) in sorted(mine.items()) if a != alpha},
            f"{dotted}use_rslora": False,
            f"{dotted}peft_type": "LORA",
            f"{dotted}target_modules": sorted(mine),
        }
    return {ADAPTER_METADATA: json.dumps(fields, indent=2, sort_keys=True)} if fields else {}


def _whole(module: str) -> str:
    """A pattern that matches this module alone."""
    return f"^{re.escape(module)}"


def _number(value: float | None) -> float | int | None:
    return int(value) if value is not None and value == int(value) else value
