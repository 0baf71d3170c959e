# SPDX-License-Identifier: Apache-2.0
"""The difference of two adapters, weight by weight, between the deltas and not between the factors: those of one delta are many.

No delta is formed: norms, inner products and singular values of low-rank deltas come from QR of their factors, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.algebra.group import key_of
from surgery.comparison.results import AdapterDiff, AdapterStatus, ModuleDiff, Profile, Side
from surgery.engine.factor_proof import settings, tensor_error
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.updates import DoRA, LoRA, Offset, Replacement, Stacked, TokenRows, Update

if TYPE_CHECKING:
    import torch

__all__ = ["SHARES", "AdapterDiff", "diff_adapters"]

TOLERANCE = 1e-6
"""Relative difference of deltas that are called equal: what float32 factors of one delta differ by."""
SHARES = (0.5, 0.9, 0.99)
"""Of the energy, for which directions are counted."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Squares of norms, to be added up over weights."""

    a: float = 0.0
    b: float = 0.0
    difference: float = 0.0
    product: float = 0.0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.a + other.a, self.b + other.b, self.difference + other.difference, self.product + other.product
        )


def diff_adapters(a: Adapter, b: Adapter, *, header: bool, tolerance: float | None) -> AdapterDiff:
    """Compare two adapters that were read. See `surgery.verbs.diff.diff`."""
    limit = TOLERANCE if tolerance is None else tolerance
    pairs = _pairs(a, b)
    modules, total, compared = [], _Sums(), False
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
    difference = _ratio(math.sqrt(total.difference), math.sqrt(total.a)) if compared else None
    return AdapterDiff(facts, tuple(modules), difference, header, tuple(_notes(a, b)))


def _notes(a: Adapter, b: Adapter) -> list[str]:
    notes = [f"{side}: {trap}" for side, adapter in (("A", a), ("B", b)) for trap in adapter.known_issues()]
    if (a.prompt is None) != (b.prompt is None):
        notes.append("one of them has virtual tokens")
    elif a.prompt is not None and b.prompt is not None:
        one, other = a.prompt.table, b.prompt.table
        same = one.shape == other.shape and bool((one.read() == other.read()).all())
        notes.append(f"their virtual tokens are {'equal' if same else 'different'}")
    return notes


Chain = tuple[Update, ...]


def _pairs(a: Adapter, b: Adapter) -> dict[str, tuple[Chain | None, Chain | None]]:
    """Updates of one weight beside each other; flattened names meet those with dots."""
    flat = any(site.flat for one in (a, b) for site in one.updates)
    bare = any(all(not site.component for site in one.updates) for one in (a, b))

    def keys(adapter: Adapter) -> dict[tuple[str, str], tuple[Site, Chain]]:
        single = len({site.component for site in adapter.updates}) == 1
        found = {key_of(site, flat=flat): (site, chain) for site, chain in adapter.updates.items()}
        return {("" if bare and single else part, path): value for (part, path), value in found.items()}

    mine, theirs = keys(a), keys(b)
    pairs: dict[str, tuple[Chain | None, Chain | None]] = {}
    for key in sorted(mine.keys() | theirs.keys()):
        site = (mine.get(key) or theirs[key])[0]
        pairs[str(site)] = (mine[key][1] if key in mine else None, theirs[key][1] if key in theirs else None)
    return pairs


def _by_header(name: str, mine: Chain | None, theirs: Chain | None) -> ModuleDiff:
    a, b = (None if chain is None else _side(chain) for chain in (mine, theirs))
    if a is None or b is None:
        return ModuleDiff(name, "only in B" if a is None else "only in A", a, b)
    return ModuleDiff(name, "equal" if a == b else "different", a, b)


def _by_value(name: str, mine: Chain | None, theirs: Chain | None, limit: float) -> tuple[ModuleDiff, _Sums | None]:
    a, b = (None if chain is None else _measured(chain) for chain in (mine, theirs))
    if mine is None or theirs is None:
        chain, side = (mine, a) if theirs is None else (theirs, b)
        assert chain is not None
        assert side is not None
        square = None if side.norm is None else side.norm**2
        sums = (
            None
            if square is None
            else _Sums(square if theirs is None else 0.0, square if mine is None else 0.0, square)
        )
        return ModuleDiff(name, "only in A" if theirs is None else "only in B", a, b), sums
    kinds = [sorted(update.kind for update in chain) for chain in (mine, theirs)]
    shapes = [chain[0].shape for chain in (mine, theirs)]
    if shapes[0] != shapes[1] or len(_blocks(mine)) != len(_blocks(theirs)):
        return ModuleDiff(name, "different", a, b, note="made for weights of different shapes"), None
    if kinds[0] != kinds[1] and not (set(kinds[0]) | set(kinds[1])) <= {LoRA.kind, Offset.kind}:
        return ModuleDiff(
            name, "different", a, b, note="of different kinds: only the base can tell their difference"
        ), None
    sums, notes = _compare(mine, theirs, limit)
    difference = _ratio(math.sqrt(sums.difference), math.sqrt(sums.a))
    sizes = math.sqrt(sums.a) * math.sqrt(sums.b)
    cosine = max(-1.0, min(1.0, sums.product / sizes)) if sizes else None
    status: AdapterStatus = "equal" if difference <= limit and not notes else "different"
    return ModuleDiff(name, status, a, b, difference, cosine, "; ".join(notes)), sums


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0.0 else math.inf)


def _blocks(chain: Chain) -> list[list[LoRA]]:
    """Low-rank terms, those of one expert together; the direction of a DoRA counts as one."""
    stacks = [update for update in chain if isinstance(update, Stacked)]
    if stacks:
        return [
            [one for stack in stacks if isinstance(one := stack.experts[e], LoRA)]
            for e in range(len(stacks[0].experts))
        ]
    return [[u.direction if isinstance(u, DoRA) else u for u in chain if isinstance(u, LoRA | DoRA)]]


def _side(chain: Chain) -> Side:
    loras = [lora for block in _blocks(chain) for lora in block]
    scales = {lora.scale for lora in loras}
    rank = sum(lora.rank for lora in _blocks(chain)[0]) if loras else None
    kind = "+".join(dict.fromkeys(update.kind for update in chain))
    return Side(kind, chain[0].shape, rank, next(iter(scales)) if len(scales) == 1 else None)


def _measured(chain: Chain) -> Side:
    """With the norm of the delta and its profile, where it has one."""
    import torch

    from surgery.algebra.sums import stacked
    from surgery_formats.linalg.factored import singular_values

    side = _side(chain)
    blocks = [singular_values(*stacked(block)) for block in _blocks(chain) if block]
    profile = None
    norm: float | None = None
    if blocks:
        every = torch.cat(blocks)
        norm = float(every.norm())
        profile = _profile(blocks)
    if any(isinstance(update, Offset) for update in chain):
        norm = math.hypot(norm or 0.0, *(float(_value(u).norm()) for u in chain if isinstance(u, Offset)))
    if not all(isinstance(update, LoRA | Stacked | Offset) for update in chain):
        norm = None  # what replaces a weight, or sets its lengths, has a delta only beside the base
    return Side(side.kind, side.shape, side.rank, side.scale, norm, profile)


def _profile(blocks: Sequence[torch.Tensor]) -> Profile:
    """Of one matrix, or of all experts: the greatest of theirs."""
    stable, ranks = 0.0, {f"{share:g}": 0 for share in SHARES}
    for values in blocks:
        squares = values.square()
        whole = float(squares.sum())
        if not whole:
            continue
        stable = max(stable, whole / float(squares[0]))
        held = squares.cumsum(0)
        for share in SHARES:
            needed = int((held < share * whole * (1 - 1e-12)).sum()) + 1
            ranks[f"{share:g}"] = max(ranks[f"{share:g}"], needed)
    return Profile(stable, ranks)


def _value(update: Offset | Replacement | TokenRows) -> torch.Tensor:
    import torch

    values = update.value.load(torch.float64)
    return values * update.scale if isinstance(update, Offset) else values


def _compare(mine: Chain, theirs: Chain, limit: float) -> tuple[_Sums, list[str]]:
    """Squares over everything that is added to the weight, and notes on what is not added but set."""
    import torch

    from surgery.algebra.sums import stacked
    from surgery_formats.linalg.factored import factored_inner, factored_norm

    sums = _Sums()
    for one, other in zip(_blocks(mine), _blocks(theirs), strict=True):
        if not one and not other:
            continue
        nothing = (
            torch.zeros((mine[0].shape[0], 0), dtype=torch.float64),
            torch.zeros((0, mine[0].shape[1]), dtype=torch.float64),
        )
        (B, A), (D, C) = (stacked(block) if block else nothing for block in (one, other))
        same = B.shape == D.shape and torch.equal(B, D) and torch.equal(A, C)
        difference = 0.0 if same else factored_norm(torch.cat([B, -D], 1), torch.cat([A, C], 0))
        squares = factored_norm(B, A) ** 2, factored_norm(D, C) ** 2
        sums = sums.plus(_Sums(*squares, difference**2, factored_inner(B, A, D, C)))
    offsets = [[_value(u) for u in chain if isinstance(u, Offset)] for chain in (mine, theirs)]
    if any(offsets):
        shape = (offsets[0] or offsets[1])[0].shape
        left, right = (sum(found, torch.zeros(shape, dtype=torch.float64)) for found in offsets)
        sums = sums.plus(_dense(left, right))
    return sums, _set_values(mine, theirs, limit)


def _dense(left: torch.Tensor, right: torch.Tensor) -> _Sums:
    return _Sums(
        float(left.square().sum()),
        float(right.square().sum()),
        float((right - left).square().sum()),
        float((left * right).sum()),
    )


def _set_values(mine: Chain, theirs: Chain, limit: float) -> list[str]:
    """Magnitudes, whole weights and token rows: a note for each pair that differs."""
    import torch

    notes = []
    for kind in (DoRA, Replacement, TokenRows):
        pair = zip((u for u in mine if isinstance(u, kind)), (u for u in theirs if isinstance(u, kind)), strict=True)
        for one, other in pair:
            if isinstance(one, DoRA) and isinstance(other, DoRA):
                left, right, what = one.magnitude.load(torch.float64), other.magnitude.load(torch.float64), "magnitudes"
            else:
                assert isinstance(one, Replacement | TokenRows)
                assert isinstance(other, Replacement | TokenRows)
                left, right, what = (
                    _value(one),
                    _value(other),
                    "new values" if isinstance(one, Replacement) else "token rows",
                )
            if isinstance(one, TokenRows) and isinstance(other, TokenRows) and one.indices != other.indices:
                notes.append("other token rows")
            elif left.shape != right.shape:
                notes.append(f"{what} of other shapes")
            elif (by := _ratio(float((right - left).norm()), float(left.norm()))) > limit:
                notes.append(f"{what} differ by {by:.2g}")
    return notes + _other_factors(mine, theirs, limit)


def _other_factors(mine: Chain, theirs: Chain, limit: float) -> list[str]:
    """Kinds whose delta is no sum of LoRAs are compared by their stored factors: a note for each pair that differs."""
    known = (LoRA, DoRA, Offset, Stacked, Replacement, TokenRows)
    left, right = ([u for u in chain if not isinstance(u, known)] for chain in (mine, theirs))
    notes = []
    for one, other in zip(left, right, strict=True):
        if type(one) is not type(other) or settings(one) != settings(other):
            notes.append(f"the settings of its {one.kind} differ")
        elif (by := tensor_error(one, other)) > limit:
            notes.append(f"the factors of its {one.kind} differ by {by:.2g}")
    return notes
