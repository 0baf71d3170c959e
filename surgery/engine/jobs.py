# SPDX-License-Identifier: Apache-2.0
"""The jobs of a plan: an output file while it is being made, and a weight while it is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, Copy, PlannedFile, PlannedTensor
from surgery.engine.processes import Stop
from surgery.progress import Callback, Progress
from surgery_formats.errors import ProofError
from surgery_formats.files.output.folder import OutputFile, OutputFolder
from surgery_formats.files.raw import File

__all__ = ["ByteMeter", "ComputeWeight", "Computed", "CopyRange", "FileJob", "WeightJob", "Write", "copied_ranges"]

_COPY_CHUNK = 64 << 20

Write = Callable[[int, int, memoryview], None]
ComputeWeight = Callable[[str, Compute, Write, Callable[[], bool], str], tuple[Measurement, ...]]
"""As `surgery.engine.arithmetic.compute`: hands the bytes of one weight to a `Write`, and returns what was measured."""


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes of one input that go to one output unchanged."""

    source: File
    source_offset: int
    offset: int
    nbytes: int


def copied_ranges(file: PlannedFile, most: int = _COPY_CHUNK) -> list[CopyRange]:
    """What a file has of others, unchanged: ranges that are adjacent in both source and output are joined.

    The result is then cut into pieces of at most `most` bytes, so that several threads can share it and Ctrl-C is answered soon.
    """
    runs: list[CopyRange] = []
    for tensor in sorted(file.tensors, key=lambda tensor: tensor.offset):
        if not isinstance(tensor.step, Copy) or tensor.nbytes == 0:
            continue
        source, target = tensor.step.source, tensor.offset
        for origin, offset, nbytes in source.file.ranges(source.offset, tensor.nbytes):
            last = runs[-1] if runs else None
            if (
                last is not None
                and last.source is origin
                and last.source_offset + last.nbytes == offset
                and last.offset + last.nbytes == target
            ):
                runs[-1] = CopyRange(last.source, last.source_offset, last.offset, last.nbytes + nbytes)
            else:
                runs.append(CopyRange(origin, offset, target, nbytes))
            target += nbytes
    return [
        CopyRange(run.source, run.source_offset + at, run.offset + at, min(most, run.nbytes - at))
        for run in runs
        for at in range(0, run.nbytes, most)
    ]


class FileJob:
    """One output file while it is being made; the part that ends last sends it to disk."""

    def __init__(self, file: PlannedFile) -> None:
        self.file = file
        self.computed = [tensor for tensor in file.tensors if isinstance(tensor.step, Compute)]
        self.measured: dict[str, Measurement] = {}
        self.synced: Future[None] = Future()
        self._lock = threading.Lock()
        self._parts = 0
        self._out: OutputFile | None = None
        self._copiers: ThreadPoolExecutor | None = None

    @property
    def out(self) -> OutputFile:
        """The open output file."""
        assert self._out is not None
        return self._out

    def open(self, folder: OutputFolder, meter: ByteMeter) -> None:
        """Create the file and write its header, and the zeros between tensors."""
        self._out = folder.create(self.file.name, self.file.nbytes)
        for at, raw in ((0, self.file.header), *((at, bytes(nbytes)) for at, nbytes in self.file.padding)):
            self._out.pwrite(raw, at)
            if self._out.readback(at, len(raw)) != raw:
                raise ProofError("the header on disk is not the one written", file=self.file.name)
            meter.add(len(raw))

    def start(self, copiers: ThreadPoolExecutor, verify: bool, stop: Stop, meter: ByteMeter) -> list[Future[None]]:
        """Submit the copies."""
        chunks = copied_ranges(self.file)
        self._parts = 1 + len(chunks) + len(self.computed)
        self._copiers = copiers
        self._part_done()
        return [copiers.submit(self.copy, chunk, verify, stop, meter) for chunk in chunks]

    def copy(self, chunk: CopyRange, verify: bool, stop: Stop, meter: ByteMeter) -> None:
        """One run of unchanged bytes, by the kernel."""
        if stop.is_set():
            return
        self.out.copy_from(chunk.source, chunk.source_offset, chunk.offset, chunk.nbytes)
        if verify and self.out.readback(chunk.offset, chunk.nbytes) != chunk.source.read(
            chunk.source_offset, chunk.nbytes
        ):
            raise ProofError(
                f"bytes {chunk.offset} to {chunk.offset + chunk.nbytes} differ from their source", file=self.file.name
            )
        meter.add(chunk.nbytes)
        self._part_done()

    def write(self, tensor: PlannedTensor, offset: int, raw: memoryview, check: bytearray) -> None:
        """A block of a computed tensor, read back from the staged file into `check` and compared."""
        at = tensor.offset + offset
        self.out.pwrite(raw, at)
        self.out.readback_into(memoryview(check), at)
        if check != raw:
            raise ProofError("a block on disk is not the one written", file=self.file.name, tensor=tensor.label)

    def finish(self, tensor: PlannedTensor, measured: Measurement) -> None:
        """A computed tensor is complete."""
        with self._lock:
            self.measured[tensor.label] = measured
        self._part_done()

    def _part_done(self) -> None:
        with self._lock:
            self._parts -= 1
            last = self._parts == 0
        if last and self._copiers is not None:
            self._copiers.submit(self._sync)

    def _sync(self) -> None:
        try:
            self.out.finish(
                {"tensors": {label: measurement.as_record() for label, measurement in sorted(self.measured.items())}}
            )
        except BaseException as error:
            self.synced.set_exception(error)
        else:
            self.synced.set_result(None)


class WeightJob:
    """One computed weight, and the tensors of unfinished files that take it."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[FileJob, PlannedTensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(tensor.nbytes for _, tensor in self.outputs.values())

    def compute(self, compute: ComputeWeight, device: str, stop: Stop, written: Callable[[int], None]) -> Computed:
        """All of it, block by block; `written` is told of every block."""
        _, tensor = next(iter(self.outputs.values()))
        assert isinstance(tensor.step, Compute)
        checks: dict[int, bytearray] = {}
        total = dict.fromkeys(self.outputs, 0)

        def write(part: int, offset: int, raw: memoryview) -> None:
            if part not in self.outputs:
                return
            check = checks.get(part)
            if check is None or len(check) != len(raw):
                check = checks[part] = bytearray(len(raw))
            job, tensor = self.outputs[part]
            job.write(tensor, offset, raw, check)
            total[part] += len(raw)
            written(len(raw))

        return Computed(compute(tensor.weight_label, tensor.step, write, stop.is_set, device), total)

    def note(self, written: Mapping[int, int], meter: ByteMeter) -> None:
        """Another process wrote so many bytes of every part, in order."""
        for part, nbytes in written.items():
            job, output = self.outputs[part]
            job.out.note_written(output.offset, nbytes)
            meter.add(nbytes)

    def finish(self, measured: tuple[Measurement, ...]) -> None:
        """It is complete."""
        for part, (job, output) in self.outputs.items():
            job.finish(output, measured[part])


class Computed(NamedTuple):
    """What was measured of each part of a weight, and the number of bytes written of each."""

    measured: tuple[Measurement, ...]
    written: dict[int, int]


class ByteMeter:
    """Adds up bytes from all threads."""

    def __init__(self, total: int, callback: Callback | None) -> None:
        self._total = total
        self._done = 0
        self._callback = callback
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """`nbytes` more are in the staged files."""
        with self._lock:
            self._done += nbytes
            if self._callback is not None:
                self._callback(Progress(self._done, self._total, "writing" if self._done < self._total else "syncing"))
