# SPDX-License-Identifier: Apache-2.0
"""An object that is read by position: runs in blocks that are fetched ahead and kept for a while, the rest as it is asked for.

Every request names the etag that the object had when it was opened, so that bytes of two versions never meet.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from surgery_formats.errors import NotFoundError, ProofError
from surgery_formats.files.remote.path import RemotePath
from surgery_formats.files.remote.store import HEAD, ObjectFacts, ObjectStore

__all__ = ["BLOCK", "RemoteObject", "open_remote"]

BLOCK = 8 << 20
_RUN = 512 << 10  # a read of so many bytes belongs to a run, and so does one that goes on where another ended
_KEPT = 16  # blocks of all objects together
_AHEAD = 3  # blocks
_THREADS = 8
_SERIALS = itertools.count()
_LEAST = 4  # bytes of a header that a first request must have to be worth it


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "surgery-fetch")


class _Blocks:
    """Blocks that were fetched, or are being fetched; those used longest ago go first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._closed: deque[int] = deque()

    def get(self, source: RemoteObject, number: int, last: int) -> Future[memoryview]:
        """The block, fetched if it is not there, and so are those behind it up to `last`."""
        with self._lock:
            while self._closed:
                gone = self._closed.popleft()
                for old in [old for old in self._blocks if old[0] == gone]:
                    del self._blocks[old]
            found, *_ = [self._kept(source, following) for following in range(number, last + 1)]
            return found

    def _kept(self, source: RemoteObject, number: int) -> Future[memoryview]:
        key = (source.serial, number)
        found = self._blocks.get(key)
        if found is None or (found.done() and found.exception() is not None):
            found = self._blocks[key] = _pool().submit(source.fetch, number * BLOCK, (number + 1) * BLOCK)
            done = [old for old in self._blocks if old != key and self._blocks[old].done()]
            for old in done[: max(len(self._blocks) - _KEPT, 0)]:
                del self._blocks[old]
        self._blocks.move_to_end(key)
        return found

    def has(self, source: RemoteObject, number: int) -> bool:
        """Whether it is there."""
        with self._lock:
            return (source.serial, number) in self._blocks

    def drop(self, source: RemoteObject) -> None:
        """Forget the blocks of an object that is closed.

        This may happen in the middle of anything, also while this thread holds a lock that another one waits for in
        `get`. So it takes none.
        """
        self._closed.append(source.serial)


_BLOCKS = _Blocks()


class RemoteObject:
    """The bytes of one object, as it was when it was opened."""

    def __init__(self, store: ObjectStore, key: str, facts: ObjectFacts, head: memoryview) -> None:
        self.serial = next(_SERIALS)
        self.store = store
        self.key = key
        self.facts = facts
        self._head = head
        self._ends: OrderedDict[int, None] = OrderedDict()
        self._warm: list[tuple[int, int, Future[memoryview]]] = []
        self._lock = threading.Lock()

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Tells it from others, and from itself once it is written to: the fields of a file's identity."""
        told = f"{self.store.url(self.key)}\0{self.facts.etag}\0{self.facts.version or ''}"
        digest = hashlib.sha256(told.encode(errors="surrogatepass")).digest()
        return -2, int.from_bytes(digest[:8]), self.facts.size, int.from_bytes(digest[8:16])

    @property
    def record(self) -> dict[str, str]:
        """The etag, and where the bucket keeps versions, which one."""
        version = {} if self.facts.version is None else {"version": self.facts.version}
        return {"etag": self.facts.etag, **version}

    def fetch(self, start: int, stop: int) -> memoryview:
        """A range, from the bucket.

        Raises:
            ProofError: it is another object by now.
            InputError: it cannot be read.
        """
        stop = min(stop, self.facts.size)
        if start >= stop:
            return memoryview(b"")
        return self.store.read(self.key, start, stop, self.facts.etag, self.facts.version).data

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the number of bytes, less only at the end."""
        size = min(len(buffer), max(self.facts.size - offset, 0))
        if not size:
            return 0
        if offset + size <= len(self._head):
            buffer[:size] = self._head[offset : offset + size]
            return size
        with self._lock:
            run = size >= _RUN or offset in self._ends
            self._ends.pop(offset, None)
            self._ends[offset + size] = None
            while len(self._ends) > 64:
                self._ends.popitem(last=False)
            warm = next((one for one in self._warm if one[0] <= offset and offset + size <= one[1]), None)
            if warm is not None and offset + size == warm[1]:
                self._warm.remove(warm)
        if warm is not None:
            buffer[:size] = warm[2].result()[offset - warm[0] : offset - warm[0] + size]
        elif run or _BLOCKS.has(self, offset // BLOCK):
            self._by_blocks(buffer[:size], offset, _AHEAD if run else 0)
        else:
            buffer[:size] = self.fetch(offset, offset + size)
        return size

    def _by_blocks(self, buffer: memoryview, offset: int, ahead: int) -> None:
        end = offset + len(buffer)
        last = (self.facts.size - 1) // BLOCK
        for number in range(offset // BLOCK, (end - 1) // BLOCK + 1):
            data, begin = _BLOCKS.get(self, number, min(number + ahead, last)).result(), number * BLOCK
            start, stop = max(offset, begin), min(end, begin + BLOCK)
            _copy(buffer[start - offset : stop - offset], data[start - begin : stop - begin])

    def warm(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges ``(offset, nbytes)`` at the same time; each is kept until its last byte is read."""
        with self._lock:
            for offset, nbytes in ranges:
                if (stop := min(offset + nbytes, self.facts.size)) > len(self._head):
                    self._warm.append((offset, stop, _pool().submit(self.fetch, offset, stop)))

    def check_unchanged(self) -> None:
        """Ask the bucket whether the object is still the one that was opened.

        Raises:
            ProofError: it is another one, or is gone.
        """
        file = self.store.url(self.key)
        try:
            now = self.store.facts(self.key)
        except NotFoundError as error:
            raise ProofError("the input disappeared while it was read", file=file, hint="run again") from error
        if (now.etag, now.size) != (self.facts.etag, self.facts.size):
            raise ProofError("the input changed while it was read", file=file, hint="run again")

    def close(self) -> None:
        """Forget what was fetched."""
        _BLOCKS.drop(self)


def _copy(target: memoryview, data: memoryview) -> None:
    """Copy bytes; of many, numpy lets other threads run meanwhile."""
    if len(data) < _RUN:
        target[:] = data
        return
    import numpy

    numpy.copyto(numpy.frombuffer(target, numpy.uint8), numpy.frombuffer(data, numpy.uint8))


def open_remote(path: RemotePath) -> RemoteObject:
    """Open an object: one request tells what it is, and brings its first bytes.

    Raises:
        NotFoundError: there is none.
        InputError: it cannot be read.
    """
    if not path.is_plain or not path.key:
        raise NotFoundError("no such object", file=str(path))
    store, known = path.store, path.facts()
    if known is None:
        raise NotFoundError("no such object", file=str(path))
    # a range of nothing is an error; and what is known may be of a version that is gone since
    first = store.read(path.key, 0, min(HEAD, known.size)) if known.size >= _LEAST else store.read(path.key)
    return RemoteObject(store, path.key, first.facts, first.data)
