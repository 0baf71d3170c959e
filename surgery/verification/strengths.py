# SPDX-License-Identifier: Apache-2.0
"""Adapters inside a graph, each behind an input for its strength: at 0 the graph is what its weights make, else they are added."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from surgery.engine.merge.merge_plan import plan_merge
from surgery.onnx.export.adapters import AdapterRoles, NamedAdapter, entry
from surgery.onnx.graph.contract import Contract
from surgery.reference import Reference, open_reference
from surgery.reference.weights import ReferenceWeights, planned_weights, stored_weights
from surgery.verification.sentence import own_task
from surgery_formats.binding.bind import bind
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["Gated", "gated_of", "with_gated"]


@dataclass(frozen=True)
class Gated:
    """The adapters inside a graph that are named, and those that are not.

    Attributes:
        named: With the weights that their strengths get.
        strengths: By input.
        unnamed: Names of the others.
    """

    named: tuple[NamedAdapter, ...]
    strengths: Mapping[str, float]
    unnamed: tuple[str, ...]


def gated_of(contract: Contract, roles: AdapterRoles) -> tuple[Gated, AdapterRoles]:
    """Part the adapters that are inside the graph, known by the hashes of their files, from the others.

    Of files that are inside twice each is told by its name, if it has that of one of them.
    """
    waiting = [one for one in contract.adapters if "strength" in one]
    found: list[NamedAdapter] = []
    strengths: dict[str, float] = {}
    for named in roles.merge:
        digest = entry(named, "gated")["id"]
        same = [one for one in waiting if one["id"] == digest]
        if same:
            own = next((one for one in same if one["name"] == named.name), same[0])
            waiting.remove(own)
            found.append(named)
            strengths[str(own["strength"])] = named.weight
    gated = Gated(tuple(found), strengths, tuple(str(one["name"]) for one in waiting))
    return gated, replace(roles, merge=tuple(named for named in roles.merge if named not in gated.named))


def with_gated(reference: Reference, base: Checkpoint, gated: Gated, contract: Contract) -> Reference:
    """`reference` with what `gated` adds to the weights of `base`, not rounded.

    Raises:
        FitError: an adapter does not fit the base.
    """
    binding = bind([(named.adapter, named.weight) for named in gated.named], base)
    plan = plan_merge(binding)
    changed = {tensor.weight for tensor in plan.computed()}
    exact = planned_weights(plan_merge(binding, dtype=DType.F32))
    known = stored_weights(base.main)
    weights = _AddedTo(reference.weights, changed, exact, known)
    if changed <= {*known.names}:
        return replace(reference, weights=weights)
    return replace(reference, model=open_reference(base.main, plan, task=own_task(contract)).model, weights=weights)


@dataclass(frozen=True)
class _AddedTo:
    """Weights of which some have what ``exact - known`` is added to them; one that is not known, a head that was tied, is `exact`."""

    inner: ReferenceWeights
    changed: Collection[str]
    exact: ReferenceWeights
    known: ReferenceWeights

    @property
    def names(self) -> Collection[str]:
        return {*self.inner.names, *self.changed}

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self.changed:
            return self.inner.load(name, start, stop)
        values = self.exact.load(name, start, stop)
        if name not in self.known.names:
            return values
        return values - self.known.load(name, start, stop).float() + self.inner.load(name, start, stop).float()
