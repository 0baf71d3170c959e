# SPDX-License-Identifier: Apache-2.0
"""Requests that stop, or see something else, where a worker plans them; workers import this module, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.execute import Run
from surgery.engine.shares.ray import Ray
from surgery.engine.shares.work import Work, WorkRequest
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.raw import File

HOLD = "hold-from-"


@dataclass(frozen=True)
class HeldWork:
    """Work whose shares leave a note when they begin, and wait while a file says so."""

    work: Work
    notes: Path

    @property
    def id(self) -> str:
        return self.work.id

    @property
    def inputs(self) -> Sequence[File]:
        return self.work.inputs

    @property
    def roots(self) -> Sequence[Path]:
        return self.work.roots

    @property
    def nbytes(self) -> int:
        return self.work.nbytes

    @property
    def pieces(self) -> int:
        return self.work.pieces

    @property
    def makes_files(self) -> bool:
        return self.work.makes_files

    @property
    def piece_memory(self) -> int:
        return self.work.piece_memory

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.notes / f"{index}-{node}-{os.getpid()}-{time.monotonic_ns()}").touch()
        while any(index >= int(path.name.removeprefix(HOLD)) for path in self.notes.glob(f"{HOLD}*")):
            time.sleep(0.05)
        return self.work.write_share(index, count, staged, run)


@dataclass(frozen=True)
class HeldRequest:
    """`request`, whose shares note in the folder `notes` that they begin, and wait there from ``hold-from-N`` on."""

    request: WorkRequest
    notes: str

    def work(self) -> Work:
        return HeldWork(self.request.work(), Path(self.notes))


@dataclass(frozen=True)
class SwappedRequest:
    """`request`, and `other` wherever another process plans it."""

    request: WorkRequest
    other: WorkRequest
    driver: int

    def work(self) -> Work:
        return (self.request if os.getpid() == self.driver else self.other).work()


@dataclass(frozen=True)
class HeldOnRay:
    """A Ray cluster whose shares are held."""

    address: str
    notes: Path

    @contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        with Ray(self.address).shares(HeldRequest(request, str(self.notes)), work, output, run) as folders:
            yield folders


@dataclass(frozen=True)
class SwappedOnRay:
    """A Ray cluster whose workers plan something else."""

    address: str
    other: WorkRequest

    @contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        swapped = SwappedRequest(request, self.other, os.getpid())
        with Ray(self.address).shares(swapped, work, output, run) as folders:
            yield folders
