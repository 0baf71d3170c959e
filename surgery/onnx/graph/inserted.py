# SPDX-License-Identifier: Apache-2.0
"""What was inserted into a graph that somebody else made, stored in the file beside what its exporter says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.contract import Slot, contract_of
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.models.families.inserted import from_fields

if TYPE_CHECKING:
    import onnx

__all__ = ["INSERTED", "Inserted", "inserted_in", "state_inserted", "stated_inserted"]

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
        stated["slots"] = [slot.as_fields() for slot in self.slots]
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
        slots = tuple(Slot.of(slot) for slot in entries.pop("slots", ()))
        found = Inserted(slots, *(tuple(entries.pop(name, ())) for name in ("adapters", "replaceable", "modules")))
        for module in found.modules:
            from_fields(module)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise MalformedError("what was inserted into it cannot be read", file=file, hint="insert it again") from error
    named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found.adapters)
    if (
        entries
        or not named
        or not all((*(slot.is_sound for slot in found.slots), *(isinstance(name, str) for name in found.replaceable)))
    ):
        raise MalformedError("what was inserted into it cannot be read", file=file, hint="insert it again")
    return found


def stated_inserted(model: onnx.ModelProto, file: str | os.PathLike[str]) -> Inserted:
    """What a graph says was inserted into it: its contract, if it has one, else a record of its own.

    Raises:
        MalformedError: it cannot be read.
    """
    contract = contract_of(model, file)
    if contract is None:
        return inserted_in({one.key: one.value for one in model.metadata_props}, file)
    return Inserted(contract.slots, contract.adapters, contract.replaceable, contract.inserted)


def state_inserted(model: onnx.ModelProto, inserted: Inserted, file: str | os.PathLike[str]) -> None:
    """Say `inserted` in a graph, in the place of what it says: in its contract, if it has one.

    Raises:
        MalformedError: its contract cannot be read.
    """
    props = {one.key: one.value for one in model.metadata_props}
    contract = contract_of(model, file)
    if contract is not None:
        props |= replace(
            contract,
            slots=inserted.slots,
            adapters=inserted.adapters,
            replaceable=inserted.replaceable,
            inserted=inserted.modules,
        ).as_metadata()
    elif inserted == Inserted():
        props.pop(INSERTED, None)
    else:
        props |= inserted.as_metadata()
    del model.metadata_props[:]
    for key, value in props.items():
        model.metadata_props.add(key=key, value=value)
