# SPDX-License-Identifier: Apache-2.0
"""LOKR: Kronecker products of two factors, each stored whole or as a low-rank pair.

PEFT derives the shapes of the factors from the sizes of the weight and ``decompose_factor``, and from the rank whether
the second is a pair. An update from elsewhere therefore gets a ``decompose_factor`` and a rank that lead to its
factors, if such values exist. Source: PEFT 0.21, ``tuners/lokr/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates, PeftKind, malformed
from surgery_formats.adapters.peft.kinds.lycoris import SWITCHES, alpha_issue, low_rank_pair, put_pair
from surgery_formats.adapters.peft.write_config import ranks_and_alphas, targets
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import Factor, LoKr, Update

__all__ = ["LOKR", "factorised"]


def _read(module: Module) -> ModuleUpdates:
    """Each factor is stored whole or as a low-rank pair; if both are whole, only the configuration has the rank."""
    ranks = set()
    if "lokr_w1" in module.parts:
        first = module.matrix("lokr_w1")
        C = Factor.of(first)
    else:
        a, b = low_rank_pair(module, "lokr_w1_a", "lokr_w1_b", "")
        C = _product(a, b)
        ranks.add(a.shape[1])
    crossed, kernel = False, 1
    if "lokr_w2" in module.parts:
        second = module.part("lokr_w2")
        if len(second.shape) < 2 or not second.numel:
            raise malformed(second, "not a matrix or a kernel")
        crossed = len(second.shape) == 3
        kernel = second.shape[2] if crossed else 1
        D = Factor((second,), (second.shape[0], second.numel // second.shape[0]))
    else:
        a, b = low_rank_pair(module, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        D = _product(a, b)
        ranks.add(a.shape[1])
    used = {*(t.name for t in C.tensors), *(t.name for t in D.tensors)}
    if extra := [tensor for tensor in module.parts.values() if tensor.name not in used]:
        raise MalformedError("is there twice: whole and as factors", file=extra[0].file.path, tensor=extra[0].name)
    if len(ranks) > 1:
        stored = next(iter(module.parts.values()))
        raise FitError(
            f"factors of the ranks {listing(map(str, sorted(ranks)))}", file=stored.file.path, tensor=stored.name
        )
    for stated in ranks:
        module.config.check_rank(module.path, stated, next(iter(module.parts.values())))
    rank = ranks.pop() if ranks else module.config.rank_of(module.path)
    alpha = module.config.alpha_of(module.path)
    whole = module.parts.get("lokr_w2", module.parts.get("lokr_t2"))
    site = module.site(() if whole is None else whole.shape[2:])
    return ModuleUpdates({site: (LoKr(C, D, alpha / rank, alpha, rank, kernel, crossed),)})


def _product(a: Factor, b: Factor) -> Factor:
    """``a b`` as one factor; it is small."""
    return Factor.computed((a, b), (a.shape[0], b.shape[1]), lambda left, right: left @ right)


def _write(file: PeftFile, updates: Sequence[tuple[Site, Update]]) -> None:
    placed = [_Placed(site, u, *file.module_of(site, u)) for site, u in updates if isinstance(u, LoKr)]
    for site, update in updates:
        if not isinstance(update, LoKr):
            file.hold_other(site, update)
    factor = -1 if file.own else _decompose_factor(placed)
    cores = set()
    for target in placed:
        stored = target.update if file.own else target.as_peft_stores(factor)
        if stored is None:
            sizes = f"{list(target.update.C.shape)} and {list(target.update.D.shape)}"
            file.drop(target.site, target.update, f"PEFT would build factors of other shapes than {sizes}")
            continue
        key = f"{file.prefix}{target.module}"
        cores.add(_put(file, key, stored, target.site.kernel))
        rank = stored.rank or 1
        file.settings[target.module] = (rank, file.alpha_of(rank, stored.scale))
        same = (stored.C.terms, stored.D.terms) == (target.update.C.terms, target.update.D.terms)
        leaf = "lokr_w1_a" if stored.C.terms else "lokr_w1"
        file.ledger.keep(target.site, target.update, "exact" if same else "folded", f"{key}.{leaf}")
    file.defaults = {"module_dropout": 0.0, "rank_dropout": 0.0, "rank_dropout_scale": False, "init_weights": True}
    file.fields = {
        **ranks_and_alphas(file, "alpha"),
        "decompose_both": False,
        "decompose_factor": factor,
        "target_modules": targets(file),
        "use_effective_conv2d": True in cores,
    }


def _put(file: PeftFile, key: str, update: LoKr, kernel: tuple[int, ...]) -> bool:
    """Store both factors; whether the second has a core."""
    C, D = update.C, update.D
    if C.terms:
        put_pair(file, key, C.terms, ("lokr_w1_a", "lokr_w1_b", ""))
    else:
        file.put(f"{key}.lokr_w1", C)
    if D.terms:
        return put_pair(file, key, D.terms, ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
    rows, cols = D.shape
    file.put(f"{key}.lokr_w2", D, (rows, cols // math.prod(kernel), *kernel))
    return False


@dataclass(frozen=True, slots=True)
class _Placed:
    """An update, its module, and the shape of the module's weight."""

    site: Site
    update: LoKr
    module: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Input channels that belong to the second factor."""
        return self.shape[1] // self.update.C.shape[1]

    def fits(self, factor: int) -> bool:
        """Whether PEFT builds factors of these shapes with ``decompose_factor=factor``."""
        (a, b), c = self.update.C.shape, self.update.D.shape[0]
        return factorised(self.shape[0], factor) == (a, c) and factorised(self.shape[1], factor) == (b, self.channels)

    def as_peft_stores(self, factor: int) -> LoKr | None:
        """The update with the rank and the kinds of factors that PEFT builds; None if it builds others.

        The first factor is whole (no ``decompose_both``); the second is a pair if the rank is less than half its
        greater side.
        """
        if not self.fits(factor):
            return None
        update, greater = self.update, max(self.update.D.shape[0], self.channels)
        C = replace(update.C, terms=())
        if update.D.terms and update.rank is not None and 2 * update.rank < greater:
            return replace(update, C=C)
        rank = max(update.rank or 1, -(-greater // 2))
        return replace(update, C=C, D=replace(update.D, terms=()), rank=rank)


def _decompose_factor(placed: Sequence[_Placed]) -> int:
    """The value with which PEFT builds the factors of most updates."""
    candidates = [-1, *sorted({size for target in placed for size in target.update.C.shape})]
    return max(candidates, key=lambda factor: sum(target.fits(factor) for target in placed))


@cache
def factorised(number: int, factor: int) -> tuple[int, int]:
    """PEFT's ``factorization`` of `number` into two factors.

    The first is `factor` if it divides `number`, else the nearest divisor below it.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    most = math.isqrt(number) if factor == -1 else min(factor, math.isqrt(number))
    first = next(size for size in range(most, 0, -1) if number % size == 0)
    return first, number // first


def _issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    return alpha_issue(config)


LOKR = PeftKind(
    name="LOKR",
    factors=frozenset(["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]),
    read=_read,
    writes=frozenset([LoKr.kind]),
    write=_write,
    switches=replace(
        SWITCHES, harmless=SWITCHES.harmless | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
    ),
    issues=_issues,
)
