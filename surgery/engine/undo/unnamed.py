# SPDX-License-Identifier: Apache-2.0
"""Which adapters were merged into a model, for a user who names none of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.engine.nearby import nearby_inputs
from surgery.engine.undo.belongs import recorded_inputs
from surgery.engine.undo.record import adapters_of
from surgery.engine.undo.restore import described
from surgery.engine.undo.sidecar import open_sidecar
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import SurgeryError, UsageError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.models.side_files import BASE_ROUNDING
from surgery_formats.text import exact, numbered

__all__ = ["none_named"]


def none_named(model: Path, kept: Path | None) -> UsageError:
    """What to tell who named no adapter of the merged `model`: what was merged, and the command, if all of it lies near.

    Args:
        model: The model's folder, or file.
        kept: What a reversible merge kept.

    Raises:
        FitError: no merge wrote the folder.
        InputError: the manifest or `kept` cannot be read.
    """
    merged = _merged(model, kept)
    if not merged:
        return UsageError(
            "no adapter was named, and nothing beside the model says which were merged into it",
            file=model,
            hint="name them as they were merged, in their order: ADAPTER=WEIGHT",
        )
    found = _found(model, merged)
    told = ", ".join(map(described, merged))
    hint = "name them as they were merged, in their order: ADAPTER=WEIGHT"
    if len(found) == len(merged):
        named = " ".join(_argument(path, record) for path, record in zip(found, merged, strict=True))
        elsewhere = kept is not None and kept != model / BASE_ROUNDING
        beside = f" --base-rounding {shlex.quote(str(kept))}" if elsewhere else ""
        hint = f"surgery unmerge {shlex.quote(str(model))} {named}{beside} -o OUT"
    return UsageError(
        f"no adapter was named, and {numbered(len(merged), 'adapter')} {'was' if len(merged) == 1 else 'were'} merged into it: {told}",
        file=model,
        hint=hint,
    )


def _merged(model: Path, kept: Path | None) -> Sequence[Mapping[str, Any]]:
    """The records of the adapters; those of a manifest have no names."""
    records: Any = None
    if kept is not None:
        records = open_sidecar(kept).facts.get("adapters")
    elif model.is_dir() and (inputs := recorded_inputs(model)) is not None:
        records = inputs["adapters"]
    if not isinstance(records, list) or not all(map(_is_record, records)):
        return ()
    return records


def _is_record(record: object) -> bool:
    if not isinstance(record, Mapping) or not isinstance(record.get("files"), list):
        return False
    weight = record.get("weight")
    return isinstance(weight, int | float) and all(isinstance(each, str) for each in record["files"])


def _found(model: Path, merged: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The adapters that lie here or beside the model, by the content of their files; fewer than `merged` if one is missing."""
    places: dict[tuple[str, ...], Path] = {}
    for place in nearby_inputs(model / MANIFEST):
        with suppress(SurgeryError, OSError):
            ((identity,),) = [adapters_of([(read_adapter(place), 1.0)])]
            places.setdefault(tuple(identity["files"]), place)
    keys = [tuple(record["files"]) for record in merged]
    return [places[key] for key in keys if key in places]


def _argument(path: Path, record: Mapping[str, Any]) -> str:
    here = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    plain = record["weight"] == 1 and "=" not in here
    return shlex.quote(here if plain else f"{here}={exact(record['weight'])}")
