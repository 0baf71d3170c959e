# SPDX-License-Identifier: Apache-2.0
"""``lora_adapter_metadata`` in a header: each component's LoraConfig, as diffusers writes and reads it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.errors import MalformedError

if TYPE_CHECKING:
    from surgery_formats.adapters.peft.read_config import PeftConfig

__all__ = ["ADAPTER_METADATA", "configs_of", "header_of"]

ADAPTER_METADATA = "lora_adapter_metadata"
"""The field of the header. Its keys are those of a LoraConfig behind the component: ``transformer.r``."""


def configs_of(metadata: Mapping[str, str], path: Path) -> dict[str, PeftConfig]:
    """The configurations in a header by component; none if it has none.

    Raises:
        MalformedError: the field is not what diffusers writes.
        FitError: a switch that no merged weight can have.
    """
    parted = _parted(metadata, path)
    if not parted:
        return {}
    from surgery_formats.adapters.peft.embedded import embedded_config  # for the few files that need it

    return {component: embedded_config(fields, path) for component, fields in parted.items() if "r" in fields}


def header_of(
    metadata: Mapping[str, str],
    modules: Mapping[str, Mapping[str, tuple[int, float]]],
    path: Path,
    biased: Collection[str] = (),
    directed: Collection[str] = (),
) -> dict[str, str]:
    """The field that states ranks and alphas.

    Args:
        metadata: Of the file that it was made from.
        modules: Rank and alpha of modules by path, by component as the header calls it.
        path: That file, for errors.
        biased: Components whose factors have biases beside them.
        directed: Those that have magnitudes beside them.
    """
    from surgery_formats.adapters.peft.embedded import embedded_fields

    before = _parted(metadata, path)
    fields: dict[str, Any] = {}
    for component, stated in modules.items():
        dotted = f"{component}." if component else ""
        fields |= {
            f"{dotted}{key}": value
            for key, value in embedded_fields(
                before.get(component, {}), stated, biased=component in biased, directed=component in directed
            ).items()
        }
    return {ADAPTER_METADATA: json.dumps(fields, indent=2, sort_keys=True)} if fields else {}


def _parted(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """``{"transformer.r": 4, "transformer.lora_alpha": 8, ...}`` by component."""
    text = metadata.get(ADAPTER_METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"'{ADAPTER_METADATA}' in its header is not JSON", file=path) from error
    if not isinstance(fields, dict):
        raise MalformedError(f"'{ADAPTER_METADATA}' in its header is not an object", file=path)
    parted: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, dot, field = key.partition(".")
        parted.setdefault(component if dot else "", {})[field if dot else key] = value
    return parted
