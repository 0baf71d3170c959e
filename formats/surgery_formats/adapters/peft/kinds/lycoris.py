# SPDX-License-Identifier: Apache-2.0
"""Shared by LOHA and LOKR: pairs of low-rank factors, with a core between them for a decomposed kernel (CP form)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import Module, malformed
from surgery_formats.adapters.peft.read_config import COMMON, Switches
from surgery_formats.arrays import Array
from surgery_formats.updates import Factor

__all__ = ["SWITCHES", "alpha_issue", "low_rank_pair", "put_pair"]

SWITCHES = Switches(
    COMMON | {"rank_dropout", "module_dropout", "use_effective_conv2d"},
    frozenset(["r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"]),
    alpha="alpha",
)


def low_rank_pair(module: Module, a: str, b: str, core: str) -> tuple[Factor, Factor]:
    """The factors ``(out, rank)`` and ``(rank, in)``.

    With a core (CP form of a kernel) they are stored as ``(rank, out)`` and ``(rank, in)``.
    """
    left, right = module.matrix(a), module.matrix(b)
    if core not in module.parts:
        if left.shape[1] != right.shape[0]:
            raise malformed(right, f"'{a}' is {list(left.shape)}")
        return Factor.of(left), Factor.of(right)
    middle = module.part(core)
    rank = left.shape[0]
    if len(middle.shape) != 4 or middle.shape[:2] != (rank, right.shape[0]) or not middle.numel:
        raise malformed(middle, f"a core between {list(left.shape)} and {list(right.shape)}")
    width = right.shape[1] * math.prod(middle.shape[2:])

    def joined(t: Array, w: Array) -> Array:
        return (t.transpose(0, 2, 3, 1) @ w).transpose(0, 3, 1, 2)  # sum over j of t[i, j, k, l] w[j, in]

    A = Factor((left,), (left.shape[1], rank), lambda t: t.T)
    return A, Factor.computed((Factor.of(middle), Factor.of(right)), (rank, width), joined)


def put_pair(file: PeftFile, key: str, pair: Sequence[Factor], names: tuple[str, str, str]) -> bool:
    """Store the two factors that `low_rank_pair` reads, under the same names; whether they have a core."""
    (A, B), (a, b, core) = pair, names
    if len(B.terms) == 2 and len(B.terms[0].shape) == 4:
        middle, right = B.terms
        file.put(f"{key}.{core}", middle)
        file.put(f"{key}.{a}", A, (A.shape[1], A.shape[0]), lambda t: t.T)
        file.put(f"{key}.{b}", right)
        return True
    file.put(f"{key}.{a}", A)
    file.put(f"{key}.{b}", B)
    return False


def alpha_issue(config: Mapping[str, Any]) -> Iterable[str]:
    """A warning where the configuration has no alpha."""
    if "alpha" not in config:
        yield "no alpha in its configuration: PEFT's default, 8, is used"
