# SPDX-License-Identifier: Apache-2.0
"""One file of an output folder while it is written: by position, from any number of threads."""

from __future__ import annotations

import bisect
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from surgery_formats.errors import ProofError, ResourceError, SurgeryError
from surgery_formats.files.descriptors import Descriptor
from surgery_formats.files.output.hashing import FollowingHash
from surgery_formats.files.output.kernel_copy import copy_range, reserve, start_writeback, write_all
from surgery_formats.files.raw import File, read_all
from surgery_formats.text import nbytes as readable

__all__ = ["WRITEBACK_STEP", "OutputFile", "output_faults"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Bytes written between two requests to start writeback: a request costs a system call, and disks like long runs.
WRITEBACK_STEP = 16 << 20


@contextmanager
def output_faults(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn system errors on the output `path` into a `ResourceError` that names it.

    Args:
        path: The path shown to the user.
        needed: Bytes needed, for the message of a full disk.
    """
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise _fault(error, Path(path), needed) from error


def _fault(error: OSError, path: Path, needed: int | None) -> ResourceError:
    if error.errno in _FULL:
        sizes = "" if needed is None else f": {readable(needed)} needed, {readable(_free(path))} free"
        return ResourceError(
            f"no space left on the disk{sizes}", file=path, hint="free some space or write to another disk"
        )
    if error.errno == errno.EFBIG:
        return ResourceError(
            "larger than this file system or `ulimit -f` allows", file=path, hint="use a smaller `shard_size=`"
        )
    return ResourceError(f"cannot be written ({error.strerror or error})", file=path)


def _free(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where `path` is or will be."""
    for ancestor in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(ancestor).free
    return 0


def _reopened(path: Path, status: os.stat_result) -> int:
    """A new descriptor of a file that is being written.

    Raises:
        ProofError: another file has its name.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not os.path.samestat(os.fstat(fd), status):
        os.close(fd)
        raise ProofError("was replaced while it was written", file=path)
    return fd


class OutputFile:
    """A staged file of known size.

    All methods are thread-safe, but ranges that two threads write at the same time must not overlap. Join the writing
    threads before leaving the folder.

    Attributes:
        name: Path relative to the output folder.
        path: Where it lies while it is written.
        nbytes: Planned size.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        shown: Path,
        nbytes: int,
        publish: Callable[[OutputFile, Mapping[str, Any]], None],
        hashes: Sequence[str],
        threads: Executor,
    ) -> None:
        self.name = name
        self.path = path
        self.nbytes = nbytes
        self._shown = shown
        self._publish = publish
        self._lock = threading.Lock()
        self._spans: list[tuple[int, int]] = []  # written so far, in order; none touches another
        self._unsynced = 0
        with output_faults(shown, nbytes):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                reserve(fd, nbytes)
            except BaseException:
                os.close(fd)
                os.unlink(path)  # before the message reports the free space
                raise
            self._descriptor = Descriptor(fd, partial(_reopened, path, os.fstat(fd)))
        self._hash = FollowingHash(self._descriptor, nbytes, hashes, threads)

    def pwrite(self, data: memoryview | bytes | bytearray, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            ResourceError: full disk, quota, file size limit, or a failing device.
            ProofError: outside the planned size.
        """
        view = memoryview(data).cast("B")
        self._inside(offset, len(view))
        with output_faults(self._shown, self.nbytes), self._descriptor as fd:
            write_all(fd, view, offset)
            self._note(offset, len(view))
            with self._lock:
                self._unsynced += len(view)
                if start := self._unsynced >= WRITEBACK_STEP:
                    self._unsynced = 0
            if start:
                start_writeback(fd, 0, 0)  # 0 bytes means to the end: only dirty pages cost anything

    def note_written(self, offset: int, nbytes: int) -> None:
        """Another process wrote this range, through a descriptor that it inherited."""
        self._inside(offset, nbytes)
        self._note(offset, nbytes)

    def copy_from(self, source: File, src_offset: int, dst_offset: int, nbytes: int) -> None:
        """Copy `nbytes` bytes of `source`, in the kernel where possible.

        Raises:
            MalformedError: `source` ends too early.
            ResourceError, ProofError: as `pwrite`.
        """
        self._inside(dst_offset, nbytes)
        with output_faults(self._shown, self.nbytes), self._descriptor as fd:
            copy_range(source, src_offset, fd, dst_offset, nbytes)
        self._note(dst_offset, nbytes)

    def readback(self, offset: int, nbytes: int) -> bytearray:
        """Return the current content, for the proof that it is what was computed.

        Raises:
            ProofError: outside the planned size, or the file is shorter than planned.
        """
        buffer = bytearray(nbytes)
        self.readback_into(memoryview(buffer), offset)
        return buffer

    def readback_into(self, view: memoryview, offset: int) -> None:
        """Like `readback`, into the caller's memory.

        Raises:
            ProofError: as `readback`.
        """
        self._inside(offset, len(view))
        with output_faults(self._shown), self._descriptor as fd:
            done = read_all(fd, view, offset)
        if done < len(view):
            raise ProofError(f"ends at byte {offset + done} while it is written", file=self._shown)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Make the file durable, rename it to its final name, and record it for resumed runs.

        The slow part (`fsync`) holds no lock, so threads can finish several files at once.

        Args:
            record: JSON values; the hashes of the whole file are added.

        Raises:
            ProofError: a planned byte was never written, the size is not the planned one, or its name is another file's.
            ResourceError: the disk failed. There is no retry: the kernel reports an fsync error only once.
        """
        if (gap := self._gap()) is not None:
            raise ProofError(f"bytes {gap[0]} to {gap[1]} were never written", file=self._shown)
        with output_faults(self._shown, self.nbytes):
            hashes = self._hash.complete()
            with self._descriptor as fd:
                os.fsync(fd)
                status = os.fstat(fd)
            if status.st_size != self.nbytes:
                raise ProofError(f"has {status.st_size} bytes instead of the planned {self.nbytes}", file=self._shown)
            record = {**record, **hashes.result()}
            if not os.path.samestat(status, os.lstat(self.path)):  # where a lock holds on one machine alone
                raise ProofError("another process writes it, too", file=self._shown, hint="wait, and run again")
            self._publish(self, record)
            self.close()

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        self._descriptor.close()

    def abandon(self) -> None:
        """Hash no further, because the file will not be finished."""
        self._hash.stop()

    def _inside(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ProofError(
                f"bytes {offset} to {offset + nbytes} lie outside the planned {self.nbytes}", file=self._shown
            )

    def _note(self, offset: int, nbytes: int) -> None:
        if nbytes == 0:
            return
        start, stop = offset, offset + nbytes
        with self._lock:
            first = bisect.bisect_right(self._spans, (start, stop))
            if first and self._spans[first - 1][1] >= start:
                first -= 1
                start, stop = self._spans[first][0], max(stop, self._spans[first][1])
            last = first
            while last < len(self._spans) and self._spans[last][0] <= stop:
                stop = max(stop, self._spans[last][1])
                last += 1
            self._spans[first:last] = [(start, stop)]
            begins, front = self._spans[0]
            if begins == 0:  # still under the lock: what is told late would look as if it were written twice
                self._hash.reached(front, offset)

    def _gap(self) -> tuple[int, int] | None:
        """Return the first range never written. Its reserved blocks would read as zeros, like a zero tensor."""
        reached = 0
        with self._lock:
            spans = list(self._spans)
        for start, stop in spans:
            if start > reached:
                return reached, start
            reached = stop
        return (reached, self.nbytes) if reached < self.nbytes else None
