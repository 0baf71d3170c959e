# SPDX-License-Identifier: Apache-2.0
"""How near truncated_svd comes to the least possible error, and how true the residual is that it reports.

    python benchmarks/svd_grid.py [--largest 4096] [--device cpu]

Every spectrum at every shape and rank; the matrices have known singular values, those of bf16 pairs are computed in float64. Errors are
measured in float64, element by element. Asserts what the documents promise and prints the worst case of each row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy
from measure import versions

from surgery_formats.arrays import to_device
from surgery_formats.linalg.svd import truncated_svd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from tests.support.spectra import made, norm, true_error  # matrices of known spectra are the tests'

KINDS = {
    "fast": "exponential, 1e-6 at the end",
    "power": "i^-0.7",
    "flat": "i^-0.35",
    "spiked": "24 directions above a dense bulk",
    "bulk": "nothing but a dense bulk",
    "low": "exactly rank 12",
}
SHAPES = ((64, 64), (256, 256), (1024, 1024), (4096, 4096), (4096, 1024), (1024, 4096), (4096, 64), (64, 4096))
RANKS = (4, 16, 64)


@dataclass
class Worst:
    """Of all matrices of a kind."""

    cases: int = 0
    ratio: float = 1.0
    nothing: float = 0.0
    residual: float = 0.0
    seconds: float = 0.0

    def add(self, d: numpy.ndarray, s: numpy.ndarray, rank: int, device: str) -> None:
        there, started = to_device(d, device), time.perf_counter()
        found = truncated_svd(there, rank=rank)
        self.seconds = max(self.seconds, time.perf_counter() - started)
        error, best, total = true_error(d, found), norm(s[rank:]), norm(s)
        self.cases += 1
        if error <= 1e-6 * total:
            self.nothing = max(self.nothing, error / total)
        else:
            self.ratio = max(self.ratio, error / best)
            self.residual = max(self.residual, abs(found.residual / error - 1))
        assert error <= 1.001 * best or error <= 1e-6 * total, (d.shape, rank, error / best)
        assert abs(found.residual - error) <= 0.01 * error + 1e-9 * total, (d.shape, rank, found.residual, error)


def pairs(d: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The change as bf16 checkpoints have it, and its singular values."""
    base = (numpy.random.default_rng(3).standard_normal(d.shape, numpy.float32) * 0.02).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(numpy.float32) + d * (1e-3 / numpy.sqrt(numpy.mean(d**2)))).astype(ml_dtypes.bfloat16)
    moved = tuned.astype(numpy.float32) - base.astype(numpy.float32)
    side = (moved if moved.shape[0] <= moved.shape[1] else moved.T).astype(numpy.float64)
    return moved, numpy.sqrt(numpy.linalg.eigvalsh(side @ side.T).clip(min=0))[::-1]


def cases(kind: str, largest: int, *, bf16: bool) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    for shape in SHAPES:
        if max(shape) <= largest:
            d, s = made(*shape, kind)
            yield pairs(d) if bf16 else (d, s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=4096, help="side")
    parser.add_argument(
        "--largest-pair", type=int, default=1024, help="side of bf16 pairs, whose spectra must be computed"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    columns = ("spectrum", "matrices x ranks", "error / least possible, worst", "missing of an exact rank")
    print(f"| {' | '.join(columns)} | residual reported, off by | slowest, s |")
    print("|---|---|---|---|---|---|")
    for bf16, largest in ((False, options.largest), (True, options.largest_pair)):
        for kind, words in KINDS.items():
            worst = Worst()
            for d, s in cases(kind, largest, bf16=bf16):
                for rank in RANKS:
                    if rank <= min(d.shape):
                        worst.add(d, s, rank, options.device)
            title, off = f"{kind}: {words}{', bf16 pair' if bf16 else ''}", f"{worst.residual:.1e}"
            nearest = f"{worst.ratio:.6f} | {worst.nothing:.0e}"
            print(f"| {title} | {worst.cases} | {nearest} | {off} | {worst.seconds:.2f} |", flush=True)
    print(f"\n{versions('numpy')}")


if __name__ == "__main__":
    main()
