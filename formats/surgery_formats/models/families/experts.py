# SPDX-License-Identifier: Apache-2.0
"""Shared parts of mixtures of experts: the networks as files store them, and a record that is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery_formats.models.families.decoder import gated_mlp, projection
from surgery_formats.models.families.recipe import MLP, Activation, Experts, Projection
from surgery_formats.models.families.settings import MOST_EXPERTS, ModelSettings, Sizes

__all__ = ["Transformation", "expert_count", "expert_networks", "inner_mlp", "mixture", "stacked_networks"]

Transformation = Callable[[str, int], MLP | Experts]
"""Maps the module of a layer, and the layer's index, to what transforms each token."""


def expert_count(settings: ModelSettings, sizes: Sizes, *keys: str, default: int) -> int:
    """Read the number of experts of a layer.

    Raises:
        FitError: it is none, or so great that those of all layers would fill the memory.
    """
    return settings.count(*keys, default=default, most=MOST_EXPERTS // sizes.layers)


def inner_mlp(at: str, hidden: int, inner: int, activation: Activation, *, bias: bool = False) -> MLP:
    """A gated MLP as `gated_mlp`, of another width than the model's."""
    sizes = Sizes(hidden, inner, 1, 1, 1, 1, 1, 1)
    return gated_mlp(at, sizes, activation, bias=bias)


def expert_networks(
    settings: ModelSettings,
    at: str,
    count: int,
    hidden: int,
    inner: int,
    activation: Activation,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
) -> tuple[MLP, ...]:
    """The experts in module `at`: each by itself as almost all files have them, or stacked as transformers 5 has them in memory.

    `names` are those of an expert's gate, up and down.
    """
    if f"{at}.gate_up_proj" in settings.names:
        return stacked_networks(f"{at}.gate_up_proj", f"{at}.down_proj", count, hidden, inner, activation)
    gate, up, down = names
    return tuple(
        MLP(
            tuple(projection(f"{at}.{number}.{name}", hidden, inner, bias) for name in (gate, up)),
            projection(f"{at}.{number}.{down}", inner, hidden, bias),
            activation,
            gated=True,
        )
        for number in range(count)
    )


def stacked_networks(
    both: str,
    down: str,
    count: int,
    hidden: int,
    inner: int,
    activation: Activation,
    *,
    transposed: bool = False,
    bias: bool = False,
    **form: Any,
) -> tuple[MLP, ...]:
    """Experts in two tensors: ``[gate | up]`` of all, and down of all; `form` are further fields of `MLP`."""
    biases = (f"{both}_bias", f"{down}_bias") if bias else ("", "")
    return tuple(
        MLP(
            (Projection(both, hidden, 2 * inner, biases[0], transposed, (number, count)),),
            Projection(down, inner, hidden, biases[1], transposed, (number, count)),
            activation,
            gated=True,
            **form,
        )
        for number in range(count)
    )


def mixture(settings: ModelSettings, router: str, hidden: int, experts: tuple[MLP, ...], **fields: Any) -> Experts:
    """The mixture with the router in module `router`; `fields` are those of `Experts`.

    Raises:
        FitError: more experts are chosen than there are, or groups that do not divide them.
    """
    count = len(experts)
    record = Experts(projection(router, hidden, count, fields.pop("router_bias", False)), experts, **fields)
    if count % record.groups or record.best_groups > record.groups:
        raise settings.fault(f"{count} experts in {record.groups} groups, {record.best_groups} of them considered")
    each = count // record.groups
    if record.top > each * record.best_groups:
        raise settings.fault(f"{record.top} experts are chosen of {each * record.best_groups}")
    if record.best_groups < record.groups and record.group_score == "two" and each < 2:
        raise settings.fault("groups of one expert have no two best")
    return record
