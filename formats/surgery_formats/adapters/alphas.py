# SPDX-License-Identifier: Apache-2.0
"""The one alpha of all LoRAs of a file: as it is stated beside them, as the user gives it, as it is written."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.text import show

__all__ = ["LARGEST_ALPHA", "TELL_ALPHA", "agreed_alpha", "stated_alpha", "written_alpha"]

TELL_ALPHA = "give the alpha that it was trained with as `alpha=`, which inspect, merge and convert take"
"""What to do about a file that states no scale, whichever command opened it."""
LARGEST_ALPHA = 1e30  # products with weights stay finite in float32


def stated_alpha(value: object, file: Path) -> float:
    """The alpha that a file states.

    Raises:
        MalformedError: no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_ALPHA:
        raise MalformedError(f"its alpha is {show(repr(value), 40)}, not a finite number", file=file)
    return float(value)


def agreed_alpha(stated: object, given: float | None, beside: str, file: Path) -> float:
    """The alpha of the weights in `file`: the one that the file `beside` it states, or else the one that was given.

    Raises:
        MalformedError: the stated one is no finite number.
        FitError: there is none, or the two differ.
    """
    if stated is None:
        if given is None:
            raise FitError(
                "the scale of its LoRAs is not in its file",
                file=file,
                hint=f"put {beside} beside it, or {TELL_ALPHA}",
            )
        return given
    alpha = stated_alpha(stated, file.with_name(beside))
    if given not in (None, alpha):
        raise FitError(f"an alpha of {given:g} was given, {beside} says {alpha:g}", file=file)
    return alpha


def written_alpha(alpha: float) -> float | int:
    """As configurations have it: without a fraction where there is none."""
    return int(alpha) if alpha == int(alpha) else alpha
