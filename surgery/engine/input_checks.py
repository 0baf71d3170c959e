# SPDX-License-Identifier: Apache-2.0
"""Checks of options and inputs that several verbs make, each with one wording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from surgery_formats.adapters.format import Rendering
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import content_id
from surgery_formats.text import listing, show

__all__ = ["check_base_id", "check_nothing_dropped", "float_type"]

_SHOWN = 3  # reasons why parts are dropped, and the parts of each


def float_type(name: str, stored: str = "factors") -> DType | None:
    """The type that a ``dtype`` option names; None for ``keep``.

    Args:
        name: ``keep``, ``fp32``, ``fp16``, ``bf16``, ``fp64``.
        stored: What will be of that type, for messages.

    Raises:
        UsageError: not a name.
        FitError: no such type, or not a floating point one.
    """
    if not isinstance(name, str):
        raise UsageError(f"dtype is a name such as 'bf16', not {type(name).__name__}")
    if name == "keep":
        return None
    hint = "keep, fp32, fp16, bf16 or fp64"
    try:
        dtype = DType.parse(name)
    except ValueError as error:
        raise FitError(f"no type '{show(name)}'", hint=hint) from error
    if not dtype.is_float:
        raise FitError(f"{stored} cannot be stored as {dtype.label}", hint=hint)
    return dtype


def check_base_id(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Compare the base's content id with the one that an adapter records, where it records one; reads the base then.

    Raises:
        FitError: it is another base.
    """
    recorded = [adapter for adapter in adapters if adapter.base_id]
    actual = content_id(checkpoint) if recorded else ""
    for adapter in recorded:
        if adapter.base_id != actual:
            raise FitError(
                f"was made for a base with content id {adapter.base_id[:16]}..., this base has {actual[:16]}...",
                file=adapter.path,
                hint="use it with the base it was made for",
            )


def check_nothing_dropped(
    rendering: Rendering, target: str, file: Path, hint: str | None, *, base: Checkpoint | None
) -> None:
    """Refuse a rendering that leaves updates out.

    Args:
        rendering: Of an adapter in the format `target`.
        target: For the message.
        file: The adapter.
        hint: What to do about it.
        base: The base that it was rendered with. Where there was none and a reason names it, a base is what is missing.

    Raises:
        FitError: an update was dropped.
    """
    dropped = [entry for entry in rendering.entries if entry.outcome == "dropped"]
    if dropped:
        sites: dict[str, list[str]] = {}
        for entry in dropped:
            sites.setdefault(entry.detail, []).append(f"'{show(entry.site)}'")
        reasons = [f"{listing(names, _SHOWN)} ({why})" for why, names in list(sites.items())[:_SHOWN]]
        more = sum(map(len, list(sites.values())[_SHOWN:]))
        reasons += [f"and {more} more"] if more else []
        raise FitError(
            f"{target} cannot hold {len(dropped)} of {len(rendering.entries)} parts: {'; '.join(reasons)}",
            file=file,
            hint="give the base with `base=`" if base is None and any("the base" in why for why in sites) else hint,
        )
