# SPDX-License-Identifier: Apache-2.0
"""Weights on their way into a bucket: every file from its first byte to its last, while threads fetch and compute ahead.

An upload takes bytes in order, and what was sent cannot be read back before it appears. So a file is a row of segments:
ranges that are copied, tensors that are computed. Threads fill them in the order of their first bytes, and make what lies
at most so many bytes behind the upload's place: weights that are far ahead would else fill the memory that near ranges wait
for. Whoever makes the segment that the upload waits for, or one before it, never waits, so nobody waits for ever: work is
begun in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy

from surgery.engine.jobs import ByteMeter, ComputeWeight, CopyRange, copied_ranges
from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, Plan, PlannedFile, PlannedTensor
from surgery.engine.processes import Stop
from surgery.progress import Callback
from surgery_formats.errors import ProofError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.threads import one_thread

__all__ = ["stream_weights"]

_AHEAD = 64 << 20  # bytes that may be made beyond what was sent; what one weight has in several places comes on top
_CHUNK = 8 << 20  # bytes of a weight that are handed over at a time: each time several threads wait for one another
_FETCHED = 8 << 20  # bytes of a copy that are fetched at a time
_FETCHING = 8  # threads
_FINISHING = 2  # threads
_WEIGHTS = 3  # at a time: what is ahead of the upload is less than one large weight


@dataclass(eq=False)
class _Segment:
    """A run of bytes of a file that one piece of work makes, in order.

    Attributes:
        offset: In the file.
        nbytes: How many.
        number: Of all segments, in order.
        place: The bytes of all segments before it.
        blocks: What was made and not sent yet.
        made: Bytes that were made.
    """

    offset: int
    nbytes: int
    number: int = -1
    place: int = 0
    blocks: deque[memoryview] = field(default_factory=deque)
    made: int = 0


@dataclass(eq=False)
class _Supply:
    """What makes one or more segments: a copy, or a weight with the tensors that it becomes.

    Attributes:
        run: Makes them.
        segments: By part of the weight.
        copies: Whether it is a copy.
        first: The number of the first segment.
        outputs: The tensors of a weight.
        measured: Of each part.
    """

    run: Callable[[_Supply], None]
    segments: dict[int, _Segment] = field(default_factory=dict)
    copies: bool = False
    first: int = -1
    outputs: list[PlannedTensor] = field(default_factory=list)
    measured: tuple[Measurement, ...] = ()


class _Stopped(Exception):
    """The upload failed, or the user has interrupted it."""


class _Window:
    """What was made and not sent yet."""

    def __init__(self, stop: Stop) -> None:
        lock = threading.Lock()
        self._made = threading.Condition(lock)
        self._space = threading.Condition(lock)
        self._sent = 0
        self._at = 0
        self._waiting: list[tuple[int, int]] = []
        self._stop = stop

    def give(self, work: _Supply, segment: _Segment, data: memoryview) -> None:
        """The next bytes of a segment; waits while they are too far ahead of the upload."""
        waiting = segment.place + segment.made + len(data) - _AHEAD, work.first
        with self._space:
            while not self._stop.is_set() and not self._may(*waiting):
                self._waiting.append(waiting)
                self._space.wait()
                self._waiting.remove(waiting)
            if self._stop.is_set():
                raise _Stopped
            segment.blocks.append(data)
            segment.made += len(data)
            if segment.number == self._at:
                self._made.notify()

    def take(self, segment: _Segment, done: Future[None]) -> memoryview | None:
        """The next bytes to send; None at the end. Raises what the work on it raised."""
        with self._made:
            if self._at != segment.number:
                self._at = segment.number
                self._let_in()
            while not segment.blocks:
                if done.done():
                    done.result()
                    if not segment.blocks:
                        return None
                    break
                self._made.wait()
            data = segment.blocks.popleft()
            self._sent += len(data)
            self._let_in()
            return data

    def ended(self, _: Future[None]) -> None:
        """A piece of work has ended, well or not: the upload looks whether it waits for it."""
        with self._made:
            self._made.notify()

    def wake(self) -> None:
        """Let everybody look again."""
        with self._made:
            self._made.notify_all()
            self._space.notify_all()

    def _may(self, sent: int, first: int) -> bool:
        """Whether so many bytes were sent, or the upload has come to what begins with the segment `first`."""
        return sent <= self._sent or first <= self._at

    def _let_in(self) -> None:
        """Wake who waits, once one of them may go on."""
        if any(self._may(*waiting) for waiting in self._waiting):
            self._space.notify_all()


def stream_weights(
    plan: Plan,
    folder: OutputFolder,
    compute: ComputeWeight,
    workers: int,
    device: str,
    *,
    verify: bool = False,
    progress: Callback | None = None,
) -> dict[str, Measurement]:
    """Upload the weight files of `plan`, and return what was measured of each computed tensor.

    Args:
        plan: What to do.
        folder: The staged output.
        compute: Computes a weight.
        workers: Weights that are computed at a time, as far as that is of use.
        device: Where arithmetic runs.
        verify: Read what was uploaded back before it counts.
        progress: Called with every step.

    Raises:
        ResourceError, FitError, ProofError: as `execute`.
    """
    stop, meter = Stop(), ByteMeter(plan.nbytes, progress)
    window = _Window(stop)
    rows, works = _arranged(plan, window, compute, device, stop)
    measured: dict[str, Measurement] = {}
    with (
        one_thread(),
        ThreadPoolExecutor(min(workers, _WEIGHTS), "surgery-compute") as computing,
        ThreadPoolExecutor(_FETCHING, "surgery-copy") as fetching,
        ThreadPoolExecutor(_FINISHING, "surgery-finish") as finishing,
    ):
        try:
            begun: dict[int, tuple[_Supply, Future[None]]] = {}
            finished: list[Future[None]] = []
            for work in works:
                done = (fetching if work.copies else computing).submit(work.run, work)
                done.add_done_callback(window.ended)
                begun |= {segment.number: (work, done) for segment in work.segments.values()}
            for file, row in zip(plan.files, rows, strict=True):
                upload = folder.upload(file.name, file.nbytes, verify=verify, keep=file is not plan.files[-1])
                for segment in row:
                    work, done = begun.pop(segment.number)
                    while (data := window.take(segment, done)) is not None:
                        upload.write(data)
                        meter.add(len(data))
                    measured |= {tensor.label: work.measured[tensor.part] for tensor in work.outputs}
                upload.end()
                labels = sorted(tensor.label for tensor in file.tensors if isinstance(tensor.step, Compute))
                record = {"tensors": {label: measured[label].as_record() for label in labels}}
                finished.append(finishing.submit(folder.noted, file.name, upload, record))
            for done in finished:
                done.result()
        except BaseException:
            stop.set()
            window.wake()
            for pool in (computing, fetching, finishing):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    return measured


def _arranged(
    plan: Plan, window: _Window, compute: ComputeWeight, device: str, stop: Stop
) -> tuple[list[list[_Segment]], list[_Supply]]:
    """The segments of every file in order, and the work that makes them in the order of its first segment."""
    rows: list[list[_Segment]] = []
    works: list[_Supply] = []
    weights: dict[int, _Supply] = {}
    for file in plan.files:
        row: list[_Segment] = []
        for offset, data in ((0, file.header), *((at, bytes(nbytes)) for at, nbytes in file.padding)):
            segment = _Segment(offset, len(data))
            works.append(_Supply(_giving(window, data), {0: segment}, copies=True))
            row.append(segment)
        for chunk in copied_ranges(file, _FETCHED):
            segment = _Segment(chunk.offset, chunk.nbytes)
            works.append(_Supply(_copying(window, chunk), {0: segment}, copies=True))
            row.append(segment)
        for tensor in file.tensors:
            if isinstance(tensor.step, Compute):
                segment = _Segment(tensor.offset, tensor.nbytes)
                if (weight := weights.get(id(tensor.step))) is None:
                    run = _computing(window, compute, tensor.weight_label, tensor.step, device, stop)
                    weight = weights[id(tensor.step)] = _Supply(run)
                    works.append(weight)
                weight.segments[tensor.part] = segment
                weight.outputs.append(tensor)
                row.append(segment)
        row.sort(key=lambda segment: (segment.offset, segment.nbytes))
        _check_whole(file, row)
        rows.append(row)
    place = 0
    for number, segment in enumerate(segment for row in rows for segment in row):
        segment.number, segment.place = number, place
        place += segment.nbytes
    for work in works:
        work.first = min(segment.number for segment in work.segments.values())
    return rows, sorted(works, key=lambda work: work.first)


def _check_whole(file: PlannedFile, row: Sequence[_Segment]) -> None:
    at = 0
    for segment in row:
        if segment.offset != at:
            raise ProofError(f"bytes {at} to {segment.offset} have no source", file=file.name)
        at += segment.nbytes
    if at != file.nbytes:
        raise ProofError(f"bytes {at} to {file.nbytes} have no source", file=file.name)


def _giving(window: _Window, data: bytes) -> Callable[[_Supply], None]:
    def run(work: _Supply) -> None:
        window.give(work, work.segments[0], memoryview(data))

    return run


def _copying(window: _Window, chunk: CopyRange) -> Callable[[_Supply], None]:
    def run(work: _Supply) -> None:
        source, begin = chunk.source, chunk.source_offset
        if source.remote is not None:
            data = source.remote.fetch(source.begin + begin, source.begin + begin + chunk.nbytes)
        else:
            data = memoryview(source.read(begin, chunk.nbytes))
        if len(data) != chunk.nbytes:
            raise ProofError(f"the input ends {chunk.nbytes - len(data)} bytes early", file=source.path)
        window.give(work, work.segments[0], data)

    return run


class _Chunks:
    """The blocks of a segment, gathered; numpy copies them and lets other threads run meanwhile, which ``bytes`` does not."""

    def __init__(self, window: _Window, work: _Supply, segment: _Segment) -> None:
        self._window, self._work, self._segment = window, work, segment
        self._chunk = numpy.empty(0, numpy.uint8)
        self._filled = self.nbytes = 0

    def add(self, raw: memoryview) -> None:
        """The next bytes; they may be overwritten afterwards."""
        data, at = numpy.frombuffer(raw, numpy.uint8), 0
        while at < len(data):
            if self._filled == len(self._chunk):
                self.hand_over()
                self._chunk = numpy.empty(min(_CHUNK, self._segment.nbytes - self.nbytes), numpy.uint8)
            count = min(len(data) - at, len(self._chunk) - self._filled)
            numpy.copyto(self._chunk[self._filled : self._filled + count], data[at : at + count])
            self._filled, self.nbytes, at = self._filled + count, self.nbytes + count, at + count
        if self.nbytes == self._segment.nbytes:
            self.hand_over()

    def hand_over(self) -> None:
        """What was gathered goes to the upload."""
        if self._filled:
            self._window.give(self._work, self._segment, self._chunk[: self._filled].data)
        self._chunk, self._filled = self._chunk[:0], 0


def _computing(
    window: _Window, compute: ComputeWeight, label: str, step: Compute, device: str, stop: Stop
) -> Callable[[_Supply], None]:
    def run(work: _Supply) -> None:
        chunks = {part: _Chunks(window, work, segment) for part, segment in work.segments.items()}

        def write(part: int, offset: int, raw: memoryview) -> None:
            if part not in chunks:
                return
            if offset != chunks[part].nbytes:
                raise ProofError(f"byte {offset} was made after byte {chunks[part].nbytes}", tensor=label)
            chunks[part].add(raw)

        work.measured = compute(label, step, write, stop.is_set, device)
        for part, segment in work.segments.items():
            if chunks[part].nbytes != segment.nbytes and not stop.is_set():
                raise ProofError(f"{chunks[part].nbytes} bytes were made of {segment.nbytes}", tensor=label)

    return run
