# SPDX-License-Identifier: Apache-2.0
"""System calls that beat a loop in Python: copy, reserve, start writeback early, swap two names."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from surgery_formats.files.raw import File

__all__ = [
    "copy_range",
    "exchange",
    "rename_new",
    "reserve",
    "start_writeback",
    "sync_folder",
    "write_all",
    "write_new",
]

# Bytes per copy_file_range call: large enough to hide its cost, small enough for a quick reaction to Ctrl-C.
_COPY_STEP = 64 << 20
# Bytes per pwrite: Linux takes pages of the cache as large as a call is long, and those of 1 MiB cost it five times as
# much as these (6.18, ext4: 1.2 s of processor time for a GB in place of 0.25).
_WRITE_STEP = 256 << 10
_BUFFER = 8 << 20  # of the loop used where copy_file_range does not work
# Errors of copy_file_range on a kernel, sandbox or pair of files that it does not support. Others are real faults.
_CANNOT_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)
_CANNOT_RESERVE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def _from_libc(name: str, *arguments: Any) -> Callable[..., int] | None:
    """Return the C library's function `name`, or None if it is missing (other systems, old libraries)."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, name):
        return None
    function = library[name]
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return function


_renameat2 = _from_libc("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_sync_file_range = _from_libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def reserve(fd: int, nbytes: int) -> None:
    """Extend `fd` to `nbytes` bytes with its blocks allocated, so that a full disk shows at once.

    Raises:
        OSError: ENOSPC, EDQUOT, EFBIG.
    """
    if nbytes == 0:
        return
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(fd, nbytes)
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        os.ftruncate(fd, nbytes)


def copy_range(source: File, source_offset: int, target_fd: int, target_offset: int, nbytes: int) -> None:
    """Copy `nbytes` bytes of `source` into `target_fd`, in the kernel where possible.

    File systems that can share blocks (btrfs, xfs) copy nothing. `sendfile` is not an alternative: it writes at the
    descriptor's position, which threads share.

    Raises:
        MalformedError: `source` ends too early.
        OSError: the target could not be written.
    """
    done = 0
    while done < nbytes:
        step = min(_COPY_STEP, nbytes - done)
        if source.descriptor is None:  # an object of a bucket
            break
        at = source.begin + source_offset + done
        try:
            with source.descriptor as fd:
                copied = os.copy_file_range(fd, target_fd, step, at, target_offset + done)
        except AttributeError:  # not Linux
            break
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
            break
        if copied == 0:  # the end of the source, or an unsupported file system: reading tells which
            break
        start_writeback(target_fd, target_offset + done, copied)
        done += copied
    buffer = memoryview(bytearray(min(_BUFFER, nbytes - done)))
    while done < nbytes:
        block = buffer[: nbytes - done]
        source.read_into(block, source_offset + done)
        write_all(target_fd, block, target_offset + done)
        start_writeback(target_fd, target_offset + done, len(block))
        done += len(block)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`, in pieces, continuing after short writes.

    Raises:
        OSError: as `os.pwrite`.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + _WRITE_STEP], offset + done)


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write a file that is not there yet, piece by piece, and sync it.

    Returns:
        Its size in bytes.

    Raises:
        OSError: as `os.open` and `os.pwrite`; what `pieces` raises.
    """
    size = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            write_all(fd, memoryview(piece), size)
            size += len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return size


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to start writing these bytes to disk, so that a later `fsync` is short.

    Only a hint: failures are ignored.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def sync_folder(folder: int | Path) -> None:
    """Make the entries of a folder, open or not, durable, where the file system supports it.

    Raises:
        OSError: the device failed.
    """
    if isinstance(folder, Path):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return sync_folder(fd)
        finally:
            os.close(fd)
    try:
        os.fsync(folder)
    except OSError as error:
        # some network file systems sync folders by themselves
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def rename_new(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Rename without replacing: atomic on Linux, elsewhere a check followed by the rename.

    Raises:
        FileExistsError: `new` exists.
        OSError: any other fault.
    """
    if _rename_with(_RENAME_NOREPLACE, old, new):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
    os.rename(old, new)


def exchange(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Swap two names atomically; False if the system or file system does not support it.

    Raises:
        OSError: any other fault.
    """
    return _rename_with(_RENAME_EXCHANGE, first, second)


def _rename_with(flag: int, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> bool:
    """Whether the system and the file system know `flag`, and the rename is done."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    fault = ctypes.get_errno()
    if fault in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(fault, os.strerror(fault), os.fspath(new))
