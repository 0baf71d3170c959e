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

from surgery.engine.execute import default_workers
from surgery.extraction.stream.feed import DirectFeed, Feed, StagedFeed
from surgery_formats.arrays import Array, dtype_of, empty
from surgery_formats.dtypes import DType
from surgery_formats.errors import ResourceError
from surgery_formats.threads import cores, one_thread

__all__ = ["DeviceMemory", "Job", "Lane", "Lanes", "default_lanes", "in_threads"]

_PER_GPU = 3
"""One computes, and the others are read for, so that the readers go on while a batch waits for its turn: 8 B parameters,
seconds from the first read to synced with 2, 3, 4 lanes: 2.49, 2.09, 2.17."""
_READERS = 12
"""Threads that read for one GPU, of a lower priority, or they would keep the lanes from the cores: 16 cores and an H200,
1.24 B parameters, seconds from the first read to synced with 8, 12, 16 readers: 0.59, 0.52, 0.59."""
_SWITCH = 2e-5  # seconds
_SHARE = 0.7  # of a device's free memory
Stop = Callable[[], bool]
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def default_lanes(devices: Sequence[str]) -> int:
    """The number of lanes that keeps `devices` busy: one per core, at most eight, or three per GPU."""
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
        turn: Held while a batch is computed, shared likewise: a GPU gains nothing from two threads that share one
            interpreter, so that the others are read for meanwhile.
    """

    device: str
    feed: Feed
    memory: DeviceMemory
    turn: threading.Lock = field(default_factory=threading.Lock)
    _kept: list[Array] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether its arithmetic runs on a GPU."""
        return self.device != "cpu"

    def space(self, rows: int, cols: int, dtype: DType) -> Array:
        """Memory for a matrix, for the length of the job.

        On a CPU all jobs of a lane use the same memory: allocating it anew costs as much as reading the files.
        """
        if self.on_gpu:
            return empty((rows, cols), dtype, self.device)
        needed = rows * cols
        if not self._kept or dtype_of(self._kept[0]) is not dtype or len(self._kept[0]) < needed:
            self._kept[:] = []
            self._kept[:] = [empty((needed,), dtype)]
        return self._kept[0][:needed].reshape(rows, cols)


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
        by_device = [self._on(name, workers, len(devices)) for name in devices]
        self._lanes = [lane for lanes in zip(*by_device, strict=True) for lane in lanes]  # by turns: few jobs reach all
        self._local = threading.local()
        self._waiting = list(reversed(self._lanes))
        self._pool = ThreadPoolExecutor(len(self._lanes), "surgery-lane", initializer=self._enter)

    @property
    def on_gpus(self) -> bool:
        """Whether there is a GPU among the devices."""
        return any(lane.on_gpu for lane in self._lanes)

    def _on(self, device: str, workers: int, devices: int) -> list[Lane]:
        if device == "cpu":
            return [Lane(device, DirectFeed(), DeviceMemory(None)) for _ in range(-(-workers // devices))]
        import torch  # its memory, streams and events

        with torch.cuda.device(device):
            memory = DeviceMemory(int(torch.cuda.mem_get_info()[0] * _SHARE))
            self._staged.append(StagedFeed(device, max(2, min(_READERS, cores() // devices))))
            turn = threading.Lock()
            return [Lane(device, self._staged[-1], memory, turn) for _ in range(workers)]

    def _enter(self) -> None:
        self._local.lane = self._waiting.pop()
        self._local.stream = _stream(self._local.lane)

    def close(self) -> None:
        """Stop all lanes."""
        self._pool.shutdown(cancel_futures=True)
        for staged in self._staged:
            staged.close()

    def warm(self, job: Job) -> None:
        """Run `job` in every GPU lane at once, because libraries start at their first use; does nothing on CPUs."""
        gpus = [lane for lane in self._lanes if lane.on_gpu]
        if not gpus:
            return
        import torch

        # loads a library that two threads must not load at once
        torch.linalg.inv(torch.ones(1, 1, device=gpus[0].device))
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
                except RuntimeError as error:
                    if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for CPUs
                        raise
                    raise ResourceError(
                        f"{lane.device} has too little memory: {str(error).splitlines()[0][:200]}",
                        hint='fewer `workers=`, or `device="cpu"`',
                    ) from error

            return work

        with one_thread(), self._switching():
            _all_in(self._pool, [on(job) for job in jobs])

    @contextmanager
    def _switching(self) -> Iterator[None]:
        """With GPU lanes, hand the interpreter on after 20 us instead of 5 ms, which saves a fifth of the time."""
        before = sys.getswitchinterval()
        if self.on_gpus:
            sys.setswitchinterval(_SWITCH)
        try:
            yield
        finally:
            sys.setswitchinterval(before)


def _stream(lane: Lane) -> AbstractContextManager[object]:
    """A stream for this thread."""
    if not lane.on_gpu:
        return nullcontext()
    import torch

    torch.cuda.set_device(lane.device)
    stream = torch.cuda.Stream(lane.device)  # type: ignore[no-untyped-call]  # torch gives it no types
    current: AbstractContextManager[object] = torch.cuda.stream(stream)
    return current


def in_threads(function: Callable[[Item], Outcome], items: Iterable[Item], workers: int) -> list[Outcome]:
    """`function` of every item, in order, each in one thread; the first failure stops the others.

    Results then do not depend on the number of threads.
    """

    def job(item: Item) -> Callable[[Stop], Outcome]:
        return lambda stop: function(item)

    with one_thread(), ThreadPoolExecutor(workers, "surgery-factor") as pool:
        return _all_in(pool, list(map(job, items)))


def _all_in(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[Stop], Outcome]]) -> list[Outcome]:
    stop = threading.Event()
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
