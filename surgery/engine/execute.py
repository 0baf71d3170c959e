# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: the kernel copies what did not change, threads compute the rest, and every computed block is read back.

One thread computes one tensor from its first block to its last, so the result does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from surgery.engine.ledger import Ledger, Measurement
from surgery.engine.plan import Compute, Copy, Plan, PlannedFile, PlannedTensor, SideFile
from surgery.progress import Callback, Progress
from surgery_formats.errors import ProofError, ResourceError
from surgery_formats.files.output.folder import FileRecord, OutputFile, OutputFolder, output_folder
from surgery_formats.files.raw import File, open_file
from surgery_formats.text import nbytes as human
from surgery_formats.threads import one_thread

__all__ = [
    "ComputeWeight",
    "Engine",
    "Run",
    "ThisProcess",
    "Write",
    "cores",
    "default_workers",
    "execute",
    "remembered",
    "still_good",
    "write_side_file",
    "write_weights",
]

_COPY_CHUNK = 64 << 20
_MAX_DEFAULT_WORKERS = 8  # beyond, memory bandwidth is the limit
_IO_THREADS = 2
_SMALL = 16 << 20  # a tokenizer is read whole; anything larger is copied by the kernel


@dataclass(frozen=True, slots=True)
class Run:
    """How to run a plan; none of it changes the result.

    Attributes:
        workers: Threads that compute; None is one per core, at most eight.
        memory_limit: Bytes the computed tensors may take together; None is no limit.
        device: Where arithmetic runs.
        verify_copies: Compare copied ranges byte by byte as well, instead of trusting the identity of their source.
        overwrite: Replace an existing output.
        progress: Called with every step.
    """

    workers: int | None = None
    memory_limit: int | None = None
    device: str = "cpu"
    verify_copies: bool = False
    overwrite: bool = False
    progress: Callback | None = None


def default_workers() -> int:
    """Cores this process may use, at most eight."""
    return min(cores(), _MAX_DEFAULT_WORKERS)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Write = Callable[[int, int, memoryview], None]
ComputeWeight = Callable[[str, Compute, Write, Callable[[], bool], str], tuple[Measurement, ...]]
"""As `surgery.engine.arithmetic.compute`: hands the bytes of one weight to a `Write`, and returns what was measured."""


class Engine(Protocol):
    """Where weights are computed; this process always does the copies, proofs and commit."""

    def computing(self, plan: Plan, output: Path) -> AbstractContextManager[ComputeWeight]:
        """A context with the function that computes a weight of `plan`, open until the output is committed or given up.

        Raises:
            FitError, ProofError: this engine cannot run this plan.
        """
        ...


class ThisProcess:
    """The engine of one process: its threads compute."""

    @contextlib.contextmanager
    def computing(self, plan: Plan, output: Path) -> Iterator[ComputeWeight]:
        """The arithmetic itself; its libraries are imported when the first weight is computed."""
        yield _compute_here


def _compute_here(
    label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str
) -> tuple[Measurement, ...]:
    from surgery.engine.arithmetic import compute

    return compute(label, step, write, stop, device)


def execute(
    plan: Plan,
    output: str | os.PathLike[str],
    run: Run,
    finish: Callable[[Ledger], Mapping[str, bytes]],
    engine: Engine | None = None,
    last: Callable[[OutputFolder], None] | None = None,
) -> Ledger:
    """Write the output of `plan`, all or nothing.

    Args:
        plan: What to do.
        output: Folder that must not exist yet (see `Run.overwrite`).
        run: How.
        finish: Called with the measured ledger before the commit; returns further small files. It may raise to undo
            everything.
        engine: Where weights are computed; None is this process.
        last: Called when every file is in the staged folder. It may read them and add others, or raise to undo
            everything.

    Returns:
        The plan with what was measured.

    Raises:
        OutputExistsError, ResourceError, FitError, ProofError: nothing is left behind.
    """
    staged = output_folder(output, _job(plan), overwrite=run.overwrite, inputs=plan.roots, verify=still_good)
    with (engine or ThisProcess()).computing(plan, Path(output)) as compute, staged as folder:
        measured = write_weights(plan, folder, run, compute)
        ledger = Ledger(plan, measured)
        for side in plan.side_files:
            write_side_file(side, folder)
        for name, data in finish(ledger).items():
            folder.write_small(name, data)
        if last is not None:
            last(folder)
        for file in plan.inputs:
            file.check_unchanged()
        folder.commit({"plan": plan.id, "inputs": dict(plan.facts), "ledger": ledger.as_json()})
    return ledger


def _job(plan: Plan) -> str:
    """Name the unfinished work of a plan on exactly these files.

    The identity of every input counts, because a copied range is only valid for the file it was copied from.
    """
    seen = sorted({(str(file.path.name), *file.identity) for file in plan.inputs})
    return hashlib.sha256(json.dumps([plan.id, seen]).encode()).hexdigest()


def write_side_file(side: SideFile, folder: OutputFolder) -> None:
    """Small ones at once; large ones by the kernel, like weights."""
    if side.source is None:
        folder.write_small(side.name, side.data)
        return
    file = open_file(side.source)
    if file.size <= _SMALL:
        folder.write_small(side.name, bytes(file.read(0, file.size)))
    else:
        out = folder.create(side.name, file.size)
        out.copy_from(file, 0, 0, file.size)
        file.check_unchanged()
        out.finish({})


def write_weights(
    plan: Plan, folder: OutputFolder, run: Run, compute: ComputeWeight = _compute_here
) -> dict[str, Measurement]:
    """Write the weight files of `plan` into `folder`, except those an interrupted run finished.

    Returns what was measured of each computed tensor.

    Raises:
        ResourceError, FitError, ProofError: as `execute`.
    """
    # Copies start at once in threads of their own, while libraries are still being imported for the rest.
    measured: dict[str, Measurement] = {}
    jobs: list[_FileJob] = []
    for file in plan.files:
        if (record := folder.finished.get(file.name)) is not None:
            measured |= remembered(record.record)
        else:
            jobs.append(_FileJob(file))
    meter = _ByteMeter(sum(job.file.nbytes for job in jobs), run.progress)
    stop = threading.Event()
    with ThreadPoolExecutor(_IO_THREADS, "surgery-copy") as copiers:
        futures: list[Future[None]] = []
        try:
            for job in jobs:
                futures += job.start(folder, copiers, run, stop, meter)
            if any(job.computed for job in jobs):
                with _compute_pool(_affordable(plan, run), stop) as pool:
                    computing = [
                        pool.submit(weight.compute, compute, run, stop, meter) for weight in _weights_in_turn(jobs)
                    ]
                    _wait([*futures, *computing], stop)
            _wait(futures, stop)
            _wait([job.synced for job in jobs], stop)
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    for job in jobs:
        measured |= job.measured
    return measured


def _weights_in_turn(jobs: Sequence[_FileJob]) -> Iterable[_WeightJob]:
    """A weight of each file in turn: two threads that write to one file wait for each other inside the kernel.

    The tensors of one weight may lie in several files; those of files that are finished already are not written again.
    """
    weights: dict[int, _WeightJob] = {}
    for row in zip_longest(*(job.computed for job in jobs)):
        for job, tensor in zip(jobs, row, strict=True):
            if tensor is not None:
                weights.setdefault(id(tensor.step), _WeightJob()).outputs[tensor.part] = job, tensor
    return weights.values()


def _wait(futures: list[Future[None]], stop: threading.Event) -> None:
    """Wait for all; at the first failure tell the others to stop, and raise it."""
    done, rest = wait(futures, return_when=FIRST_EXCEPTION)
    failed = next((future for future in futures if future in done and future.exception() is not None), None)
    if failed is not None or rest:
        stop.set()
        for future in rest:
            future.cancel()
    for future in futures:
        if future in done:
            future.result()


@contextlib.contextmanager
def _compute_pool(workers: int, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that each use one core inside linear algebra (law 6)."""
    with one_thread():
        pool = ThreadPoolExecutor(workers, "surgery-compute")
        try:
            yield pool
        except BaseException:
            stop.set()  # before waiting for the threads below, so that they end with the block they are at
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _affordable(plan: Plan, run: Run) -> int:
    """Workers that fit the memory limit.

    Raises:
        ResourceError: not even one does.
    """
    workers = run.workers or default_workers()
    if run.memory_limit is None:
        return workers
    from surgery.engine.blocks import block_bytes  # it knows updates, which an export without adapters does not need

    largest = max((block_bytes(tensor), tensor.label) for tensor in plan.computed())
    if largest[0] > run.memory_limit:
        raise ResourceError(
            f"computing this tensor takes up to {human(largest[0])}, the limit is {human(run.memory_limit)}",
            tensor=largest[1],
            hint=f"raise the limit to {human(largest[0])}",
        )
    return max(1, min(workers, run.memory_limit // largest[0]))


@dataclass(frozen=True, slots=True)
class _CopyRange:
    """Bytes of one input that go to one output unchanged."""

    source: File
    source_offset: int
    offset: int
    nbytes: int


def _chunks(file: PlannedFile) -> list[_CopyRange]:
    """Join ranges that are adjacent in both source and output.

    The result is then cut into pieces, so that several threads can share it and Ctrl-C is answered soon.
    """
    runs: list[_CopyRange] = []
    for tensor in sorted(file.tensors, key=lambda tensor: tensor.offset):
        if not isinstance(tensor.step, Copy) or tensor.nbytes == 0:
            continue
        source = tensor.step.source
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.source is source.file
            and last.source_offset + last.nbytes == source.offset
            and last.offset + last.nbytes == tensor.offset
        ):
            runs[-1] = _CopyRange(last.source, last.source_offset, last.offset, last.nbytes + tensor.nbytes)
        else:
            runs.append(_CopyRange(source.file, source.offset, tensor.offset, tensor.nbytes))
    return [
        _CopyRange(run.source, run.source_offset + at, run.offset + at, min(_COPY_CHUNK, run.nbytes - at))
        for run in runs
        for at in range(0, run.nbytes, _COPY_CHUNK)
    ]


class _FileJob:
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

    def start(
        self, folder: OutputFolder, copiers: ThreadPoolExecutor, run: Run, stop: threading.Event, meter: _ByteMeter
    ) -> list[Future[None]]:
        """Create the file, write its header and submit its copies."""
        chunks = _chunks(self.file)
        self._parts = 1 + len(chunks) + len(self.computed)
        self._copiers = copiers
        self._out = folder.create(self.file.name, self.file.nbytes)
        self._out.pwrite(self.file.header, 0)
        if self._out.readback(0, len(self.file.header)) != self.file.header:
            raise ProofError("the header on disk is not the one written", file=self.file.name)
        meter.add(len(self.file.header))
        self._part_done()
        return [copiers.submit(self.copy, chunk, run.verify_copies, stop, meter) for chunk in chunks]

    def copy(self, chunk: _CopyRange, verify: bool, stop: threading.Event, meter: _ByteMeter) -> None:
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
                {"tensors": {label: _as_record(measurement) for label, measurement in sorted(self.measured.items())}}
            )
        except BaseException as error:
            self.synced.set_exception(error)
        else:
            self.synced.set_result(None)


class _WeightJob:
    """One computed weight, and the tensors of unfinished files that take it."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[_FileJob, PlannedTensor]] = {}

    def compute(self, compute: ComputeWeight, run: Run, stop: threading.Event, meter: _ByteMeter) -> None:
        """All of it, block by block."""
        _, tensor = next(iter(self.outputs.values()))
        assert isinstance(tensor.step, Compute)
        checks: dict[int, bytearray] = {}

        def write(part: int, offset: int, raw: memoryview) -> None:
            if part not in self.outputs:
                return
            check = checks.get(part)
            if check is None or len(check) != len(raw):
                check = checks[part] = bytearray(len(raw))
            job, tensor = self.outputs[part]
            job.write(tensor, offset, raw, check)
            meter.add(len(raw))

        measured = compute(tensor.weight_label, tensor.step, write, stop.is_set, run.device)
        if stop.is_set():
            return
        for part, (job, output) in self.outputs.items():
            job.finish(output, measured[part])


class _ByteMeter:
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


def _as_record(measurement: Measurement) -> dict[str, Any]:
    return {name: getattr(measurement, name) for name in Measurement.__slots__}


def remembered(record: Mapping[str, Any]) -> dict[str, Measurement]:
    """The recorded measurements of a finished file's tensors, by label."""
    return {label: Measurement(**fields) for label, fields in record["tensors"].items()}


def still_good(path: Path, record: FileRecord) -> bool:
    """Whether a file that an interrupted run finished still holds the computed tensors it finished with."""
    from surgery_formats.containers.weight_files import open_shard
    from surgery_formats.models.identity import tensor_digest

    if "tensors" not in record.record:
        return False  # a side file: copied again
    try:
        stored = {tensor.name: tensor for tensor in open_shard(path).tensors}
        for label, fields in record.record["tensors"].items():
            tensor = stored[label.rpartition(":")[2]]
            if tensor_digest(tensor) != fields["xxh3"]:
                return False
    except (KeyError, TypeError, ValueError):
        return False
    return True
