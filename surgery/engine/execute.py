# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: the kernel copies what did not change, workers compute the rest, and every computed block is read back.

A worker computes one tensor from its first block to its last, so the result does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from surgery.engine.finished import remembered, still_good
from surgery.engine.jobs import ByteMeter, Computed, ComputeWeight, FileJob, WeightJob, Write
from surgery.engine.ledger import Ledger, Measurement
from surgery.engine.plan import Compute, Plan, SideFile
from surgery.engine.processes import Stop, can_fork, forked
from surgery.engine.recorded import recorded_recipe, versions_of
from surgery.progress import Callback
from surgery_formats.allocator import return_large_blocks
from surgery_formats.errors import FitError, ResourceError
from surgery_formats.files.output.folder import QUICK, SIGNED, OutputFolder, Verify, output_folder
from surgery_formats.files.raw import open_file
from surgery_formats.files.remote.path import is_remote, to_path
from surgery_formats.text import nbytes as human
from surgery_formats.threads import cores, one_thread

__all__ = [
    "Engine",
    "Run",
    "ThisProcess",
    "default_workers",
    "execute",
    "most_workers",
    "write_side_file",
    "write_weights",
]

_MAX_DEFAULT_WORKERS = 8  # threads of one interpreter
_MAX_PROCESSES = 16  # more were not measured
_FEW = 4
"""Workers up to which threads are as fast as processes (docs/benchmarks.md)."""
_WORTH_IT = 32 << 20  # bytes for each process, which takes a few ms to start
_IO_THREADS = 2
_CORES_FOR_BLOCKS = 4
_SMALL = 16 << 20  # a tokenizer is read whole; anything larger is copied by the kernel


@dataclass(frozen=True, slots=True)
class Run:
    """How to run a plan; none of it changes the result.

    Attributes:
        workers: Threads or processes that compute; None is one per core, at most eight threads or 16
            processes.
        memory_limit: Bytes the computed tensors may take together; None is no limit.
        device: Where arithmetic runs.
        verify_copies: Compare copied ranges byte by byte as well, instead of trusting the identity of their source, and
            note the sha256 of every file.
        overwrite: Replace an existing output.
        progress: Called with every step.
    """

    workers: int | None = None
    memory_limit: int | None = None
    device: str = "cpu"
    verify_copies: bool = False
    overwrite: bool = False
    progress: Callback | None = None

    @property
    def hashes(self) -> tuple[str, ...]:
        """Hashes of whole files: a cheap one, and where every byte is read anyway, one for signatures."""
        return SIGNED if self.verify_copies else QUICK


def default_workers() -> int:
    """Cores this process may use, at most eight."""
    return min(cores(), _MAX_DEFAULT_WORKERS)


def most_workers() -> int:
    """Cores this process may use, at most 16: processes, where they are better than threads."""
    return min(cores(), _MAX_PROCESSES)


class Engine(Protocol):
    """Where weights are computed; this process always does the copies, proofs and commit."""

    def computing(
        self, plan: Plan, output: Path, into: OutputFolder | None = None
    ) -> AbstractContextManager[ComputeWeight]:
        """A context with the function that computes a weight of `plan`, open until the output is committed or given up.

        Args:
            plan: What is computed.
            output: Where it will be.
            into: The staged output, if the files of the plan are files of it: the engine may finish some of them.

        Raises:
            FitError, ProofError: this engine cannot run this plan.
        """
        ...


class ThisProcess:
    """The engine of one process: its threads compute."""

    @contextlib.contextmanager
    def computing(self, plan: Plan, output: Path, into: OutputFolder | None = None) -> Iterator[ComputeWeight]:
        """The arithmetic itself; its libraries are imported when the first weight is computed.

        What goes to a bucket is sent in order, so there all threads share the blocks of one weight. On few cores that costs
        a tenth more time of cores than it saves.
        """
        if not is_remote(output) or cores() < _CORES_FOR_BLOCKS:
            yield _compute_here
            return
        with ThreadPoolExecutor(min(cores(), _MAX_DEFAULT_WORKERS), "surgery-blocks") as pool:
            yield partial(_compute_here, blocks=pool)


def _compute_here(
    label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str, blocks: Executor | None = None
) -> tuple[Measurement, ...]:
    from surgery.engine.arithmetic import compute

    return compute(label, step, write, stop, device, blocks=blocks)


def execute(
    plan: Plan,
    output: str | os.PathLike[str],
    run: Run,
    finish: Callable[[Ledger], Mapping[str, bytes]] | None = None,
    engine: Engine | None = None,
    last: Callable[[OutputFolder], None] | None = None,
    good: Verify | None = None,
) -> Ledger:
    """Write the output of `plan`, all or nothing.

    Args:
        plan: What to do.
        output: Folder that must not exist yet (see `Run.overwrite`).
        run: How.
        finish: Called with the measured ledger before the commit; returns further small files. It may raise to undo
            everything. None adds no file.
        engine: Where weights are computed; None is this process.
        last: Called when every file is in the staged folder. It may read them and add others, or raise to undo
            everything.
        good: Whether a file that an interrupted run finished is still good; None asks `still_good`.

    Returns:
        The plan with what was measured.

    Raises:
        OutputExistsError, ResourceError, FitError, ProofError: nothing is left behind.
    """
    if last is not None and is_remote(output):
        raise FitError(
            "what is asked for reads the output back while it is made, which a bucket does not allow",
            file=output,
            hint="write to a folder, and upload it",
        )
    staged = output_folder(
        output,
        _job(plan),
        overwrite=run.overwrite,
        inputs=plan.roots,
        verify=good or still_good,
        hashes=run.hashes,
        recorded=plan.id,
    )
    # the place is taken first: nobody wants to hear at the end that it is in use
    with staged as folder, (engine or ThisProcess()).computing(plan, to_path(output), folder) as compute:
        measured = write_weights(plan, folder, run, compute)
        ledger = Ledger(plan, measured)
        for side in plan.side_files:
            write_side_file(side, folder)
        for name, data in (finish(ledger) if finish is not None else {}).items():
            folder.write_small(name, data)
        if last is not None:
            last(folder)
        for file in plan.inputs:
            file.check_unchanged()
        account = {"plan": plan.id, "inputs": dict(plan.facts), "ledger": ledger.as_json()}
        folder.commit(account | versions_of(plan.inputs) | recorded_recipe())
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
    if run.memory_limit is not None:
        return_large_blocks()  # what is free, but not the kernel's, counts like what is in use
    # Copies start in threads of their own, while libraries are still being imported for the rest; processes are forked
    # before there are threads.
    measured: dict[str, Measurement] = {}
    jobs: list[FileJob] = []
    for file in plan.files:
        if (record := folder.finished.get(file.name)) is not None:
            measured |= remembered(record.record)
        else:
            jobs.append(FileJob(file))
    if folder.in_order:
        for file in plan.files if run.verify_copies else ():
            if file.name in folder.finished:
                folder.reread(file.name)
        return measured | _streamed(replace(plan, files=tuple(job.file for job in jobs)), folder, run, compute)
    meter = ByteMeter(sum(job.file.nbytes for job in jobs), run.progress)
    stop = Stop()
    with ThreadPoolExecutor(_IO_THREADS, "surgery-copy") as copiers:
        futures: list[Future[None]] = []
        try:
            for job in jobs:
                job.open(folder, meter)
            weights = list(_weights_in_turn(jobs))
            workers = _affordable(plan, run) if weights else 0
            processes = _processes(weights, compute, workers, run.device)
            if processes:
                workers = processes
            elif run.workers is None:
                workers = min(workers, default_workers())
            computing = _elsewhere if processes else _here
            with computing(weights, compute, workers, run, stop, meter) as work:
                for job in jobs:
                    futures += job.start(copiers, run.verify_copies, stop, meter)
                if weights:
                    with _compute_pool(workers, stop) as pool:
                        computed = [pool.submit(work, number) for number in range(len(weights))]
                        _wait([*futures, *computed], stop)
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


def _streamed(plan: Plan, folder: OutputFolder, run: Run, compute: ComputeWeight) -> dict[str, Measurement]:
    from surgery.engine.streaming import stream_weights

    workers = min(
        _affordable(plan, run) if plan.computed() else 1, default_workers() if run.workers is None else run.workers
    )
    verify, progress = run.verify_copies, run.progress
    return stream_weights(plan, folder, compute, workers, run.device, verify=verify, progress=progress)


@contextlib.contextmanager
def _here(
    weights: Sequence[WeightJob], compute: ComputeWeight, workers: int, run: Run, stop: Stop, meter: ByteMeter
) -> Iterator[Callable[[int], None]]:
    """What computes a weight, by its number, in the calling thread."""

    def work(number: int) -> None:
        measured, _ = weights[number].compute(compute, run.device, stop, meter.add)
        if not stop.is_set():
            weights[number].finish(measured)

    yield work


@contextlib.contextmanager
def _elsewhere(
    weights: Sequence[WeightJob], compute: ComputeWeight, workers: int, run: Run, stop: Stop, meter: ByteMeter
) -> Iterator[Callable[[int], None]]:
    """What has a process compute it."""

    def compute_it(number: int) -> Computed:
        return weights[number].compute(compute, run.device, stop, lambda nbytes: None)

    with one_thread(), forked(workers, compute_it) as processes:

        def work(number: int) -> None:
            measured, written = processes.run(number)
            if not stop.is_set():
                weights[number].note(written, meter)
                weights[number].finish(measured)

        yield work


def _processes(weights: Sequence[WeightJob], compute: ComputeWeight, workers: int, device: str) -> int:
    """How many processes compute: with much to do on the CPU, if this process can be forked; 0 leaves it to threads."""
    count = min(workers, sum(weight.nbytes for weight in weights) // _WORTH_IT)
    if count <= _FEW or device != "cpu" or compute is not _compute_here:
        return 0
    import surgery.engine.arithmetic  # noqa: F401 - once for all processes, and before its libraries' threads are counted

    return count if can_fork() else 0


def _weights_in_turn(jobs: Sequence[FileJob]) -> Iterable[WeightJob]:
    """A weight of each file in turn: two threads that write to one file wait for each other inside the kernel.

    The tensors of one weight may lie in several files; those of files that are finished already are not written again.
    """
    weights: dict[int, WeightJob] = {}
    for row in zip_longest(*(job.computed for job in jobs)):
        for job, tensor in zip(jobs, row, strict=True):
            if tensor is not None:
                weights.setdefault(id(tensor.step), WeightJob()).outputs[tensor.part] = job, tensor
    return weights.values()


def _wait(futures: list[Future[None]], stop: Stop) -> None:
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
def _compute_pool(workers: int, stop: Stop) -> Iterator[ThreadPoolExecutor]:
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
    """Workers that fit the memory limit; by default one per core, at most 16.

    Raises:
        ResourceError: not even one does.
    """
    workers = run.workers or most_workers()
    if run.memory_limit is None:
        return workers
    from surgery.engine.blocks import block_bytes  # it knows updates, which an export without adapters does not need

    largest = max((block_bytes(tensor), tensor.label) for tensor in plan.computed())
    if largest[0] > run.memory_limit:
        raise ResourceError(
            f"computing this tensor takes up to {human(largest[0])}, the limit is {human(run.memory_limit)}",
            tensor=largest[1],
            hint=f"raise the limit to {math.ceil(largest[0] / 1e6)} MB",  # rounded up: it has to be enough
        )
    return max(1, min(workers, run.memory_limit // largest[0]))
