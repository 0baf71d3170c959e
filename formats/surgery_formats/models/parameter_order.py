# SPDX-License-Identifier: Apache-2.0
"""The order in which transformers registers the parameters of a module that holds several: PEFT nests LoRAs by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from surgery_formats.errors import FitError
from surgery_formats.text import listing

__all__ = ["innermost_first", "is_order_known"]

_ORDER = (
    *("weight", "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias"),
    *("w1", "w3", "w2"),
)


def is_order_known(names: Collection[str]) -> bool:
    """Whether it is known in which order these parameters of one module were registered."""
    return len(names) < 2 or set(names) <= set(_ORDER)


def innermost_first(names: Sequence[str], file: Path | None) -> list[str]:
    """Parameters of a module in the order in which PEFT nests their LoRAs: the first registered is the innermost.

    Args:
        names: Without their module.
        file: For messages.

    Raises:
        FitError: there are several, and the order of one of them is not known.
    """
    if not is_order_known(names):
        raise FitError(f"which of {listing(sorted(names))} is the inner one is not known", file=file)
    return sorted(names, key=_ORDER.index) if len(names) > 1 else list(names)
