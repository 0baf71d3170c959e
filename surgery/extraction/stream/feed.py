# SPDX-License-Identifier: Apache-2.0
"""Bring rows of stored weights to the device where they are subtracted.

On a CPU, the thread that subtracts also reads. For a GPU, reader threads share out the files in small chunks: each
reads into page-locked memory of its own and copies to the device on its own stream, so that reading, copying and
computing overlap. Memory stays bounded: a reader waits until its buffer has been copied.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, starmap, zip_longest
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from surgery.extraction.stream.order import ByteObserver, InOrder, Observed
from surgery_formats.arrays import Array, empty, is_torch
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage, read_block
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["DirectFeed", "Feed", "Read", "RowPair", "StagedFeed"]

HOST_BLOCK = 1 << 19
"""Elements that are subtracted at a time on a CPU, 2 MB of float32. A thread waits for the interpreter after every call:
blocks of 2^17, which stay in the cache, take 1.2 times as long on 2 cores and twice as long on 16. Sums depend on it:
fixed."""
DEVICE_BLOCK = 1 << 26
"""The same on a GPU, whose memory is the cache, and which wants long loops."""
_CHUNK = 12 << 20  # bytes per buffer: each takes the interpreter 60 us or so, whatever its size
_NICE = 10  # of readers: what is computed with the rows comes first
_BUFFERS = 2  # per reader: one is read into while the other is copied
_TOGETHER = 5
"""Buffers that are allocated together: torch rounds page-locked memory up to a power of two (`CachingHostAllocator.h`), 12 MB
to 16 and 60 to 64."""


class Read(NamedTuple):
    """Rows to read.

    Attributes:
        side: The weight.
        first: Number of the first row.
        into: ``(n, cols)``, contiguous, of the weight's stored type; filled with rows from `first`.
        observe: Called with the offset and the bytes of each part, in order.
    """

    side: Storage
    first: int
    into: Array
    observe: ByteObserver | None = None


class RowPair(NamedTuple):
    """Rows of a pair, as stored.

    Attributes:
        first: Number of the first row.
        base: ``(n, cols)``.
        tuned: ``(n, cols)``.
    """

    first: int
    base: Array
    tuned: Array


class Feed(Protocol):
    """Brings rows to a device."""

    def fill(self, reads: Sequence[Read]) -> None:
        """Fill all; what is computed with them afterwards, in the calling thread, finds the values."""
        ...

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """Yield rows ``[start, stop)`` in order; each block is valid until the next one is requested.

        `observe` is called with the offset and the bytes of each part of `base`, in order.
        """
        ...


class DirectFeed:
    """Reads into CPU memory, in the calling thread."""

    def fill(self, reads: Sequence[Read]) -> None:
        """See `Feed`."""
        for side, first, into, observe in reads:
            side.read_into(into, first)
            if observe is not None:
                observe(first * side.shape[1] * into.itemsize, as_bytes(into))

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """See `Feed`."""
        height = min(stop - start, max(1, HOST_BLOCK // max(tuned.shape[1], 1)))
        old, new = (empty((height, side.shape[1]), side.dtype) for side in (base, tuned))
        for at in range(start, stop, max(height, 1)):
            count = min(height, stop - at)
            self.fill([Read(base, at, old[:count], observe), Read(tuned, at, new[:count])])
            yield RowPair(at, old[:count], new[:count])


class StagedFeed:
    """Reads through page-locked buffers to a device; any number of threads may share it.

    Args:
        device: Destination of the rows.
        readers: Number of reader threads.
    """

    def __init__(self, device: str, readers: int) -> None:
        self._device = device
        self._waiting: SimpleQueue[tuple[_Chunk, _Fill] | None] = SimpleQueue()
        self._buffers = _Buffers(device, readers * _BUFFERS)
        self._threads = [threading.Thread(target=self._serve, name="surgery-read", daemon=True) for _ in range(readers)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the readers, after what was asked for."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def fill(self, reads: Sequence[Read]) -> None:
        """See `Feed`."""
        self._start([(read, _order(read.observe, read.side, read.first)) for read in reads]).finish()

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """See `Feed`; the following block is read while one is used."""
        height = max(1, DEVICE_BLOCK // max(tuned.shape[1], 1))
        order = _order(observe, base, start)  # over all blocks

        def begin(at: int) -> tuple[RowPair, _Fill]:
            shapes = ((min(height, stop - at), side.shape[1]) for side in (base, tuned))
            old, new = (
                empty(shape, side.dtype, self._device) for shape, side in zip(shapes, (base, tuned), strict=True)
            )
            return RowPair(at, old, new), self._start([(Read(base, at, old), order), (Read(tuned, at, new), None)])

        started: list[tuple[RowPair, _Fill]] = []
        try:
            for at in range(start, stop, height):
                started.append(begin(at))
                if len(started) == 2:
                    rows, fill = started.pop(0)
                    fill.finish()
                    yield rows
            for rows, fill in started:
                fill.finish()
                yield rows
        finally:
            for _, fill in started:  # memory may be freed only when nothing is copied into it
                fill.abandon()

    def _start(self, reads: Sequence[tuple[Read, InOrder | None]]) -> _Fill:
        """Have everything read: a chunk of each in turn, so that bytes to be observed in order rarely wait."""
        chunks = [chunk for chunk in chain(*zip_longest(*starmap(_chunks, reads))) if chunk is not None]
        fill = _Fill(len(chunks), self._device)
        for chunk in chunks:
            self._waiting.put((chunk, fill))
        return fill

    def _serve(self) -> None:
        """Carry chunks until the end; what fails is raised where the fill is waited for."""
        if sys.platform.startswith("linux"):  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        staging: _Staging | None = None
        broken: BaseException | None = None
        try:
            staging = _Staging(self._device, self._buffers)
        except BaseException as error:
            broken = error
        while (item := self._waiting.get()) is not None:
            chunk, fill = item
            failure = broken
            carried = False
            try:
                if staging is not None and not fill.failures:
                    staging.carry(chunk, fill)
                    carried = True
            except BaseException as error:
                failure = error
            if not carried and chunk.order is not None:
                chunk.order.give_up()
            fill.one_done(staging, failure)
            del item, chunk, fill  # or the memory of the last one would be held


class _Chunk(NamedTuple):
    """A range of bytes of a weight: its offset, and its destination, flat bytes."""

    side: Storage
    offset: int
    into: Array
    order: InOrder | None

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.offset + len(self.into)


def _order(observe: ByteObserver | None, side: Storage, first: int) -> InOrder | None:
    return None if observe is None else InOrder(observe, _offset(side, first))


def _offset(side: Storage, row: int) -> int:
    return row * side.shape[1] * side.dtype.bits // 8


def _chunks(read: Read, order: InOrder | None) -> Iterator[_Chunk]:
    flat = read.into.reshape(-1)
    if is_torch(flat):
        import torch  # of a device's memory

        flat = flat.view(torch.uint8)
    else:
        flat = flat.view("uint8")
    first = _offset(read.side, read.first)
    for at in range(0, len(flat), _CHUNK):
        yield _Chunk(read.side, first + at, flat[at : at + _CHUNK], order)


class _Fill:
    """Chunks that are being read."""

    def __init__(self, chunks: int, device: str) -> None:
        self._left, self._used = chunks, set[_Staging | None]()
        self._changed = threading.Condition()
        self.failures: list[BaseException] = []
        self.allocated = None if device == "cpu" else _event()  # before it, the memory may still be in use

    def one_more(self) -> None:
        """Wait for another thing, too."""
        with self._changed:
            self._left += 1

    def one_done(self, staging: _Staging | None, failure: BaseException | None) -> None:
        """Count a chunk, or that one was observed."""
        with self._changed:
            self._left -= 1
            self._used.add(staging)
            if failure is not None:
                self.failures.append(failure)
            if not self._left:
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is read, and have the current stream wait until all is copied."""
        self.abandon()
        if self.failures:
            raise self.failures[0]

    def abandon(self) -> None:
        """As `finish`, whether it could be read or not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left)
        for staging in self._used:
            if staging is not None:
                staging.before_current_stream()


@dataclass(slots=True)
class _Buffer:
    """A buffer: the same memory as an array and as bytes, the event after its last copy, and who observes it."""

    memory: Array
    raw: memoryview
    copied: Any
    observed: Observed | None = None


class _Buffers:
    """The memory of all buffers of a feed, allocated when the readers start: several buffers at a time."""

    def __init__(self, device: str, count: int) -> None:
        self._device, self._left = device, count
        self._free: list[Array] = []
        self._lock = threading.Lock()

    def take(self) -> _Buffer:
        """A buffer of the calling thread, on whose current stream it is copied."""
        with self._lock:
            if not self._free:
                count = min(_TOGETHER, self._left)
                memory = _page_locked(self._device, count * _CHUNK)
                self._free = [memory[at : at + _CHUNK] for at in range(0, len(memory), _CHUNK)]
            self._left -= 1
            memory = self._free.pop()
        return _Buffer(memory, as_bytes(memory), None if self._device == "cpu" else _event())


class _Staging:
    """The buffers and the stream of the calling thread, whose current stream it becomes."""

    def __init__(self, device: str, buffers: _Buffers) -> None:
        self._stream: Any = None
        if device != "cpu":
            import torch  # streams and page-locked memory are CUDA's

            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch gives it no types
            torch.cuda.set_stream(self._stream)
        self._fill: _Fill | None = None
        self._buffers = cycle([buffers.take() for _ in range(_BUFFERS)])

    def carry(self, chunk: _Chunk, fill: _Fill) -> None:
        """Read a chunk, have it copied, and show it to its observer."""
        buffer = next(self._buffers)
        if buffer.observed is not None:
            buffer.observed.wait()
            buffer.observed = None
        size = len(chunk.into)
        if buffer.copied is None:
            _read(chunk, buffer.raw[:size])
            chunk.into[...] = buffer.memory[:size]
        else:
            buffer.copied.synchronize()
            _read(chunk, buffer.raw[:size])
            if fill is not self._fill:
                self._fill = fill
                self._stream.wait_event(fill.allocated)
            chunk.into.copy_(buffer.memory[:size], non_blocking=True)
            buffer.copied.record()
        if chunk.order is not None:
            fill.one_more()
            buffer.observed = Observed(lambda: fill.one_done(None, None))
            chunk.order.offer(chunk.offset, buffer.raw[:size], buffer.observed)

    def before_current_stream(self) -> None:
        """Have the current stream wait for the copies so far."""
        if self._stream is not None:
            import torch

            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def _page_locked(device: str, nbytes: int) -> Array:
    if device == "cpu":
        return empty((nbytes,), DType.U8)
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _event() -> Any:
    """An event at the end of the current stream."""
    import torch

    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
    event.record()
    return event


def _read(chunk: _Chunk, raw: memoryview) -> None:
    side, tensor = chunk.side, chunk.side.elements
    if isinstance(tensor, StoredTensor) and tensor.strides is None and tensor.shape:
        tensor.file.read_into(raw, tensor.offset + chunk.offset)
    else:  # a quantised weight, or a pickle's transposed tensor
        row = side.shape[1] * side.dtype.bits // 8
        first, last = chunk.offset // row, -(-chunk.end // row)
        flat = as_bytes(read_block(side, first, last))
        start = chunk.offset - first * row
        raw[:] = flat[start : start + len(raw)]
