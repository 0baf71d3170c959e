# SPDX-License-Identifier: Apache-2.0
"""What an adapter touches: one line per parameter, and those lines grouped by what they have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.families.denoisers import denoiser_of
from surgery_formats.models.families.diffusion_roles import diffusion_role
from surgery_formats.models.families.family import role_of
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates import Held, experts_of, is_replacing

__all__ = [
    "TargetGroup",
    "TargetedParameter",
    "distribution",
    "group_targets",
    "pattern_of",
    "site_roles",
    "touched",
    "trained_parameters",
]

_Number = TypeVar("_Number", int, float)

_NUMBER = re.compile(r"(?<![^._])\d+(?=[._]|$)")  # between dots, or between underscores of a flattened name


@dataclass(frozen=True, slots=True)
class TargetedParameter:
    """One parameter and one thing that was trained for it.

    Attributes:
        name: As the adapter writes it, after its component: ``unet:down_blocks_0_...``. Untrusted text.
        pattern: The name with its numbers replaced by ``*``, without a final ``.weight``.
        role: ``attention``, ``mlp``, ``expert`` ...
        kind: ``LoRA``, ``DoRA``, ``offset``, ``replacement``, ``token rows`` ...
        shape: ``(out, in)`` of the weight it fits; 0 is a size its file does not tell.
        rank: Inner size, where the kind has one.
        alpha: As written in the file, where it is.
        scale: Factor on what is added, where the kind has one.
        experts: How many experts' weights it stacks; 0 if it is a plain weight.
        parameters: Numbers stored for it (alphas and the like, which are not trained, left out).
        held: Where these numbers live while the adapter is attached: ``added`` beside the base's (factors, rows), a
            trained ``copy`` of a module whose original stays, ``in place`` of the base's, ``resized``, or only
            ``carried`` along.
    """

    name: str
    pattern: str
    role: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    alpha: float | None
    scale: float | None
    experts: int
    parameters: int
    held: Literal["added"] | Held = "added"

    @property
    def trained(self) -> bool:
        """False for a weight that was only carried along."""
        return self.held != "carried"


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Parameters whose names differ in numbers only and that are treated alike.

    Attributes:
        pattern: ``model.layers.*.self_attn.q_proj``.
        count: How many there are.
        ranks: How many have which rank.
        scales: How many have which scale.
        parameters: Numbers stored for all of them.
        trained: False if they were only carried along.
    """

    pattern: str
    role: str
    kind: str
    count: int
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    parameters: int
    trained: bool


def touched(adapter: Adapter, roles: Mapping[Site, str] | None = None) -> tuple[TargetedParameter, ...]:
    """Every parameter the adapter has an update for, in the adapter's order.

    A stored tensor that serves several parameters is counted for the first. Biases that the base need not have are left
    out. `roles` tells them better than the adapter's names alone can, when the base is known.
    """
    known = site_roles(adapter) if roles is None else roles
    seen: set[Tensor] = set()
    parameters = []
    for site, chain in adapter.updates.items():
        for update in () if site in adapter.optional else chain:
            own = set(update.tensors) - set(update.untrained) - seen
            seen |= own
            experts = experts_of(update)
            parameters.append(
                TargetedParameter(
                    name=str(site),
                    pattern=pattern_of(str(site)),
                    role="expert" if experts else known[site],
                    kind=update.kind,
                    shape=update.shape,
                    rank=update.rank,
                    alpha=update.alpha,
                    scale=update.scale,
                    experts=len(experts),
                    parameters=sum(tensor.numel for tensor in own),
                    held=update.held if is_replacing(update) else "added",
                )
            )
    return tuple(parameters)


def pattern_of(name: str) -> str:
    """What a name shares with those like it: its numbers as ``*``, without a final ``.weight``."""
    return _NUMBER.sub("*", name.removesuffix(".weight"))


def group_targets(entries: Iterable[TargetedParameter]) -> tuple[TargetGroup, ...]:
    """`entries` by pattern and kind, in order of first appearance."""
    groups: dict[tuple[str, str, bool], list[TargetedParameter]] = {}
    for entry in entries:
        groups.setdefault((entry.pattern, entry.kind, entry.trained), []).append(entry)
    return tuple(
        TargetGroup(
            pattern=pattern,
            role=members[0].role,
            kind=kind,
            count=len(members),
            ranks=distribution(entry.rank for entry in members),
            scales=distribution(entry.scale for entry in members),
            parameters=sum(entry.parameters for entry in members),
            trained=trained,
        )
        for (pattern, kind, trained), members in groups.items()
    )


def trained_parameters(adapter: Adapter, entries: Iterable[TargetedParameter]) -> int:
    """Numbers trained: those of `entries` that were, and of a soft prompt."""
    prompt = adapter.prompt.parameters if adapter.prompt else 0
    return prompt + sum(entry.parameters for entry in entries if entry.trained)


def distribution(values: Iterable[_Number | None]) -> dict[_Number, int]:
    """How often each value occurs, in order of value; None is no value."""
    return dict(sorted(Counter(value for value in values if value is not None).items()))


def site_roles(adapter: Adapter) -> dict[Site, str]:
    """The roles that the names of an adapter's parameters tell, by the words of diffusion networks where it is one's."""
    own = frozenset(site for site in adapter.updates if not site.component.startswith("text_encoder"))
    diffuses = denoiser_of(site.path.removesuffix(".weight") for site in own) is not None
    return {site: diffusion_role(site.path) if diffuses and site in own else _role(site) for site in adapter.updates}


def _role(site: Site) -> str:
    """Flattened names have lost where segments end, so each word counts."""
    if not site.flat:
        return role_of(site.path)
    return role_of(re.sub(r"^(input|output)_blocks_", "", site.path).replace("_", "."))  # not the "output" of BERT
