# SPDX-License-Identifier: Apache-2.0
"""Regular files: opened once, read by position, and checked for changes before the work is committed."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from surgery_formats.errors import MalformedError, NotFoundError, ProofError, SurgeryError

__all__ = ["File", "FileIdentity", "first_bytes", "identity_of", "open_file", "read_all", "stays_inside"]

FileIdentity = tuple[int, int, int, int]
"""``(device, inode, size, mtime_ns)``."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class File:
    """An open regular file; its descriptor lives as long as this object.

    Attributes:
        path: The path it was opened by.
        fd: Read-only descriptor; its position is never used (`os.pread`).
        size: Size in bytes when opened.
        identity: What it was when opened; `check_unchanged` compares with it.
        begin: Where positions count from: 0, or where a file inside this one lies (`window`).
    """

    path: Path
    fd: int
    size: int
    identity: FileIdentity
    begin: int = 0

    def window(self, begin: int, nbytes: int) -> File:
        """A file that lies in this one, as a file of its own. It is good as long as this one is open.

        Raises:
            MalformedError: it reaches beyond this file.
        """
        if begin < 0 or nbytes < 0 or begin + nbytes > self.size:
            raise MalformedError("a part of it reaches beyond its end", file=self.path)
        return replace(self, size=nbytes, begin=self.begin + begin)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Return `nbytes` bytes from `offset` in a new buffer.

        Raises:
            MalformedError: the file ends too early.
        """
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from `offset`.

        Raises:
            MalformedError: the file ends too early.
        """
        done = read_all(self.fd, buffer, self.begin + offset)
        if early := len(buffer) - done:
            raise MalformedError(f"the file ends at byte {offset + done}, {early} bytes early", file=self.path)

    def blocks(self, offset: int, nbytes: int, step: int = 4 << 20) -> Iterator[memoryview]:
        """`nbytes` bytes from `offset` in blocks of at most `step`; each is valid until the next one is requested."""
        buffer = memoryview(bytearray(min(step, nbytes)))
        for start in range(0, nbytes, step):
            block = buffer[: nbytes - start]
            self.read_into(block, offset + start)
            yield block

    def check_unchanged(self) -> None:
        """Check that the file is still the one opened: this proves the ranges copied from it.

        Raises:
            ProofError: the file was replaced or written to since it was opened.
        """
        try:
            by_name = identity_of(self.path)
        except OSError as error:
            raise ProofError("the input disappeared while it was read", file=self.path, hint="run again") from error
        if by_name != self.identity or identity_of(self.fd) != self.identity:
            raise ProofError("the input changed while it was read", file=self.path, hint="run again")


def read_all(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`, continuing after short reads; the number of bytes read, less only at the end."""
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], offset + done)):
        done += count
    return done


def identity_of(file: Path | int) -> FileIdentity:
    """What tells a file, by its path or descriptor, from others and from itself once it was written to."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_file(path: str | os.PathLike[str]) -> File:
    """Open a regular file for reading.

    Pipes, devices and folders are refused without blocking (O_NONBLOCK, then fstat).

    Raises:
        NotFoundError: the file does not exist or may not be read.
        MalformedError: not a regular file.
    """
    where = Path(path)
    try:
        fd = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise NotFoundError("not a usable file name", file=where) from error
    except OSError as error:
        raise NotFoundError(error.strerror or "cannot be opened", file=where) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise MalformedError("not a regular file", file=where)
    opened = File(where, fd, status.st_size, identity_of(fd))
    weakref.finalize(opened, os.close, fd)
    return opened


def first_bytes(path: str | os.PathLike[str], size: int) -> bytes | None:
    """The first `size` bytes of a regular file, to detect its format; None if it cannot be read for any reason."""
    try:
        file = open_file(path)
        return bytes(file.read(0, min(file.size, size)))
    except (SurgeryError, OSError):
        return None


def stays_inside(path: Path) -> bool:
    """Whether `path`, with links followed, lies in its folder or in the blobs of the hub cache around it."""
    try:
        folder, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a cycle of links
        return False
    if target.parent == folder:
        return True
    for inner in (folder, *folder.parents):
        if inner.parent.name == "snapshots":
            return target.parent == inner.parent.parent / "blobs"
    return False
