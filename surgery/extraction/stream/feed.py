# SPDX-License-Identifier: Apache-2.0
"""Bring rows of both tensors of a pair to the device where they are subtracted.

On a CPU, the thread that subtracts also reads. For a GPU, reader threads fill page-locked buffers, and copies to the
device overlap with reading. Readers never get ahead by more than the buffers hold, so memory stays bounded.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch

from surgery_formats.storage.base import Storage, read_block
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["ByteObserver", "DirectFeed", "Feed", "RowPair", "StagedFeed"]

HOST_BLOCK = 1 << 17
"""Elements that are subtracted at a time on a CPU, 512 kB of float32: with what is worked out from them they stay in
its cache. Sums depend on it: fixed."""
DEVICE_BLOCK = 1 << 26
"""The same on a GPU, whose memory is the cache, and which wants long loops."""
_CHUNK = 8 << 20  # bytes per buffer
ByteObserver = Callable[[int, memoryview], None]


class RowPair(NamedTuple):
    """Rows of a pair, as stored.

    Attributes:
        first: Number of the first row.
        base: ``(n, cols)``.
        tuned: ``(n, cols)``.
    """

    first: int
    base: torch.Tensor
    tuned: torch.Tensor


class Feed(Protocol):
    """Brings rows to a device."""

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """Yield rows ``[start, stop)`` in order; each block is valid until the next one is requested.

        `observe` is called with the offset and the bytes of each part of `base`, in order.
        """
        ...


class DirectFeed:
    """Reads into CPU memory, in the calling thread."""

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """See `Feed`."""
        height = min(stop - start, max(1, HOST_BLOCK // max(tuned.shape[1], 1)))
        base_rows, tuned_rows = (torch.empty((height, side.shape[1]), dtype=side.dtype.torch) for side in (base, tuned))
        for at in range(start, stop, max(height, 1)):
            count = min(height, stop - at)
            base.read_into(base_rows[:count], at)
            tuned.read_into(tuned_rows[:count], at)
            if observe is not None:
                observe(at * base.shape[1] * base_rows.element_size(), as_bytes(base_rows[:count]))
            yield RowPair(at, base_rows[:count], tuned_rows[:count])


class _PinnedBuffer:
    """A page-locked buffer and the last copy out of it."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copied(self) -> None:
        """Note that the current stream's copies out of it have been issued."""
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        """Wait until these copies are done."""
        if self.event is not None:
            self.event.synchronize()


class StagedFeed:
    """Reads through page-locked buffers to a device; any number of threads may share it.

    Args:
        device: Destination of the rows.
        readers: Number of reader threads.
        buffers: Number of buffers, 8 MB each.
    """

    def __init__(self, device: torch.device, readers: int, buffers: int) -> None:
        self._device = device
        self._free: queue.Queue[_PinnedBuffer] = queue.Queue()
        for _ in range(buffers):
            self._free.put(_PinnedBuffer(device))
        self._pool = ThreadPoolExecutor(readers, "surgery-read")

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown(cancel_futures=True)

    def pairs(
        self, base: Storage, tuned: Storage, start: int, stop: int, observe: ByteObserver | None = None
    ) -> Iterator[RowPair]:
        """See `Feed`."""
        height = max(1, DEVICE_BLOCK // max(tuned.shape[1], 1))
        for at in range(start, stop, height):
            count = min(height, stop - at)
            base_rows, tuned_rows = (
                torch.empty((count, side.shape[1]), dtype=side.dtype.torch, device=self._device)
                for side in (base, tuned)
            )
            self._fill([(base, base_rows), (tuned, tuned_rows)], at, observe)
            yield RowPair(at, base_rows, tuned_rows)

    def _fill(self, sides: list[tuple[Storage, torch.Tensor]], start: int, observe: ByteObserver | None) -> None:
        """Fill both sides alternately, so that neither waits for all of the other."""
        waiting = deque(_chunks(sides, start))
        running: deque[tuple[Future[None], _PinnedBuffer, _ReadRange]] = deque()
        try:
            while waiting or running:
                # Wait for a buffer only with no read under way; otherwise free one first. This rules out a deadlock.
                while waiting and (buffer := self._take(wait=not running)) is not None:
                    chunk = waiting.popleft()
                    running.append((self._pool.submit(_read, buffer, chunk), buffer, chunk))
                future, buffer, chunk = running[0]
                future.result()
                running.popleft()
                read = buffer.bytes[: chunk.place.numel()]
                chunk.place.copy_(read, non_blocking=True)
                buffer.copied()
                if observe is not None and chunk.side is sides[0][0]:
                    observe(chunk.offset, as_bytes(read))
                self._free.put(buffer)
        finally:
            for future, buffer, _ in running:  # after a failure
                future.cancel()
                if not future.cancelled():
                    future.exception()
                self._free.put(buffer)

    def _take(self, *, wait: bool) -> _PinnedBuffer | None:
        try:
            return self._free.get(block=wait)
        except queue.Empty:
            return None


class _ReadRange(NamedTuple):
    """A range of bytes of one side: its offset in the tensor, and its destination."""

    side: Storage
    offset: int
    place: torch.Tensor


def _chunks(sides: list[tuple[Storage, torch.Tensor]], start: int) -> Iterator[_ReadRange]:
    flat = [
        (side, start * side.shape[1] * block.element_size(), block.reshape(-1).view(torch.uint8))
        for side, block in sides
    ]
    for at in range(0, max(len(place) for _, _, place in flat), _CHUNK):
        for side, offset, place in flat:
            if at < len(place):
                yield _ReadRange(side, offset + at, place[at : at + _CHUNK])


def _read(buffer: _PinnedBuffer, chunk: _ReadRange) -> None:
    buffer.wait()
    side, into = chunk.side, buffer.bytes[: chunk.place.numel()]
    tensor = side.elements
    if isinstance(tensor, StoredTensor) and tensor.strides is None and tensor.shape:
        tensor.file.read_into(as_bytes(into), tensor.offset + chunk.offset)
    else:  # a quantised weight, or a pickle's transposed tensor
        row = side.shape[1] * side.dtype.bits // 8
        first, last = chunk.offset // row, -(-(chunk.offset + len(into)) // row)
        flat = read_block(side, first, last).reshape(-1).view(torch.uint8)
        into.copy_(flat[chunk.offset - first * row :][: len(into)])
