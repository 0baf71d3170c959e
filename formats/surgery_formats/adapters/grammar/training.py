# SPDX-License-Identifier: Apache-2.0
"""What sd-scripts says of a network in the header of its file: rank, alpha, and the arguments it was trained with.

Source: sd-scripts, ``train_network.py`` (``ss_network_dim``, ``ss_network_alpha``, ``ss_network_module``, ``ss_network_args``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.adapters.writing import commonest
from surgery_formats.updates import LoRA

__all__ = ["network_arguments", "positive_number", "restate_network", "stated_dims"]

_DIM, _ALPHA = "ss_network_dim", "ss_network_alpha"


def network_arguments(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The arguments of the network; none if the header has none that can be read."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def stated_dims(metadata: Mapping[str, str]) -> tuple[tuple[int, float], ...]:
    """``(dim, alpha)`` of all modules and of convolutions, which have theirs among the arguments; as far as both are known."""
    arguments = network_arguments(metadata)
    pairs = (
        (metadata.get(_DIM), metadata.get(_ALPHA)),
        (arguments.get("conv_dim"), arguments.get("conv_alpha")),
    )
    known = [(positive_number(dim), positive_number(alpha)) for dim, alpha in pairs]
    return tuple((int(dim), alpha) for dim, alpha in known if dim and alpha and dim == int(dim))


def positive_number(text: object) -> float | None:
    """A positive number; None for ``Dynamic``, ``None`` and other texts."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def restate_network(
    metadata: dict[str, str],
    loras: Sequence[LoRA],
    module: str = "",
    alpha: float | None = None,
    *,
    alphas: bool = True,
) -> None:
    """State the commonest rank and alpha of a file's LoRAs; strings that say the same stay.

    Args:
        metadata: Of the file.
        loras: What it holds; nothing is stated of none.
        module: The module of sd-scripts that trains such a network. If empty, only what is stated already is stated again.
        alpha: The alpha, where that is not the commonest.
        alphas: Whether the alpha is stated again too: not where readers take it for the scale, as what is left of that
            is in the factors.
    """
    if not loras:
        return
    if module or _DIM in metadata:
        _restate(metadata, _DIM, commonest(lora.rank for lora in loras) or 0)
    if alphas and (module or _ALPHA in metadata):
        _restate(metadata, _ALPHA, alpha or commonest(lora.scale * lora.rank for lora in loras) or 0.0)
    if module:
        metadata.setdefault("ss_network_module", module)


def _restate(metadata: dict[str, str], key: str, value: float) -> None:
    """State a number in metadata; text that says the same stays."""
    try:
        same = abs(float(metadata[key]) - value) <= 1e-7 * abs(value)
    except (KeyError, ValueError):
        same = False
    if not same:
        metadata[key] = f"{value:.9g}"
