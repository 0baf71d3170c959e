# SPDX-License-Identifier: Apache-2.0
"""Why a file has no place for an update: one small test for each reason, asked in order.

A module that a file of the format had is written as it was read; what the format's own program loads is asked of others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.grammar.kinds import kind_of_update
from surgery_formats.adapters.grammar.kinds.kind import LeafKind
from surgery_formats.adapters.grammar.kinds.whole import WHOLE
from surgery_formats.adapters.grammar.leaves import NORMS_OF_FLUX
from surgery_formats.adapters.grammar.naming import SiteNames
from surgery_formats.adapters.grammar.spelt_modules import ModuleSpelling
from surgery_formats.adapters.grammar.written_scales import factors_beside
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Update, is_replacing

__all__ = ["Candidate", "candidate_for", "refusal"]

_NO_PLACE: Mapping[str, str] = {
    "embedding": "embeddings",
    "experts": "stacked experts",
    "attention output": "the inside of a torch.nn.MultiheadAttention",
}
_OTHER_PARAMETERS: Mapping[str, str] = {"modulation": "diff_m", "output": "embedding_out"}
"""Roles that hold parameters besides weights and biases."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One update, as the leaves of the grammar could hold it.

    Attributes:
        site: Where it belongs.
        source: The update.
        held: In the form in which formats hold it.
        update: What would be written: the source, or its form as a LoRA or an offset.
        kind: The group of leaves that writes it; None if none does.
        parameter: What the group calls the parameter.
        own: How a file of the format had the module; None if none had it.
    """

    site: Site
    source: Update
    held: Contents
    update: Update
    kind: LeafKind | None
    parameter: str
    own: ModuleSpelling | None

    @property
    def module(self) -> str:
        """Path of the site's module."""
        return self.site.path.rpartition(".")[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole parameter under its own name."""
        return self.kind is WHOLE


def candidate_for(site: Site, source: Update, names: SiteNames) -> Candidate:
    """How the grammar could hold an update of a site."""
    held = contents_of(source)
    update: Update = source if kind_of_update(source.kind) else (held.lora or held.offset or source)
    own = names.spelt.at(site)
    module, _, parameter = site.path.rpartition(".")
    kind = kind_of_update(update.kind)
    if is_replacing(update):
        leaves = own.leaves if own else names.dialect.leaves if module.endswith(NORMS_OF_FLUX) else {}
        if f"whole_{parameter}" in leaves:
            kind = WHOLE
        elif own is None and _is_loaded_norm(site, update, names):
            kind, parameter = WHOLE, "weight"
    return Candidate(site, source, held, update, kind, parameter, own)


def _is_loaded_norm(site: Site, update: Update, names: SiteNames) -> bool:
    """Whether a whole parameter is one of the norms that the format's program loads."""
    norms = names.dialect.norms
    parts = names.parts(site, update, "") if norms and names.base is not None else []
    return bool(parts) and all(part.stem.endswith(norms) for part in parts)


def refusal(candidate: Candidate, names: SiteNames) -> str:
    """Why an update cannot be in the file, by its kind and its parameter; empty if it can.

    Args:
        candidate: The update.
        names: Of the adapter's sites in the file.
    """
    return next((why for ask in _REASONS if (why := ask(candidate, names))), "")


def _has_no_leaves(candidate: Candidate, names: SiteNames) -> str:
    own = candidate.own
    takes_whole = candidate.is_whole or names.dialect.whole or (own is not None and "set_weight" in own.leaves)
    if candidate.kind is None or (is_replacing(candidate.update) and not takes_whole):
        return f"this format has no {candidate.source.kind}"
    return ""


def _maps_beside_others(candidate: Candidate, names: SiteNames) -> str:
    chain = names.adapter.updates[candidate.site]
    if len(chain) > 1 and any(update.effect == "maps" for update in chain):
        return "programs that read it take one kind of change for each module"
    return ""


def _has_other_settings(candidate: Candidate, _: SiteNames) -> str:
    if candidate.own is None and candidate.kind is not None and not candidate.kind.takes(candidate.update):
        return f"this format has no {candidate.source.kind}"
    return ""


def _is_not_loaded(candidate: Candidate, names: SiteNames) -> str:
    dialect = names.dialect
    if candidate.own is not None or candidate.is_whole or dialect.loaded is None:
        return ""
    if candidate.update.kind in dialect.loaded:
        return ""
    is_bias = "up_bias" in dialect.leaves and candidate.parameter == "bias"
    if is_bias and factors_beside(names.adapter, candidate.site):
        return ""
    return f"the format's own program loads no {candidate.source.kind}"


def _is_beside_dora(candidate: Candidate, names: SiteNames) -> str:
    """A LoRA in a component with a DoRA: diffusers gives all of its modules magnitudes."""
    if candidate.own is not None or not names.dialect.in_header or candidate.update.kind != "LoRA":
        return ""
    if candidate.site.component in names.directed:
        return "the format's own program loads no LoRA beside a DoRA"
    return ""


def _is_of_no_module(candidate: Candidate, _: SiteNames) -> str:
    kind = candidate.site.module_kind
    return f"this format has no place for {_NO_PLACE[kind]}" if kind in _NO_PLACE else ""


def _is_of_no_leaf(candidate: Candidate, _: SiteNames) -> str:
    own, parameter = candidate.own, candidate.parameter
    has_leaf = (
        candidate.is_whole
        or parameter == "weight"
        or (parameter == "bias" and candidate.held.offset is not None)
        or (own is not None and _OTHER_PARAMETERS.get(parameter) in own.leaves)
        or (parameter == "scale" and candidate.module.endswith(NORMS_OF_FLUX) and is_replacing(candidate.update))
    )
    return "" if has_leaf else "this format names modules, not parameters"


_REASONS: tuple[Callable[[Candidate, SiteNames], str], ...] = (
    _has_no_leaves,
    _maps_beside_others,
    _has_other_settings,
    _is_not_loaded,
    _is_beside_dora,
    _is_of_no_module,
    _is_of_no_leaf,
)
