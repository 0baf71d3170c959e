# SPDX-License-Identifier: Apache-2.0
"""The stack of layers of a network: how their tensors are called, and where the configuration counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.text import listing, show

__all__ = ["COUNTS", "LayerStack", "layer_stack", "numbered"]

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configurations call the number of layers."""
_INNER = "text_config"


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers that are numbered from 0.

    Attributes:
        prefix: What their tensors begin with, up to the number: ``model.layers.``.
        count: How many there are.
        inner: Whether the configuration of a network of text and images counts them in its ``text_config``.
    """

    prefix: str
    count: int
    inner: bool = False

    def split(self, name: str) -> tuple[int, str] | None:
        """``(number, the rest)`` of a name in the stack; None for others."""
        if not name.startswith(self.prefix):
            return None
        number, _, rest = name.removeprefix(self.prefix).partition(".")
        return (int(number), rest) if number.isdecimal() and rest else None

    def named(self, number: int, rest: str) -> str:
        """The name of a tensor in layer `number`."""
        return f"{self.prefix}{number}.{rest}"

    def holder(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a configuration that is about the stack."""
        inner = config.get(_INNER)
        return inner if self.inner and isinstance(inner, Mapping) else config


def numbered(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """``(what stands before it, number)`` of the first number in each name that has one."""
    for name in names:
        segments = name.split(".")
        at = next((i for i, segment in enumerate(segments[:-1]) if segment.isdecimal()), None)
        if at is not None:
            yield ".".join([*segments[:at], ""]), int(segments[at])


def layer_stack(component: Component) -> LayerStack:
    """The layers of a network.

    Raises:
        FitError: an encoder with a decoder; no layers, or several stacks of which none is the one that config.json counts.
    """
    config = component.config
    if config.get("is_encoder_decoder"):
        raise FitError("has two stacks of layers, an encoder's and a decoder's", file=component.folder)
    found: dict[str, set[int]] = {}
    for prefix, number in numbered(component.tensors):
        found.setdefault(prefix, set()).add(number)
    stacks = {prefix: len(numbers) for prefix, numbers in found.items() if numbers == set(range(len(numbers)))}
    inner = config.get(_INNER)
    counts = [(config, False), *([(inner, True)] if isinstance(inner, Mapping) else [])]
    counted = [(int(holder[key]), nested) for holder, nested in counts for key in COUNTS if _is_count(holder.get(key))]
    if not counted:
        if len(stacks) == 1:
            ((prefix, count),) = stacks.items()
            return LayerStack(prefix, count)
        raise FitError("no stack of layers is known: config.json counts none", file=component.folder)
    count, nested = counted[0]
    fitting = [prefix for prefix, size in stacks.items() if size == count]
    if len(fitting) > 1 and nested:
        fitting = [prefix for prefix in fitting if "vision" not in prefix and "visual" not in prefix]
    if len(fitting) == 1:
        return LayerStack(fitting[0], count, nested)
    if fitting:
        raise FitError(f"has {len(fitting)} stacks of {count} layers: {listing(fitting)}", file=component.folder)
    there = listing(f"{size} at '{show(prefix)}'" for prefix, size in stacks.items()) or "none"
    raise FitError(f"config.json says {count} layers, and the weights have {there}", file=component.folder)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
