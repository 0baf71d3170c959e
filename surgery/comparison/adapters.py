# SPDX-License-Identifier: Apache-2.0
"""The difference of two adapters, weight by weight, whatever their formats, ranks and factors."""

from __future__ import annotations

import math
from dataclasses import replace

from surgery.algebra.group import key_of
from surgery.comparison.additive import Chain, Squares, are_sums, blocks_of, compared, measured_side, ratio, side_of
from surgery.comparison.conflict import conflict_of
from surgery.comparison.entries import AdapterStatus, ModuleDiff
from surgery.comparison.on_base import pairs_on
from surgery.comparison.results import AdapterDiff
from surgery.engine.factor_proof import tensor_error
from surgery_formats.binding.sizes import check_complete
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.site_names import same_denoiser
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.expert_stacks import parse_expert_path
from surgery_formats.updates import (
    Factor,
    Update,
    expanded,
    in_full,
    is_directed,
    is_replacing,
    is_row_setting,
    settings,
)

__all__ = ["diff_adapters", "pairs_by_name"]

TOLERANCE = 1e-6
"""Relative difference of deltas that are called equal: what float32 factors of one delta differ by."""


def diff_adapters(
    a: Adapter, b: Adapter, *, header: bool, tolerance: float | None, base: Checkpoint | None = None
) -> AdapterDiff:
    """Compare two adapters that were read. See `surgery.verbs.diff.diff`."""
    limit = TOLERANCE if tolerance is None else tolerance
    # Of one format, what a base would tell is the same on both sides.
    if base is None and not header and a.format != b.format:
        check_complete(a)
        check_complete(b)
    pairs, notes = (pairs_by_name(a, b), []) if base is None else pairs_on(base, a, b)
    modules, total, compared = [], Squares(), False
    for name, (mine, theirs) in pairs.items():
        if header:
            modules.append(_by_header(name, mine, theirs))
            continue
        module, sums = _by_value(name, mine, theirs, limit)
        modules.append(module)
        if sums is not None:
            total, compared = total.plus(sums), True
    facts = {
        "format": (a.format, b.format),
        "kind": (a.kind, b.kind),
        "base": (a.base_name, b.base_name),
        "parameters": (str(a.parameters), str(b.parameters)),
    }
    told = compared and (total.difference > 0 or all(module.status == "equal" for module in modules))
    difference = ratio(math.sqrt(total.difference), math.sqrt(total.a)) if told else None
    return AdapterDiff(facts, tuple(modules), difference, header, (*notes, *_notes(a, b)))


def _notes(a: Adapter, b: Adapter) -> list[str]:
    notes = [f"{side}: {issue}" for side, adapter in (("A", a), ("B", b)) for issue in adapter.known_issues()]
    if (a.prompt is None) != (b.prompt is None):
        notes.append("one of them has virtual tokens")
    elif a.prompt is not None and b.prompt is not None:
        mine, theirs = a.prompt.table, b.prompt.table
        same = mine.shape == theirs.shape and bool((mine.read() == theirs.read()).all())
        notes.append(f"their virtual tokens are {'equal' if same else 'different'}")
    ours, others = ({_spelling(site) for site in adapter.updates} - {None} for adapter in (a, b))
    if ours and others and not ours & others:
        notes.append(
            "their experts are in different dialects, and only the base tells which are the same: "
            "convert both to one dialect first"
        )
    return notes


def _spelling(site: Site) -> tuple[str, bool, bool] | None:
    """How a path names experts, whichever they are: the module, whether a number follows, whether it names one expert."""
    if (named := parse_expert_path(site.path)) is None:
        return None
    home, first, *_ = site.path.removeprefix(f"{named.stem}.").split(".")
    return home, first.isdecimal(), named.number is not None


def pairs_by_name(a: Adapter, b: Adapter) -> dict[str, tuple[Chain | None, Chain | None]]:
    """Updates of one weight beside each other; flattened names meet those with dots."""
    flat = any(site.flat for adapter in (a, b) for site in adapter.updates)
    called = same_denoiser(site.component for adapter in (a, b) for site in adapter.updates)
    bare = any(all(not site.component for site in adapter.updates) for adapter in (a, b))

    def keys(adapter: Adapter) -> dict[tuple[str, str], tuple[Site, Chain]]:
        single = len({site.component for site in adapter.updates}) == 1
        chains = {key_of(site, flat=flat): (site, chain) for site, chain in adapter.updates.items()}
        return {
            ("" if bare and single else called.get(part, part), path): value for (part, path), value in chains.items()
        }

    mine, theirs = keys(a), keys(b)
    pairs: dict[str, tuple[Chain | None, Chain | None]] = {}
    for key in sorted(mine.keys() | theirs.keys()):
        site = (mine.get(key) or theirs[key])[0]
        pairs[str(site)] = (mine[key][1] if key in mine else None, theirs[key][1] if key in theirs else None)
    return pairs


def _by_header(name: str, mine: Chain | None, theirs: Chain | None) -> ModuleDiff:
    a, b = (None if chain is None else side_of(chain) for chain in (mine, theirs))
    if a is None or b is None:
        return ModuleDiff(name, "only in B" if a is None else "only in A", a, b)
    return ModuleDiff(name, "equal" if a == b else "different", a, b)


def _by_value(name: str, mine: Chain | None, theirs: Chain | None, limit: float) -> tuple[ModuleDiff, Squares | None]:
    a, b = (None if chain is None else measured_side(chain) for chain in (mine, theirs))
    if mine is None or theirs is None:
        chain, side = (mine, a) if theirs is None else (theirs, b)
        assert chain is not None
        assert side is not None
        square = None if side.norm is None else side.norm**2
        sums = (
            None
            if square is None
            else Squares(square if theirs is None else 0.0, square if mine is None else 0.0, square)
        )
        return ModuleDiff(name, "only in A" if theirs is None else "only in B", a, b), sums
    kinds = [sorted(update.kind for update in chain) for chain in (mine, theirs)]
    shapes = [chain[0].shape for chain in (mine, theirs)]
    if shapes[0] != shapes[1] or len(blocks_of(mine)) != len(blocks_of(theirs)):
        return ModuleDiff(name, "different", a, b, note="made for weights of different shapes"), None
    if kinds[0] != kinds[1] and (products := _products(mine, theirs)):
        mine, theirs = products
        a, b = (
            replace(measured_side(chain), kind=side.kind) for chain, side in zip(products, (a, b), strict=True) if side
        )
    elif kinds[0] != kinds[1] and not (are_sums(mine) and are_sums(theirs)):
        return ModuleDiff(
            name, "different", a, b, note="of different kinds: only the base can tell their difference"
        ), None
    sums, notes = compared(mine, theirs), unadded_differences(mine, theirs, limit)
    difference = ratio(math.sqrt(sums.difference), math.sqrt(sums.a))
    sizes = math.sqrt(sums.a) * math.sqrt(sums.b)
    cosine = max(-1.0, min(1.0, sums.product / sizes)) if sizes else None
    if notes and difference <= limit:  # only the base would tell the size of what differs, and 0 it is not
        return ModuleDiff(name, "different", a, b, None, cosine, "; ".join(notes)), sums
    status: AdapterStatus = "equal" if difference <= limit else "different"
    conflict = None if status == "equal" else conflict_of(mine, theirs)
    return ModuleDiff(name, status, a, b, difference, cosine, "; ".join(notes), conflict), sums


def _products(mine: Chain, theirs: Chain) -> tuple[Chain, Chain] | None:
    """Both sides as sums of LoRAs, if one has a product of known factors (LoHa) and the other can be compared with it."""
    if are_sums(mine) and are_sums(theirs):
        return None
    sides = [tuple(in_full(update) or expanded(update) for update in chain) for chain in (mine, theirs)]
    known = [tuple(form for form in side if form is not None) for side in sides]
    return (known[0], known[1]) if list(map(len, known)) == list(map(len, sides)) else None


def unadded_differences(mine: Chain, theirs: Chain, limit: float) -> list[str]:
    """A note for each pair of updates that differ by more than `limit`; both chains are of the same kinds."""
    chains = (sorted((u for u in chain if not are_sums((u,))), key=lambda u: u.kind) for chain in (mine, theirs))
    return [note for update, other in zip(*chains, strict=True) if (note := _difference(update, other, limit))]


def _difference(update: Update, other: Update, limit: float) -> str:
    if is_row_setting(update) and is_row_setting(other) and update.indices != other.indices:
        return "other token rows"
    import numpy

    (called, factor), (_, twin) = _by_norm(update), _by_norm(other)
    if factor is not None and twin is not None:
        left, right = factor.load(DType.F64), twin.load(DType.F64)
        if left.shape != right.shape:
            return f"{called} of other shapes"
        by = ratio(float(numpy.linalg.norm(right - left)), float(numpy.linalg.norm(left)))
    elif type(update) is not type(other) or settings(update) != settings(other):
        return f"the settings of its {update.kind} differ"
    else:
        by = tensor_error(update, other)
    return f"{called} differ by {by:.2g}" if by > limit else ""


def _by_norm(update: Update) -> tuple[str, Factor | None]:
    """What an update has beside sums, and its factor if that is compared by its norm, not number by number."""
    if is_directed(update):
        return "magnitudes", update.magnitude
    factors = [*update.factors().values()]
    if len(factors) == 1 and (is_replacing(update) or is_row_setting(update)):
        return "new values" if is_replacing(update) else "token rows", factors[0]
    return f"the factors of its {update.kind}", None
