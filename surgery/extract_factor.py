# SPDX-License-Identifier: Apache-2.0
"""Factorise differences, one matrix per thread, into a scratch file: memory holds no more than the matrices being worked on."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.deltas import Delta
from surgery.extract_sites import Unit
from surgery_formats.tensors import as_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["Criterion", "Factored", "Piece", "Place", "Scratch", "factor", "in_threads"]

ROWS_FROM = 1 << 27
"""Elements above which a matrix is read block by block at every product instead of being held (512 MB of float32): vocabularies."""
MOST = 256
"""Most singular values looked at where the rank is to be found (budget, auto): beyond, an adapter is no smaller than what it replaces."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """How the rank of a matrix is found; exactly one is set.

    Attributes:
        rank: So many, less where the matrix is smaller.
        energy: Until this share of ``||D||_F^2`` is held.
        max_error: Until ``||D - BA||_F / ||D||_F`` is at most this.
        most: Look at so many and decide later (budget, auto).
        numbers: Most numbers the whole adapter may hold, which limits `most`.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    most: int | None = None
    numbers: int | None = None

    def limit(self, cost: int) -> int | None:
        """Directions of a unit of which each costs `cost` numbers; None for no limit of its own."""
        if self.most is None or self.numbers is None:
            return self.most if self.rank is None else self.rank
        return max(1, min(self.most, self.numbers // cost))


class Scratch:
    """Float32 matrices in a nameless file beside the output: the kernel removes it whatever happens. Any thread may use it."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        self._end = 0
        self._lock = threading.Lock()

    def put(self, values: torch.Tensor) -> Place:
        """Store a matrix."""
        import torch

        kept = values.to("cpu", torch.float32).contiguous()
        raw = as_bytes(kept)
        with self._lock:
            at, self._end = self._end, self._end + len(raw)
        done = 0
        while done < len(raw):
            done += os.pwrite(self._file.fileno(), raw[done:], at + done)
        return Place(self, at, (kept.shape[0], kept.shape[1]))

    def get(self, place: Place) -> torch.Tensor:
        """Read it back."""
        import torch

        made = torch.empty(place.shape, dtype=torch.float32)
        raw, done = as_bytes(made), 0
        while done < len(raw):
            done += os.preadv(self._file.fileno(), [raw[done:]], place.offset + done)
        return made

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in the scratch file."""

    scratch: Scratch
    offset: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """One factorised matrix ``D ~ left right^T``, the square root of every singular value on either side.

    Attributes:
        left: ``(k, out)``, one direction per row.
        right: ``(k, in)``.
        values: Singular values, descending.
        total: ``||D||_F^2``.
        rest: What all `k` leave of it.
        bound: The error is at most this many times the least possible.
        edge: Largest singular value that rounding noise alone would have.
    """

    left: Place
    right: Place
    values: tuple[float, ...]
    total: float
    rest: float
    bound: float
    edge: float = 0.0

    @property
    def signal(self) -> int:
        """Directions above the noise."""
        from surgery_formats.linalg.noise import signal_count

        return signal_count(self.values, self.edge)

    def residual(self, rank: int) -> float:
        """``||D - D_rank||_F^2``."""
        return self.rest + math.fsum(value * value for value in self.values[rank:])


@dataclass(frozen=True, slots=True)
class Factored:
    """A unit and its factorised matrices."""

    unit: Unit
    pieces: tuple[Piece, ...]

    @property
    def rank(self) -> int:
        """Most directions that any of its matrices has."""
        return max(len(piece.values) for piece in self.pieces)

    @property
    def energy(self) -> float:
        """Of all its matrices."""
        return math.fsum(piece.total for piece in self.pieces)

    @property
    def spectrum(self) -> list[float]:
        """Root of the energy that each further direction holds, in all matrices together."""
        columns = zip_longest(*(piece.values for piece in self.pieces), fillvalue=0.0)
        return [math.hypot(*column) for column in columns]

    def residual(self, rank: int) -> float:
        """Energy that is left at `rank`."""
        return math.fsum(piece.residual(rank) for piece in self.pieces)

    def factors(self, index: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(left (out, rank), right (rank, in))`` of one matrix; directions that it lacks are zeros."""
        import torch

        found = []
        for place in (self.pieces[index].left, self.pieces[index].right):
            whole = place.scratch.get(place)[:rank]
            found.append(torch.nn.functional.pad(whole, (0, 0, 0, rank - len(whole))))
        return found[0].T, found[1]


def factor(
    unit: Unit, criterion: Criterion, scratch: Scratch, device: str, stop: Callable[[], bool]
) -> Factored | None:
    """Factorise every matrix of a unit; None if told to stop."""
    pieces = []
    for delta in unit.deltas:
        if stop():
            return None
        pieces.append(_piece(delta, criterion, criterion.limit(unit.cost), scratch, device))
    return Factored(unit, tuple(pieces))


def _piece(delta: Delta, criterion: Criterion, rank: int | None, scratch: Scratch, device: str) -> Piece:
    from surgery.extract_noise import noise_edge
    from surgery_formats.linalg.svd import truncated_svd

    large = delta.shape[0] * delta.shape[1] > ROWS_FROM and not delta.transposed
    found = truncated_svd(
        delta if large else delta.whole(device),
        rank=None if rank is None else min(rank, *delta.shape),
        energy=criterion.energy,
        max_error=criterion.max_error,
        device=device,
    )
    root = found.S.sqrt()
    return Piece(
        scratch.put((found.U * root).T),
        scratch.put((found.V * root).T),
        tuple(found.S.tolist()),
        float(found.total) ** 2,
        float(found.residual) ** 2,
        float(found.bound),
        noise_edge(delta),
    )


def in_threads(jobs: Sequence[Callable[[Callable[[], bool]], None]], workers: int) -> None:
    """Run every job, each in one thread of torch's (law 6); the first failure stops the others.

    Args:
        jobs: Each gets a function that says whether to stop.
        workers: Threads.
    """
    import torch

    stop = threading.Event()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, "surgery-factor", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(job, stop.is_set) for job in jobs]
            try:
                done, rest = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
            if rest:
                stop.set()
            for future in rest:
                future.cancel()
            for future in futures:
                if future in done:
                    future.result()
    finally:
        torch.set_num_threads(before)
