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
    BAT,
    BOFT,
    C3A,
    DEFT,
    HRA,
    IA3,
    OFT,
    OSF,
    AdaLoRA,
    ChangedBase,
    Decomposed,
    DeLoRA,
    DoRA,
    Factor,
    FourierFT,
    FRoD,
    GLoRA,
    GLoRABias,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    Offset,
    OutputRotation,
    PEANuT,
    ProductGLoRA,
    PVeRA,
    RandLoRA,
    RandomBases,
    Replacement,
    RoAd,
    Seed,
    SHiRA,
    Stacked,
    SuperTuning,
    TinyLoRA,
    TokenRows,
    UniLoRA,
    Update,
    VBLoRA,
    VeRA,
    WaveFT,
)

__all__ = ["EVERY_KIND", "made_adapter", "made_factor", "product"]

_numbers: Iterator[int] = count()


def made_factor(*shape: int, scale: float = 0.3, dtype: DType = DType.F32) -> Factor:
    """Seeded normal numbers; every call makes others."""
    number = next(_numbers)
    drawn = scale * np.random.default_rng(number).standard_normal(shape)
    values = cast(cast(drawn, dtype), DType.F64)
    return Factor.of(computed(f"made {number}", shape, (), lambda: values, dtype))


def made_indices(rows: int, cols: int, count: int) -> Tensor:
    """Distinct places of a matrix, ``(2, count)``."""
    places = np.random.default_rng(next(_numbers)).permutation(rows * cols)[:count]
    values = np.stack([places // cols, places % cols]).astype(np.int32)
    return computed(f"made {next(_numbers)}", values.shape, (), lambda: values, DType.I32)


def made_choice(*shape: int, of: int = 9) -> Tensor:
    """Numbers below `of`."""
    values = np.random.default_rng(next(_numbers)).integers(0, of, shape).astype(np.uint8)
    return computed(f"made {next(_numbers)}", shape, (), lambda: values, DType.U8)


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
    "GLoRA of a bias": GLoRABias((), (made_factor(24, 1),), (made_factor(1, 1),)),
    "GLoRA of LyCORIS": ProductGLoRA(*(made_factor(*s) for s in ((40, 2), (2, 40), (24, 2), (2, 40))), scale=0.5),
    "GLoRA of LyCORIS on a convolution": ProductGLoRA(
        *(made_factor(*s) for s in ((10, 2), (2, 10), (24, 2), (2, 40))), scale=0.5
    ),
    "OFT of outputs": OutputRotation(made_factor(6, 4, 4), made_factor(24)),
    "OFT of outputs within a limit": OutputRotation(made_factor(6, 4, 4), limit=0.25),
    "BOFT of outputs": OutputRotation(made_factor(3, 4, 6, 6), made_factor(24)),
    "DoHa": Decomposed(
        LoHa(*(made_factor(*s) for s in ((24, 2), (2, 40), (24, 2), (2, 40))), scale=0.5, alpha=1.0), made_factor(24)
    ),
    "DoKr on columns": Decomposed(LoKr(made_factor(4, 5), made_factor(6, 8), 0.5), made_factor(40), per_row=False),
    "PEANuT": PEANuT(
        made_factor(3, 24), made_factor(24, 3), (made_factor(3, 3),) * 2, (made_factor(3, 3),) * 2, "gelu", 0.5
    ),
    "Uni-LoRA": UniLoRA(
        made_factor(9), (_places(9, 3, 40), _places(9, 24, 3)), (made_factor(3, 40), made_factor(24, 3))
    ),
    "FRoD": FRoD(made_factor(40, 40), made_factor(40), made_factor(9), _places(40, 2, 9), ()),
    "SuperTuning": SuperTuning(made_factor(9), _places(960, 9), 0.5),
    "TinyLoRA": TinyLoRA(made_factor(5), made_factor(5, 3, 3), made_factor(3, 40), made_factor(24, 3), 0.5),
    "WaveFT": WaveFT(made_factor(50), 777, "db1", 2.0),
    "WaveFT by long filters": WaveFT(made_factor(50), 3, "coif2", 2.0),
    "WaveFT of elements": WaveFT(made_factor(50), 3, "", 2.0),
    "IA3 on rows": IA3(made_factor(24), per_row=True),
    "IA3 on columns": IA3(made_factor(40), per_row=False),
    "LoHa": LoHa(*(made_factor(*s) for s in ((24, 2), (2, 40), (24, 2), (2, 40))), scale=0.5, alpha=1.0),
    "LoKr": LoKr(made_factor(4, 5), made_factor(6, 8), 0.5, 1.0, 2),
    "LoKr of pairs": LoKr(made_factor(4, 5), product(made_factor(6, 2), made_factor(2, 8)), 0.5, 1.0, 2),
    "LoKr of a Conv1d": LoKr(made_factor(4, 5), made_factor(6, 8), 0.5, 1.0, 2, kernel=2, crossed=True),
    "LoKr of two pairs": LoKr(
        product(made_factor(6, 2), made_factor(2, 5)), product(made_factor(4, 3), made_factor(3, 8)), 0.5, 1.0, 2
    ),
    "LoKr of a pair and a tall matrix": LoKr(
        product(made_factor(4, 2), made_factor(2, 10)), made_factor(6, 4), 0.5, 1.0, 2
    ),
    "LoKr of a Conv1d, of a pair": LoKr(
        product(made_factor(4, 2), made_factor(2, 5)), made_factor(6, 8), 0.5, 1.0, 2, kernel=2, crossed=True
    ),
    "OFT": OFT(made_factor(5, 28), 8, 0, inputs=40),
    "OFT by a series": OFT(made_factor(1, 28), 8, 5, radius=0.5, shared=True),
    "VeRA": VeRA(made_factor(24), made_factor(4), (made_factor(4, 48), made_factor(32, 4)), 0.5),
    "VeRA, drawn": VeRA(made_factor(24), made_factor(4), Seed(7)),
    "AdaLoRA": AdaLoRA(made_factor(3, 40), made_factor(24, 3), made_factor(3, 1), 0.5),
    "BAT": BAT(made_factor(6, 4, 4)),
    "BOFT": BOFT(made_factor(1, 5, 8, 8), made_factor(24)),
    "BOFT of three factors": BOFT(made_factor(3, 20, 2, 2), made_factor(24)),
    "C3A": C3A(made_factor(3, 5, 8), 0.5),
    "DeLoRA": DeLoRA(*(made_factor(*shape) for shape in ((3, 40), (24, 3), (1,), (40,))), scale=0.5),
    "FourierFT": FourierFT(made_factor(90, scale=9.0), 777, 30.0),
    "GraLoRA": GraLoRA(made_factor(4, 10, 4), made_factor(4, 4, 6), 0.5),
    "GraLoRA, hybrid": GraLoRA(
        made_factor(2, 20, 4), made_factor(2, 4, 12), 0.5, (made_factor(3, 40), made_factor(24, 3))
    ),
    "GraLoRA of full rank": GraLoRA(made_factor(4, 10, 8), made_factor(4, 8, 6), 0.5),
    "HiRA": HiRA(made_factor(3, 40), made_factor(24, 3)),
    "HRA": HRA(made_factor(40, 3), gram_schmidt=False),
    "HRA by Gram-Schmidt": HRA(made_factor(40, 3), gram_schmidt=True),
    "MiSS": MiSS(made_factor(7, 24), scale=0.5),
    "MiSS, mini": MiSS(made_factor(7, 8), repeats=True),
    "MiSS, mini, wide": MiSS(made_factor(3, 8), repeats=True),
    "PVeRA": PVeRA(made_factor(24), made_factor(8), (made_factor(8, 48), made_factor(32, 4)), 0.5),
    "PVeRA, drawn": PVeRA(made_factor(24), made_factor(8), Seed(7, twice=True)),
    "RandLoRA": RandLoRA(made_factor(7, 4), made_factor(4, 24), (made_factor(7, 1, 30), made_factor(48, 5, 7)), 0.5),
    "RandLoRA, drawn": RandLoRA(made_factor(7, 4), made_factor(4, 24), RandomBases(3, 7), 0.5),
    "RoAd": RoAd(made_factor(12), made_factor(12), 1, 8),
    "RoAd of outputs": RoAd(made_factor(24), made_factor(24), 2, 6),
    "RoAd of sines and cosines": RoAd(made_factor(48), made_factor(48), 4, 24),
    "SHiRA": SHiRA(made_factor(30), made_indices(24, 40, 30), 0.5),
    "VB-LoRA": VBLoRA(made_factor(3, 5, 9), made_factor(3, 3, 9), made_factor(9, 8), 2, (), 0.5),
    "VB-LoRA of the greatest": VBLoRA(
        made_factor(3, 5, 1), made_factor(3, 3, 1), made_factor(9, 8), 2, (made_choice(3, 5, 2), made_choice(3, 3, 2))
    ),
    "offset": Offset(made_factor(24, 40), 0.5),
    "offset of a bias": Offset(made_factor(24)),
    "replacement": Replacement(made_factor(24, 40)),
    "token rows": TokenRows(made_factor(3, 40), (2, 11, 7), 24),
    "experts": Stacked(tuple(_lora(8) for _ in range(3))),
}


def made_adapter(updates: dict[Site, Update], like: Adapter) -> Adapter:
    """An adapter of no format."""
    return adapter_of({site: (update,) for site, update in updates.items()}, like)
