# SPDX-License-Identifier: Apache-2.0
"""One update of every kind, made in memory: seeded factors under names that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from surgery_formats.arrays import cast
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.testing.memory import adapter_of
from surgery_formats.updates import (
    DEFT,
    IA3,
    OFT,
    OSF,
    ChangedBase,
    DoRA,
    Factor,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Offset,
    PEANuT,
    Replacement,
    Seed,
    Stacked,
    TokenRows,
    UniLoRA,
    Update,
    VeRA,
)

__all__ = ["EVERY_KIND", "made_adapter", "made_factor", "product"]

_numbers: Iterator[int] = count()


def made_factor(*shape: int, scale: float = 0.3, dtype: DType = DType.F32) -> Factor:
    """Seeded normal numbers; every call makes others."""
    number = next(_numbers)
    drawn = scale * np.random.default_rng(number).standard_normal(shape)
    values = cast(cast(drawn, dtype), DType.F64)
    return Factor.of(computed(f"made {number}", shape, (), lambda: values, dtype))


def product(a: Factor, b: Factor) -> Factor:
    """``a b``, which remembers both."""
    return Factor.computed((a, b), (a.shape[0], b.shape[1]), lambda left, right: left @ right)


def _places(size: int, *shape: int) -> Tensor:
    """Seeded whole numbers below `size`."""
    drawn = np.random.default_rng(size).integers(0, size, shape)
    return computed(f"places {next(_numbers)}", shape, (), lambda: drawn, DType.I64)


def _lora(out: int = 24, inputs: int = 40, rank: int = 3) -> LoRA:
    return LoRA(made_factor(rank, inputs), made_factor(out, rank), 0.75, 0.75 * rank)


EVERY_KIND: dict[str, Update] = {
    "LoRA": _lora(),
    "DoRA": DoRA(_lora(), made_factor(24)),
    "DoRA on columns": DoRA(_lora(), made_factor(40), per_row=False),
    "raw PiSSA": ChangedBase(_lora(), "principal"),
    "raw OLoRA": ChangedBase(_lora(), "first columns"),
    "KaSA": ChangedBase(_lora(), "minor"),
    "DEFT": DEFT(made_factor(24, 3), made_factor(3, 40), orthonormal=False, scale=0.5),
    "DEFT by QR": DEFT(made_factor(24, 3), made_factor(3, 40), orthonormal=True),
    "PaRa": DEFT(made_factor(24, 3), None, orthonormal=True),
    "OSF": OSF(made_factor(24, 5), made_factor(5), made_factor(5, 40)),
    "GLoRA": GLoRA((made_factor(24, 2), made_factor(2, 40)), (made_factor(24, 1),)),
    "GLoRA by numbers": GLoRA((made_factor(1, 1),), ()),
    "PEANuT": PEANuT(
        made_factor(3, 24), made_factor(24, 3), (made_factor(3, 3),) * 2, (made_factor(3, 3),) * 2, "gelu", 0.5
    ),
    "Uni-LoRA": UniLoRA(
        made_factor(9), (_places(9, 3, 40), _places(9, 24, 3)), (made_factor(3, 40), made_factor(24, 3))
    ),
    "IA3 on rows": IA3(made_factor(24), per_row=True),
    "IA3 on columns": IA3(made_factor(40), per_row=False),
    "LoHa": LoHa(*(made_factor(*s) for s in ((24, 2), (2, 40), (24, 2), (2, 40))), scale=0.5, alpha=1.0),
    "LoKr": LoKr(made_factor(4, 5), made_factor(6, 8), 0.5, 1.0, 2),
    "LoKr of pairs": LoKr(made_factor(4, 5), product(made_factor(6, 2), made_factor(2, 8)), 0.5, 1.0, 2),
    "LoKr of a Conv1d": LoKr(made_factor(4, 5), made_factor(6, 8), 0.5, 1.0, 2, kernel=2, crossed=True),
    "OFT": OFT(made_factor(5, 28), 8, 0, inputs=40),
    "OFT by a series": OFT(made_factor(1, 28), 8, 5, radius=0.5, shared=True),
    "VeRA": VeRA(made_factor(24), made_factor(4), (made_factor(4, 48), made_factor(32, 4)), 0.5),
    "VeRA, drawn": VeRA(made_factor(24), made_factor(4), Seed(7)),
    "offset": Offset(made_factor(24, 40), 0.5),
    "offset of a bias": Offset(made_factor(24)),
    "replacement": Replacement(made_factor(24, 40)),
    "token rows": TokenRows(made_factor(3, 40), (2, 11, 7), 24),
    "experts": Stacked(tuple(_lora(8) for _ in range(3))),
}


def made_adapter(updates: dict[Site, Update], like: Adapter) -> Adapter:
    """An adapter of no format."""
    return adapter_of({site: (update,) for site, update in updates.items()}, like)
