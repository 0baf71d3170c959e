# SPDX-License-Identifier: Apache-2.0
"""Lanes: threads that each own a device, a stream on it and a feed; every job runs in one lane from start to end.

The result does not depend on which lane runs a job: all lanes of a run are on devices of one type, and each does its
arithmetic in one thread or one stream.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from surgery.engine.execute import default_workers
from surgery.extraction.stream.feed import DirectFeed, Feed, StagedFeed
from surgery_formats.errors import ResourceError

__all__ = ["DeviceMemory", "Job", "Lane", "Lanes", "default_lanes", "in_threads"]

_BUFFERS = 24  # of 8 MB, per device
_PER_GPU = 3
_SWITCH = 2e-5  # seconds
_SHARE = 0.7  # of a device's free memory
Stop = Callable[[], bool]
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def default_lanes(devices: Sequence[str]) -> int:
    """The number of lanes that keeps `devices` busy: one per core, at most eight, or three per GPU.

    A matrix takes some hundred small calls, and all threads share one interpreter. Measured on an H100, 1.24 B
    parameters, seconds from the first read to synced: 1 lane 2.27, 2 lanes 1.46, 3 lanes 1.28, 4 lanes 1.58, 8 lanes
    2.76, 16 lanes 2.46.
    """
    return _PER_GPU if any(device != "cpu" for device in devices) else default_workers()


class DeviceMemory:
    """Shares the memory of one device: a job waits until the bytes it needs are free.

    A job larger than all of it runs alone.
    """

    def __init__(self, nbytes: int | None) -> None:
        self._limit, self._used = nbytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Hold `nbytes` for the length of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._limit is None or not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Lane:
    """A thread's device, feed and memory.

    Attributes:
        device: Device of its arithmetic.
        feed: Brings rows to the device.
        memory: The device's memory, shared with its other lanes.
    """

    device: torch.device
    feed: Feed
    memory: DeviceMemory
    _kept: list[torch.Tensor] = field(default_factory=list)

    def space(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a matrix, for the length of the job.

        On a CPU all jobs of a lane use the same memory: allocating it anew costs as much as reading the files.
        """
        if self.device.type != "cpu":
            return torch.empty((rows, cols), dtype=dtype, device=self.device)
        needed = rows * cols
        if not self._kept or self._kept[0].dtype != dtype or self._kept[0].numel() < needed:
            self._kept[:] = []
            self._kept[:] = [torch.empty(needed, dtype=dtype)]
        return self._kept[0][:needed].view(rows, cols)


Job = Callable[[Lane, Stop], None]


class Lanes:
    """All lanes of a run.

    Create them before the first byte is read, because devices take time to start; close them at the end.

    Args:
        devices: Names of devices.
        workers: Number of lanes: in total on CPUs, per device on GPUs.
    """

    def __init__(self, devices: Sequence[str], workers: int) -> None:
        self._staged: list[StagedFeed] = []
        by_device = [self._on(torch.device(name), workers, len(devices)) for name in devices]
        self._lanes = [lane for lanes in zip(*by_device, strict=True) for lane in lanes]  # by turns: few jobs reach all
        self._local = threading.local()
        self._waiting = list(reversed(self._lanes))
        self._pool = ThreadPoolExecutor(len(self._lanes), "surgery-lane", initializer=self._enter)

    def _on(self, device: torch.device, workers: int, devices: int) -> list[Lane]:
        if device.type == "cpu":
            return [Lane(device, DirectFeed(), DeviceMemory(None)) for _ in range(-(-workers // devices))]
        with torch.cuda.device(device):
            memory = DeviceMemory(int(torch.cuda.mem_get_info()[0] * _SHARE))
            self._staged.append(StagedFeed(device, workers, _BUFFERS))
            return [Lane(device, self._staged[-1], memory) for _ in range(workers)]

    def _enter(self) -> None:
        torch.set_num_threads(1)
        self._local.lane = self._waiting.pop()
        self._local.stream = _stream(self._local.lane.device)

    def close(self) -> None:
        """Stop all lanes."""
        self._pool.shutdown(cancel_futures=True)
        for staged in self._staged:
            staged.close()

    def warm(self, job: Job) -> None:
        """Run `job` in every GPU lane at once, because libraries start at their first use; does nothing on CPUs."""
        gpus = [lane for lane in self._lanes if lane.device.type != "cpu"]
        if not gpus:
            return
        torch.linalg.inv(
            torch.ones(1, 1, device=gpus[0].device)
        )  # loads a library that two threads must not load at once
        together = threading.Barrier(len(self._lanes))

        def once(lane: Lane, stop: Stop) -> None:
            try:
                job(lane, stop)
            finally:
                together.wait(60)  # or one thread would take two

        self.run([once] * len(self._lanes))

    def run(self, jobs: Sequence[Job]) -> None:
        """Run every job in one of the lanes; the first failure stops the others.

        Raises:
            ResourceError: a device has too little memory.
        """

        def on(job: Job) -> Callable[[Stop], None]:
            def work(stop: Stop) -> None:
                lane = self._local.lane
                try:
                    with self._local.stream:
                        job(lane, stop)
                except torch.OutOfMemoryError as error:
                    raise ResourceError(
                        f"{lane.device} has too little memory: {str(error).splitlines()[0][:200]}",
                        hint='fewer `workers=`, or `device="cpu"`',
                    ) from error

            return work

        with self._switching():
            _all_in(self._pool, [on(job) for job in jobs])

    @contextmanager
    def _switching(self) -> Iterator[None]:
        """With GPU lanes, hand the interpreter on after 20 us instead of 5 ms, which saves a fifth of the time."""
        before = sys.getswitchinterval()
        if any(lane.device.type != "cpu" for lane in self._lanes):
            sys.setswitchinterval(_SWITCH)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream for this thread."""
    if device.type == "cpu":
        return nullcontext()
    torch.cuda.set_device(device)
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return stream


def in_threads(function: Callable[[Item], Outcome], items: Iterable[Item], workers: int) -> list[Outcome]:
    """`function` of every item, in order, with one torch thread each; the first failure stops the others.

    Results then do not depend on the number of threads.
    """

    def job(item: Item) -> Callable[[Stop], Outcome]:
        return lambda stop: function(item)

    with ThreadPoolExecutor(workers, "surgery-factor", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return _all_in(pool, list(map(job, items)))


def _all_in(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[Stop], Outcome]]) -> list[Outcome]:
    stop = threading.Event()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of OpenMP's, which threads that start now take over
    futures = [pool.submit(job, stop.is_set) for job in jobs]
    try:
        done, rest = wait(futures, return_when=FIRST_EXCEPTION)
        if rest:
            stop.set()
        for future in rest:
            future.cancel()
        wait(futures)
        return [future.result() for future in futures if future in done]
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    finally:
        torch.set_num_threads(before)
