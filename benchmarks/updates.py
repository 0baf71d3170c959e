# SPDX-License-Identifier: Apache-2.0
"""Updates of one matrix of 4096 x 4096, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import IA3, OFT, DoRA, Factor, LoHa, LoKr, LoRA, Offset, TokenRows, Update, VeRA

SIDE = 4096


class Store:
    """Seeded normal numbers in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._random = np.random.default_rng(0)
        self._count = 0

    def tensor(
        self, shape: tuple[int, ...], spread: float, centre: float = 0.0, dtype: DType = DType.F32
    ) -> StoredTensor:
        """A tensor of its own file."""
        self._count += 1
        values = cast(centre + spread * self._random.standard_normal(shape, np.float32), dtype)
        path = self._folder / f"{self._count}.bin"
        path.write_bytes(values.tobytes())
        return StoredTensor(path.stem, dtype, shape, open_file(path), 0, values.nbytes)

    def factor(self, *shape: int, spread: float, centre: float = 0.0) -> Factor:
        """A trained factor, stored in float32 as trainers do."""
        return Factor.of(self.tensor(shape, spread, centre))


def made(store: Store) -> list[tuple[str, Update]]:
    """One update of each of some kinds, by name."""
    f = store.factor
    A, B = f(16, SIDE, spread=0.02), f(SIDE, 16, spread=0.02)
    magnitude = f(SIDE, spread=0.1, centre=1.3)
    pairs = [f(*shape, spread=0.1) for shape in ((SIDE, 16), (16, SIDE)) * 2]
    C, D = (f(64, 64, spread=0.05) for _ in "CD")
    rows, columns = (f(SIDE, spread=0.1, centre=1.0) for _ in "rc")
    angles = f(SIDE // 32, 32 * 31 // 2, spread=0.03)
    b, d = f(SIDE, spread=0.5), f(256, spread=0.1)
    wide, tall = f(256, SIDE, spread=0.02), f(SIDE, 256, spread=0.1)
    full = f(SIDE, SIDE, spread=0.002)
    tokens, indices = f(16, SIDE, spread=0.02), tuple(range(3, SIDE, SIDE // 16))
    lora = LoRA(A, B, 2.0)

    return [
        ("LoRA, rank 16", lora),
        ("DoRA, rank 16", DoRA(lora, magnitude)),
        ("LoHa, rank 16", LoHa(*pairs, scale=0.5)),
        ("LoKr, 64 x 64", LoKr(C, D, 0.5)),
        ("(IA)^3 on outputs", IA3(rows, True, SIDE)),
        ("(IA)^3 on inputs", IA3(columns, False, SIDE)),
        ("OFT, series, blocks of 32", OFT(angles, 32, 5, outputs=SIDE, inputs=SIDE)),
        ("OFT, exact, blocks of 32", OFT(angles, 32, 0, outputs=SIDE, inputs=SIDE)),
        ("VeRA, rank 256", VeRA(b, d, (wide, tall), 1.0, SIDE)),
        ("offset in full", Offset(full)),
        ("16 token rows", TokenRows(tokens, indices, SIDE)),
    ]
