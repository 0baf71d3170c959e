# SPDX-License-Identifier: Apache-2.0
"""One file of an output folder while it is written: by position, from any number of threads."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery_formats.errors import ProofError, ResourceError, SurgeryError
from surgery_formats.files.output.kernel_copy import copy_range, reserve, start_writeback, write_all
from surgery_formats.files.raw import File
from surgery_formats.text import nbytes as readable

__all__ = ["OutputFile", "check_disk", "output_faults"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Written bytes between two requests to start writeback: the request costs a system call, the disk wants long
# runs.
_WRITEBACK_STEP = 16 << 20


@contextmanager
def output_faults(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn what the system says about the output `path` into a `ResourceError` that names it.

    Args:
        path: Shown to the user.
        needed: Bytes that were asked for, for the message of a full disk.
    """
    try:
        yield
    except SurgeryError:
        raise
    except OSError as error:
        raise _fault(error, Path(path), needed) from error


def _fault(error: OSError, path: Path, needed: int | None) -> ResourceError:
    if error.errno in _FULL:
        asked = "" if needed is None else f": {readable(needed)} needed, {readable(_free(path))} free"
        return ResourceError(
            f"no space left on the disk{asked}", file=path, hint="free some space or write to another disk"
        )
    if error.errno == errno.EFBIG:
        return ResourceError(
            "larger than this file system or `ulimit -f` allows", file=path, hint="use a smaller --shard-size"
        )
    return ResourceError(f"cannot be written ({error.strerror or error})", file=path)


def _free(path: Path) -> int:
    """Bytes an ordinary user can still write where `path` is or will be."""
    for place in (path, *path.absolute().parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return 0


def check_disk(parent: str | os.PathLike[str], needed: int) -> None:
    """Refuse a job that cannot fit before it starts.

    Raises:
        ResourceError: fewer than `needed` bytes are free below `parent`.
    """
    free = _free(Path(parent))
    if free < needed:
        raise ResourceError(
            f"not enough disk: {readable(needed)} needed, {readable(free)} free",
            file=parent,
            hint="free some space or write to another disk",
        )


class OutputFile:
    """A staged file of a size known beforehand.

    Every method may be called from any thread; ranges must not overlap while two threads write them. Join the
    threads that write before the folder is left.

    Attributes:
        name: Relative to the output folder.
        path: Where it lies while it is written.
        fd: Descriptor, read and write; -1 once closed.
        nbytes: Planned size.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        shown: Path,
        nbytes: int,
        publish: Callable[[OutputFile, Mapping[str, Any]], None],
    ) -> None:
        self.name = name
        self.path = path
        self.nbytes = nbytes
        self.fd = -1
        self._shown = shown
        self._publish = publish
        self._lock = threading.Lock()
        # [start, stop) of what was written, merged where a write follows the last one
        self._spans: list[list[int]] = []
        self._unsynced = 0
        with output_faults(shown, nbytes):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                reserve(self.fd, nbytes)
            except BaseException:
                self.close()
                os.unlink(path)  # before the message says how much is free
                raise

    def pwrite(self, data: memoryview | bytes | bytearray, offset: int) -> None:
        """All of `data` at `offset`.

        Raises:
            ResourceError: full disk, quota, file size limit, or a failing device.
            ProofError: outside the planned size.
        """
        view = memoryview(data).cast("B")
        self._inside(offset, len(view))
        with output_faults(self._shown, self.nbytes):
            write_all(self.fd, view, offset)
            self._written(offset, len(view))

    def copy_from(self, source: File, src_offset: int, dst_offset: int, nbytes: int) -> None:
        """`nbytes` bytes of `source`, copied by the kernel where it can; returns when all are there.

        Raises:
            MalformedError: `source` ends before.
            ResourceError, ProofError: as `pwrite`.
        """
        self._inside(dst_offset, nbytes)
        with output_faults(self._shown, self.nbytes):
            copy_range(source, src_offset, self.fd, dst_offset, nbytes)
        self._note(dst_offset, nbytes)

    def readback(self, offset: int, nbytes: int) -> bytearray:
        """What the file holds now, for the proof that it is what was meant.

        Raises:
            ProofError: outside the planned size, or the file is shorter than it.
        """
        buffer = bytearray(nbytes)
        self.readback_into(memoryview(buffer), offset)
        return buffer

    def readback_into(self, view: memoryview, offset: int) -> None:
        """As `readback`, into memory of the caller's own.

        Raises:
            ProofError: as `readback`.
        """
        self._inside(offset, len(view))
        done = 0
        with output_faults(self._shown):
            while done < len(view):
                got = os.preadv(self.fd, [view[done:]], offset + done)
                if got == 0:
                    raise ProofError(f"ends at byte {offset + done} while it is written", file=self._shown)
                done += got

    def finish(self, record: Mapping[str, Any]) -> None:
        """Make the file durable, give it its name, and note it so that a resumed run need not write it again.

        The slow part (`fsync`) holds no lock: several files may be finished at once from several threads.

        Args:
            record: JSON values; ``xxh3`` (xxh3-128 hex of the whole file) lets a later run trust the file
                without a check of its own.

        Raises:
            ProofError: a planned byte was never written, or the size is not the planned one.
            ResourceError: the disk did not take it. It is not tried again: an fsync error is reported once.
        """
        if (gap := self._gap()) is not None:
            raise ProofError(f"bytes {gap[0]} to {gap[1]} were never written", file=self._shown)
        with output_faults(self._shown, self.nbytes):
            os.fsync(self.fd)
            if (size := os.fstat(self.fd).st_size) != self.nbytes:
                raise ProofError(f"{size} bytes, {self.nbytes} planned", file=self._shown)
            self._publish(self, record)
            self.close()

    def close(self) -> None:
        """Give the descriptor back; harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _inside(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ProofError(
                f"bytes {offset} to {offset + nbytes} of a file planned with {self.nbytes}", file=self._shown
            )

    def _note(self, offset: int, nbytes: int) -> None:
        with self._lock:
            if self._spans and self._spans[-1][1] == offset:
                self._spans[-1][1] += nbytes
            else:
                self._spans.append([offset, offset + nbytes])

    def _written(self, offset: int, nbytes: int) -> None:
        self._note(offset, nbytes)
        with self._lock:
            self._unsynced += nbytes
            start = self._unsynced >= _WRITEBACK_STEP
            if start:
                self._unsynced = 0
        if start:
            start_writeback(self.fd, 0, 0)  # 0 bytes means to the end: only dirty pages cost anything

    def _gap(self) -> tuple[int, int] | None:
        """The first range nobody wrote: reserved blocks read as zeros, as a tensor of zeros would."""
        reached = 0
        with self._lock:
            spans = sorted(self._spans)
        for start, stop in spans:
            if start > reached:
                return reached, start
            reached = max(reached, stop)
        return (reached, self.nbytes) if reached < self.nbytes else None
