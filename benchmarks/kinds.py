# SPDX-License-Identifier: Apache-2.0
"""How fast weights take an update, by kind of update and stored type: `python benchmarks/kinds.py`.

Gigabytes of base per second that the arithmetic of a merge reads, computes, rounds, measures and hashes, on one core and on all, files in
memory and the output thrown away. Every result is compared with the kind's equation in float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import ROOT, median, versions
from numpy.typing import NDArray

from surgery.engine.arithmetic import compute
from surgery.engine.execute import default_workers
from surgery.engine.plan import Compute
from surgery_formats.arrays import as_torch, cast
from surgery_formats.binding.edits import Operation
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.files.raw import open_file
from surgery_formats.storage.plain import Elements, Plain
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import whole
from surgery_formats.threads import one_thread
from surgery_formats.updates import IA3, OFT, DoRA, Factor, LoHa, LoKr, LoRA, Offset, TokenRows, Update, VeRA

sys.path.insert(0, str(ROOT))
from tests.oracles.measure import relative_error, ulp_error  # what an error is, is the tests'

SIDE = 4096
TYPES = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32, "fp64": DType.F64}
SAMPLE = slice(3, None, 8)  # rows that are compared: some of every block

Matrix = NDArray[np.float64]


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


@dataclass(frozen=True)
class Kind:
    """An update, and its equation for the sampled rows; without an update the weight is replaced by `source`."""

    name: str
    update: Update | None
    expected: Callable[[Matrix], Matrix]
    source: StoredTensor | None = None


def made(store: Store) -> list[Kind]:
    """One update of every kind."""
    f = store.factor
    A, B = f(16, SIDE, spread=0.02), f(SIDE, 16, spread=0.02)
    magnitude = f(SIDE, spread=0.1, centre=1.3)
    pairs = [f(*shape, spread=0.1) for shape in ((SIDE, 16), (16, SIDE)) * 2]
    C, D = (f(64, 64, spread=0.05) for _ in "CD")
    rows, columns = (f(SIDE, spread=0.1, centre=1.0) for _ in "rc")
    angles = f(SIDE // 32, 32 * 31 // 2, spread=0.03)
    b, d = f(SIDE, spread=0.5), f(256, spread=0.1)
    wide, tall = f(256, SIDE, spread=0.02), f(SIDE, 256, spread=0.1)
    full, other = f(SIDE, SIDE, spread=0.002), store.tensor((SIDE, SIDE), 0.02)
    tokens, indices = f(16, SIDE, spread=0.02), tuple(range(3, SIDE, SIDE // 16))
    lora = LoRA(A, B, 2.0)

    def v(factor: Factor) -> Matrix:
        return factor.load(DType.F64)  # type: ignore[no-any-return]

    def moved(w: Matrix) -> Matrix:
        return w + 2.0 * (v(B)[SAMPLE] @ v(A))

    def stretched(w: Matrix) -> Matrix:
        V = moved(w)
        return V * (v(magnitude)[SAMPLE] / np.sqrt((V * V).sum(1)))[:, None]

    def hadamard(w: Matrix) -> Matrix:
        a1, b1, a2, b2 = map(v, pairs)
        return w + 0.5 * (a1[SAMPLE] @ b1) * (a2[SAMPLE] @ b2)

    def rotated(w: Matrix, series: bool) -> Matrix:
        result = np.empty_like(w)
        upper, one = np.triu_indices(32, 1), np.eye(32)
        for i, row in enumerate(v(angles)):
            Q = np.zeros((32, 32))
            Q[upper] = row
            Q -= Q.T
            R = (
                one + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
                if series
                else (one - Q) @ np.linalg.inv(one + Q)
            )
            at = slice(i * 32, i * 32 + 32)
            result[:, at] = w[:, at] @ R.T
        return result

    def some(w: Matrix) -> Matrix:
        table = np.full((SIDE, SIDE), np.nan)
        table[SAMPLE] = w
        table[list(indices)] = v(tokens)
        return table[SAMPLE]

    return [
        Kind("LoRA, rank 16", lora, moved),
        Kind("DoRA, rank 16", DoRA(lora, magnitude), stretched),
        Kind("LoHa, rank 16", LoHa(*pairs, scale=0.5), hadamard),
        Kind("LoKr, 64 x 64", LoKr(C, D, 0.5), lambda w: w + 0.5 * np.kron(v(C), v(D))[SAMPLE]),
        Kind("(IA)^3 on outputs", IA3(rows, True, SIDE), lambda w: w * v(rows)[SAMPLE, None]),
        Kind("(IA)^3 on inputs", IA3(columns, False, SIDE), lambda w: w * v(columns)),
        Kind("OFT, series, blocks of 32", OFT(angles, 32, 5, outputs=SIDE, inputs=SIDE), lambda w: rotated(w, True)),
        Kind("OFT, exact, blocks of 32", OFT(angles, 32, 0, outputs=SIDE, inputs=SIDE), lambda w: rotated(w, False)),
        Kind("VeRA, rank 256", VeRA(b, d, (wide, tall), 1.0, SIDE),
             lambda w: w + v(b)[SAMPLE, None] * (v(tall)[SAMPLE] @ (v(d)[:, None] * v(wide)))),
        Kind("offset in full", Offset(full), lambda w: w + v(full)[SAMPLE]),
        Kind("replacement, from fp32", None, lambda w: v(Factor.of(other))[SAMPLE], other),
        Kind("16 token rows", TokenRows(tokens, indices, SIDE), some),
    ]  # fmt: skip


def step(kind: Kind, base: StoredTensor) -> Compute:
    """As a plan has it."""
    target = Elements(base.shape, base.matrix, base.dtype)
    source = Plain.of(kind.source or base)
    operations = () if kind.update is None else (Operation(kind.update, whole(base.matrix), Site(path="weight"), 0),)
    return Compute(source, operations, target)


def run(steps: list[Compute], workers: int) -> tuple[float, list[str]]:
    """Seconds as the engine takes them, and what was computed by its hash."""

    def one(step: Compute) -> str:
        (measured,) = compute("weight", step, lambda *_: None, lambda: False)
        return measured.xxh3

    with one_thread(), ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        hashes = list(pool.map(one, steps))
        return time.perf_counter() - started, hashes


def check(kind: Kind, base: StoredTensor) -> None:
    """The result is the equation's, rounded once."""
    raw = bytearray()
    with one_thread():
        compute("weight", step(kind, base), lambda _, at, block: raw.extend(block), lambda: False)
    before = cast(base.read(), DType.F64)[SAMPLE]
    after = as_torch(np.frombuffer(raw, base.dtype.numpy).reshape(base.shape)[SAMPLE].copy())
    expected = as_torch(kind.expected(before))
    if base.dtype in (DType.F64, DType.F32):
        error, limit = relative_error(after, expected), 1e-6 if base.dtype is DType.F32 else 1e-13
    else:
        error, limit = ulp_error(after, expected, as_torch(before)), 0.51
    assert error <= limit, (kind.name, base.dtype, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--kinds", default="", help="only those whose name contains this")
    parser.add_argument("--folder", type=Path, help="where to work; needs 1.2 GB, best in memory")
    options = parser.parse_args()
    cores = default_workers()
    cells: dict[str, list[str]] = {}
    for dtype in TYPES.values():
        with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=options.folder) as folder:
            store = Store(Path(folder))
            kinds = [kind for kind in made(store) if options.kinds in kind.name]
            bases = [store.tensor((SIDE, SIDE), 0.02, dtype=dtype) for _ in range(options.matrices)]
            measured(kinds, bases, sorted({1, cores}), options.rounds, cells)
    print(f"{options.matrices} matrices of {SIDE} x {SIDE}, GB of base per second on 1 core / on {cores}\n")
    print("\n".join([f"| | {' | '.join(TYPES)} |", "|---|" + "---|" * len(TYPES)]))
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")
    print(f"\n{versions('numpy', 'ml_dtypes')}")


def measured(
    kinds: list[Kind], bases: list[StoredTensor], counts: list[int], rounds: int, cells: dict[str, list[str]]
) -> None:
    """Append one column to the rows of `cells`."""
    steps = {kind.name: [step(kind, base) for base in bases] for kind in kinds}
    for kind in kinds:
        check(kind, bases[0])
    found = {name: run(made, counts[-1])[1] for name, made in steps.items()}
    seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in steps for count in counts}
    for _ in range(rounds):
        for (name, count), walls in seconds.items():
            wall, hashes = run(steps[name], count)
            assert hashes == found[name], (name, "differs from the run before")
            walls.append(wall)
    size = sum(base.nbytes for base in bases) / 1e9
    for name in steps:
        rates = [f"{size / median(seconds[name, count]):.2f}" for count in counts]
        cells.setdefault(name, []).append(" / ".join(rates))


if __name__ == "__main__":
    main()
