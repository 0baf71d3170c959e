# SPDX-License-Identifier: Apache-2.0
"""Regular files: opened once, read by position, and checked for changes before the work is committed.

An object of a bucket is such a file, too: it has ranges in the place of a descriptor.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from surgery_formats.errors import MalformedError, NotFoundError, ProofError, SurgeryError
from surgery_formats.files.descriptors import Descriptor
from surgery_formats.files.remote.path import RemotePath, to_path

__all__ = [
    "File",
    "FileIdentity",
    "FileRange",
    "Ranges",
    "first_bytes",
    "identity_of",
    "joined_file",
    "memory_file",
    "nameless_file",
    "open_file",
    "read_all",
    "stays_inside",
]

FileIdentity = tuple[int, int, int, int]
"""``(device, inode, size, mtime_ns)``."""


class Ranges(Protocol):
    """Where the bytes of a file without a descriptor come from."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the number of bytes, less only at the end."""
        ...

    def fetch(self, start: int, stop: int) -> memoryview:
        """A range, in new memory."""
        ...

    def warm(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges ``(offset, nbytes)`` ahead; each is kept until its last byte is read."""
        ...

    def check_unchanged(self) -> None:
        """Raise a `ProofError` if the bytes are others by now."""
        ...

    @property
    def record(self) -> dict[str, str]:
        """What tells this version from others, for the manifest."""
        ...


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class File:
    """An open regular file, until this object and its windows are gone.

    Attributes:
        path: The path it was opened by.
        descriptor: Read-only; its position is never used (`os.pread`). None where the bytes come from elsewhere.
        size: Size in bytes when opened.
        identity: What it was when opened; `check_unchanged` compares with it.
        begin: Where positions count from: 0, or where a file inside this one lies (`window`).
        pieces: Of a file that is made of ranges of others (`joined_file`): these, in order. It has no descriptor.
        starts: Where each piece begins.
        nameless: Whether no path leads to it (`nameless_file`).
        remote: Of an object of a bucket, where its bytes come from; it has no descriptor.
    """

    path: Path
    descriptor: Descriptor | None
    size: int
    identity: FileIdentity
    begin: int = 0
    pieces: tuple[FileRange, ...] = ()
    starts: tuple[int, ...] = ()
    nameless: bool = False
    remote: Ranges | None = None

    @property
    def opened(self) -> Descriptor:
        """Its descriptor, to be used in a ``with`` statement."""
        assert self.descriptor is not None
        return self.descriptor

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
        if self.pieces:
            at = 0
            for file, start, nbytes in self.ranges(offset, len(buffer)):
                file.read_into(buffer[at : at + nbytes], start)
                at += nbytes
            return
        if self.remote is not None:
            done = self.remote.read_into(buffer, self.begin + offset)
        else:
            with self.opened as fd:
                done = read_all(fd, buffer, self.begin + offset)
        if early := len(buffer) - done:
            raise MalformedError(f"the file ends at byte {offset + done}, {early} bytes early", file=self.path)

    def ranges(self, offset: int, nbytes: int) -> Iterator[tuple[File, int, int]]:
        """``(file, offset, nbytes)`` of the files with descriptors that hold `nbytes` bytes from `offset`: most are one.

        Raises:
            MalformedError: the last piece ends too early.
        """
        if not self.pieces:
            yield self, offset, nbytes
            return
        at, end = self.begin + offset, self.begin + offset + nbytes
        number = max(bisect.bisect_right(self.starts, at) - 1, 0)
        while at < end:
            if number >= len(self.pieces):
                raise MalformedError(f"the pieces end {end - at} bytes early", file=self.path)
            piece, inside = self.pieces[number], at - self.starts[number]
            count = min(piece.nbytes - inside, end - at)
            yield from piece.file.ranges(piece.offset + inside, count)
            at, number = at + count, number + 1

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
        if self.pieces:
            for file in {piece.file.identity: piece.file for piece in self.pieces}.values():
                file.check_unchanged()
            return
        if self.remote is not None:
            self.remote.check_unchanged()
            return
        with self.opened as fd:
            try:
                by_name = identity_of(fd if self.nameless else self.path)
            except OSError as error:
                raise _disappeared(self.path) from error
            if by_name != self.identity or identity_of(fd) != self.identity:
                raise _changed(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class FileRange:
    """A range of a file."""

    file: File
    offset: int
    nbytes: int


def joined_file(pieces: Sequence[FileRange], name: str) -> File:
    """A file that is nowhere: ranges of others, one behind the other. Two of different names are different files.

    Its bytes are read, and copied, from where they lie. It is called by the path of the first.
    """
    sizes = [piece.nbytes for piece in pieces]
    seen = [(*piece.file.identity, piece.offset, piece.nbytes) for piece in pieces]
    digest = hashlib.sha256(repr((name, seen)).encode(errors="surrogatepass")).digest()
    identity = (-1, int.from_bytes(digest[:8]), sum(sizes), int.from_bytes(digest[8:16]))
    starts = tuple(accumulate(sizes, initial=0))[:-1]
    return File(pieces[0].file.path, None, sum(sizes), identity, 0, tuple(pieces), starts)


def nameless_file(data: bytes, path: Path) -> File:
    """A file with this content that is gone with its last use; `path` is what messages call it."""
    fd = memory_file()
    try:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], done)
        return File(path, Descriptor(fd, None), len(data), identity_of(fd), nameless=True)
    except BaseException:
        os.close(fd)
        raise


def memory_file() -> int:
    """A descriptor of a new file without a name, for data that memory holds anyway.

    No folder of temporary files fills up, or keeps what a killed run leaves. Systems that have no such files get one on the
    disk that has lost its name.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("surgery", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def read_all(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`, continuing after short reads; the number of bytes read, less only at the end."""
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], offset + done)):
        done += count
    return done


def identity_of(file: Path | int) -> FileIdentity:
    """What tells a file, by its path or descriptor, from others and from itself once it was written to."""
    if isinstance(file, RemotePath):
        return open_file(file).identity
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_file(path: str | os.PathLike[str]) -> File:
    """Open a regular file for reading.

    Pipes, devices and folders are refused without blocking (O_NONBLOCK, then fstat).

    Raises:
        NotFoundError: the file does not exist or may not be read.
        MalformedError: not a regular file.
    """
    where = to_path(path)
    if isinstance(where, RemotePath):
        return _open_remote(where)
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
    identity = identity_of(fd)
    return File(where, Descriptor(fd, partial(_reopened, where.absolute(), where, identity)), status.st_size, identity)


def _reopened(path: Path, shown: Path, identity: FileIdentity) -> int:
    """A new descriptor of the file that this was.

    Raises:
        ProofError: another one is there now.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _disappeared(shown) from error
    if identity_of(fd) != identity:
        os.close(fd)
        raise _changed(shown)
    return fd


def _disappeared(path: Path) -> ProofError:
    return ProofError("the input disappeared while it was read", file=path, hint="run again")


def _changed(path: Path) -> ProofError:
    return ProofError("the input changed while it was read", file=path, hint="run again")


def _open_remote(path: RemotePath) -> File:
    from surgery_formats.files.remote.ranges import open_remote  # and its library

    ranges = open_remote(path)
    opened = File(path, None, ranges.facts.size, ranges.identity, remote=ranges)
    weakref.finalize(opened, ranges.close)
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
    if isinstance(path, RemotePath):
        return path.is_plain
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
