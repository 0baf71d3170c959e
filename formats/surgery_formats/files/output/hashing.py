# SPDX-License-Identifier: Apache-2.0
"""Hashes of a file while it is written, and the digest of a folder of files.

A hash needs the bytes in order, and they come from many threads, other processes and the kernel. So it follows behind:
whenever everything up to some place has been written, it reads on to there, while the pages are still in memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol

import xxhash

from surgery_formats.files.descriptors import Descriptor
from surgery_formats.threads import cores

__all__ = ["FollowingHash", "Hash", "hash_threads", "new_hash", "root_digest"]

_STEP = 32 << 20
"""Bytes that must have come before they are hashed: what is smaller waits for the end, and starts no thread before then."""
_BLOCK = 256 << 10  # stays in the processor's own memory between the read and the hash
_MOST_THREADS = 4  # that hash: each takes one file, and a core


def hash_threads() -> ThreadPoolExecutor:
    """The threads for the files of one folder; none is started before there is something to hash."""
    return ThreadPoolExecutor(max(1, min(cores(), _MOST_THREADS)), "surgery-hash")


class Hash(Protocol):
    """As hashlib has them."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Take more bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all that came."""
        ...


def new_hash(kind: str) -> Hash:
    """``xxh3`` (xxh3-128) or ``sha256`` of nothing yet."""
    return xxhash.xxh3_128() if kind == "xxh3" else hashlib.sha256()


class FollowingHash:
    """Hashes of a file of known size that others write."""

    def __init__(self, descriptor: Descriptor, nbytes: int, kinds: Sequence[str], threads: Executor) -> None:
        self._kinds = tuple(kinds)
        self._descriptor = descriptor
        self._nbytes = nbytes
        self._threads = threads
        self._lock = threading.Lock()
        self._states = self._fresh()
        self._hashed = 0  # bytes, from the start
        self._wanted = 0  # all that is there already, and no more than that
        self._running = self._again = self._stopped = False
        self._complete: Future[dict[str, str]] | None = None  # once every byte is there

    def reached(self, written: int, changed_from: int) -> None:
        """Everything before `written` is there now; what was written last begins at `changed_from`."""
        with self._lock:
            if changed_from < self._wanted:  # written twice: once more from the start, when all of it is there
                self._again = True
            if self._kinds and not self._again and written - self._wanted >= _STEP:
                self._follow(written)

    def complete(self) -> Future[dict[str, str]]:
        """Every byte is there now: the hashes in hexadecimal by kind, once the rest is read.

        It fails with OSError where the file cannot be read.
        """
        with self._lock:
            if self._complete is None:  # else reading has failed
                self._complete = Future()
                if self._kinds:
                    self._follow(self._nbytes)
                else:
                    self._complete.set_result({})
            return self._complete

    def _fresh(self) -> dict[str, Hash]:
        return {kind: new_hash(kind) for kind in self._kinds}

    def stop(self) -> None:
        """Hash no further: nobody will ask."""
        with self._lock:
            self._stopped = True

    def _follow(self, wanted: int) -> None:
        self._wanted = wanted
        if not self._running:  # one thread for a file: where it waits for bytes, it goes on to another
            self._running = True
            self._threads.submit(self._run)

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                self._hash(*piece)
        except BaseException as error:
            with self._lock:
                waiting = self._complete or Future()
                self._complete = waiting
            waiting.set_exception(error)

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            if self._again and self._complete is not None:
                self._states, self._hashed, self._again = self._fresh(), 0, False
            start, self._hashed = self._hashed, min(self._wanted, self._hashed + _STEP)
            if start < self._hashed and not self._stopped:
                return start, self._hashed
            self._running = False
            if self._complete is not None and self._stopped:  # perhaps in the middle of a piece
                self._complete.set_exception(OSError(errno.ECANCELED, os.strerror(errno.ECANCELED)))
            elif self._complete is not None and start == self._nbytes:
                self._complete.set_result({kind: state.hexdigest() for kind, state in self._states.items()})
            return None

    def _hash(self, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(_BLOCK, stop - start)))
        while start < stop and not self._stopped:
            with self._descriptor as fd:
                count = os.preadv(fd, [buffer[: stop - start]], start)
            if count == 0:
                raise OSError(errno.EIO, f"ends at byte {start} while it is written")
            for state in self._states.values():
                state.update(buffer[:count])
            start += count


def root_digest(files: Mapping[str, str]) -> str:
    """The digest of a folder, from the sha256 of each of its files in hexadecimal.

    It is the ``sha256`` of the subject that OpenSSF model signing signs (method ``files``, ``sha256``): the sha256 of the
    files' digests, one behind the other, in the order of their paths, compared part by part.
    """
    state = hashlib.sha256()
    for name in sorted(files, key=lambda name: name.split("/")):
        state.update(bytes.fromhex(files[name]))
    return state.hexdigest()
