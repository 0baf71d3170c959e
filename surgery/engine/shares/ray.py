# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster that does shares: a task for each, where there are cores, memory and, if asked for, a GPU.

A task is repeated by Ray elsewhere when its worker or its node is lost. What a task raises is raised by the driver.
Nothing but an assignment, a few hundred bytes, and the name of a folder goes through Ray.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from surgery.engine.execute import Run
from surgery.engine.shares.folders import Assignment, assignments, finished_shares, is_finished, write_share
from surgery.engine.shares.work import Work, WorkRequest
from surgery.progress import Callback, Progress
from surgery_formats.errors import FitError, ResourceError, SurgeryError, UsageError
from surgery_formats.extras import require
from surgery_formats.text import nbytes as human
from surgery_formats.text import show

__all__ = ["Ray", "share_count"]

_SHARE = 1 << 30  # bytes: what is lost with a worker, and what a node without work at the end could have had
_LEAST = 8  # shares, where there are so many pieces
_THREADS = 4  # of a share: from there on threads of one interpreter wait for each other
_FIXED = 500_000_000  # bytes of a worker with numpy, buffers and, for a bucket, parts on their way
_WITH_GPU = 3_000_000_000  # and with torch
_REPEATS = 8  # of a share whose worker was lost
_TICK = 0.2  # seconds
_LOOK = 10.0  # seconds between looks at the nodes
_ANSWER = 5.0  # seconds
_STORE = 80 << 20  # bytes of shared memory of a cluster of our own, the least that Ray takes: nothing is put there
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_PROMPT_ENABLED": "0"}  # no telemetry


@dataclass(frozen=True, slots=True)
class Ray:
    """A Ray cluster.

    Attributes:
        address: ``HOST:PORT`` of its head. Empty for the one in ``RAY_ADDRESS``, else one that runs on this machine, else one
            that is started here and ends with the command.
    """

    address: str = ""

    def __post_init__(self) -> None:
        if self.address and not _is_address(self.address):
            raise UsageError(
                f"'{show(self.address, 60)}' is not HOST:PORT of a Ray cluster", hint="such as ray:10.0.0.1:6379"
            )

    @contextlib.contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        """See `Cluster.shares`."""
        count = share_count(work)
        every = assignments(request, work, output, count, verify=run.verify_copies)
        if left := [each for each in every if not is_finished(each.folder)]:
            with _connected(self.address) as ray:
                _do_all(ray, left, work, run, count)
        with finished_shares(work, output, count, verify=run.verify_copies) as folders:
            yield folders


def share_count(work: Work) -> int:
    """In how many shares work is done. It follows from the work alone: on a larger cluster, a killed command resumes too."""
    return max(1, min(work.pieces, max(_LEAST, -(-work.nbytes // _SHARE))))


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a share takes on a node.

    Attributes:
        threads: That compute, a core for each.
        memory: Bytes.
        gpus: 0 or 1.
    """

    threads: int
    memory: int
    gpus: int

    def fits(self, resources: Mapping[str, float]) -> bool:
        """Whether a node is large enough."""
        return (
            resources.get("CPU", 0) >= self.threads
            and resources.get("memory", 0) >= self.memory
            and resources.get("GPU", 0) >= self.gpus
        )

    def __str__(self) -> str:
        gpu = " and a GPU" if self.gpus else ""
        return (
            f"{self.threads} cores with {human(self.memory)}{gpu}"
            if self.threads > 1
            else f"a core with {human(self.memory)}{gpu}"
        )


def _needs(work: Work, run: Run, nodes: Sequence[Mapping[str, float]]) -> _Needs:
    """By default four threads, or as many as the smallest node that computes has cores."""
    gpus = int(run.device != "cpu")
    smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
    threads = run.workers or (1 if gpus else min(_THREADS, smallest))
    pieces = threads * work.piece_memory
    if run.memory_limit is not None:
        pieces = min(pieces, run.memory_limit)
    return _Needs(threads, pieces + (_WITH_GPU if gpus else _FIXED), gpus)


def _do_all(ray: ModuleType, left: Sequence[Assignment], work: Work, run: Run, count: int) -> None:
    needs = _needs(work, run, _nodes(ray))
    _check_fits(ray, needs)
    # SPREAD: a share is bound by its node's network and disk as well as by its cores
    task = ray.remote(
        num_cpus=needs.threads,
        num_gpus=needs.gpus,
        memory=needs.memory,
        max_retries=_REPEATS,
        max_calls=0,  # with a GPU Ray's own is 1, and every share would import torch and start CUDA again
        scheduling_strategy="SPREAD",
    )(_do_share)
    tell = _teller(run.progress, work.nbytes, count)
    tell(count - len(left))
    pending = {task.remote(each, needs.threads, run.memory_limit, run.device): each for each in left}
    looked = time.monotonic()
    try:
        while pending:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_TICK)
            for ref in done:
                with _faults(ray, pending[ref]):
                    ray.get(ref)
                del pending[ref]
            tell(count - len(pending))
            if time.monotonic() - looked > _LOOK:
                _check_fits(ray, needs)
                looked = time.monotonic()
    finally:
        for ref in pending:
            ray.cancel(ref)


def _do_share(assignment: Assignment, threads: int, memory_limit: int | None, device: str) -> None:
    """On a worker."""
    from surgery.engine.devices import device_of

    with _cancelled_between_blocks() as check:
        run = Run(workers=threads, memory_limit=memory_limit, device=device_of(device), progress=check)
        write_share(assignment, run, lambda: _planned(assignment.request, assignment.job))


@contextlib.contextmanager
def _cancelled_between_blocks() -> Iterator[Callback]:
    """Ray cancels by an interruption. In the middle of an import it leaves half a module to the next share of this process."""
    asked = threading.Event()

    def check(step: Progress) -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@functools.lru_cache(maxsize=1)
def _planned(request: WorkRequest, job: str) -> Work:
    """A worker does many shares of one job, and the headers of a large model take seconds; inputs are checked with every share."""
    return request.work()


def _teller(progress: Callback | None, nbytes: int, count: int) -> Any:
    def tell(done: int) -> None:
        if progress is not None:
            progress(Progress(nbytes * done // count, nbytes, f"shares {done} of {count}"))

    return tell


def _nodes(ray: ModuleType) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_fits(ray: ModuleType, needs: _Needs) -> None:
    """Ray waits without end for a node that is large enough.

    Raises:
        ResourceError: there is none.
    """
    nodes = _nodes(ray)
    if not any(needs.fits(node) for node in nodes):
        largest = max(nodes, key=lambda node: node.get("CPU", 0), default={})
        has = f"{largest.get('CPU', 0):g} cores, {human(int(largest.get('memory', 0)))}, {largest.get('GPU', 0):g} GPUs"
        raise ResourceError(
            f"a share takes {needs}, and no node of the Ray cluster has that; the largest of {len(nodes)} has {has}",
            hint="fewer `workers=`, a lower `memory_limit=`, or larger nodes",
        )


@contextlib.contextmanager
def _faults(ray: ModuleType, share: Assignment) -> Iterator[None]:
    """Turn what Ray says about a share into our errors; a worker's own error is raised as it is."""
    errors, what = ray.exceptions, f"share {share.index} of {share.count}"
    try:
        yield
    except errors.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SurgeryError | OSError | MemoryError):
            raise cause from error
        if isinstance(cause, ImportError):
            raise FitError(
                f"a worker cannot import what the work needs: {show(str(cause), 200)}",
                hint="install the same version of surgery, with the same extras, on every node",
            ) from error
        raise
    except errors.RayError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ResourceError(
            f"{what} was lost on {_REPEATS + 1} workers: {show(first, 300)}",
            hint="is memory short on the nodes? a lower `memory_limit=` or fewer `workers=`; finished shares are kept",
        ) from error


@contextlib.contextmanager
def _connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected; a connection that was there before stays.

    Raises:
        ResourceError: there is no cluster at the address.
    """
    ray = _library()
    if ray.is_initialized():
        yield ray
        return
    with _handlers_kept():
        try:
            _connect(ray, address or os.environ.get("RAY_ADDRESS", ""))
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ResourceError(
                f"the Ray cluster cannot be used from here: {show(first, 300)}",
                hint="run the command on a node of the cluster, which 'ray start' makes this machine (docs/scale-out.md)",
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    silent: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address not in ("", "auto", "local"):  # which are Ray's own words for RAY_ADDRESS
        _check_answers(address)
        ray.init(address, **silent)
        return
    if address != "local":
        with contextlib.suppress(ConnectionError):  # none runs on this machine
            ray.init("auto", **silent)
            return
    ray.init("local", include_dashboard=False, object_store_memory=_STORE, **silent)


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes, and may end the process.

    Raises:
        ResourceError: nobody is there.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {show(address, 100)}", hint="'ray start' of the head prints the address"
        ) from error


def _library() -> ModuleType:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _handlers_kept():
        return require("ray", "clusters of Ray")


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Importing and starting Ray replaces what the program does at SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and "/" not in text and port.isascii() and port.isdecimal() and 0 < int(port) < 65536
