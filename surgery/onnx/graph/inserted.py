# SPDX-License-Identifier: Apache-2.0
"""What was inserted into a graph that somebody else made, stored in the file beside what its exporter says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.onnx.graph.contract import Slot
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.models.families.inserted import from_fields

__all__ = ["INSERTED", "Inserted", "inserted_in"]

INSERTED = "surgery.inserted"
"""Key of ``metadata_props``."""
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Inserted:
    """Slots and adapters that are in a graph.

    Attributes:
        slots: Slots for LoRA adapters.
        adapters: ``{"name", "mode", "kind", "id"}`` and, by the mode, ``file`` (swapped) or ``strength``, the input that
            it is multiplied by (gated).
        replaceable: Inputs of modules that adapters insert.
        modules: These modules, as in a contract.
    """

    slots: tuple[Slot, ...] = ()
    adapters: tuple[Mapping[str, Any], ...] = ()
    replaceable: tuple[str, ...] = ()
    modules: tuple[Mapping[str, Any], ...] = ()

    def as_metadata(self) -> dict[str, str]:
        """As ``metadata_props`` of a graph."""
        stated = {key: value for key, value in asdict(self).items() if value or key in ("slots", "adapters")}
        return {INSERTED: json.dumps({"schema": _SCHEMA, **stated}, sort_keys=True, separators=(",", ":"))}


def inserted_in(props: Mapping[str, str], file: str | os.PathLike[str] = "model.onnx") -> Inserted:
    """Read what was inserted; the file is untrusted.

    Raises:
        MalformedError: it cannot be read.
    """
    if (text := props.get(INSERTED)) is None:
        return Inserted()
    entries = parse_object(text.encode("utf-8", "surrogatepass"), file=file)
    try:
        if entries.pop("schema") != _SCHEMA:
            raise MalformedError("what was inserted into it has another version", file=file, hint="insert it again")
        slots = tuple(Slot(**slot) for slot in entries.pop("slots", ()))
        found = Inserted(slots, *(tuple(entries.pop(name, ())) for name in ("adapters", "replaceable", "modules")))
        for module in found.modules:
            from_fields(module)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise MalformedError("what was inserted into it cannot be read", file=file, hint="insert it again") from error
    texts = [text for slot in found.slots for text in (slot.weight, slot.A, slot.B)] + [*found.replaceable]
    named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found.adapters)
    if entries or not named or not all(isinstance(text, str) for text in texts):
        raise MalformedError("what was inserted into it cannot be read", file=file, hint="insert it again")
    return found
