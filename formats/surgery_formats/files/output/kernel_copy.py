# SPDX-License-Identifier: Apache-2.0
"""What the kernel does better than a loop of ours: copy, reserve, start writing early, swap two names."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from surgery_formats.files.raw import File

__all__ = ["copy_range", "exchange", "rename_new", "reserve", "start_writeback", "sync_folder", "write_all"]

# One copy_file_range call: large enough that the call costs nothing, small enough that Ctrl-C is answered
# within a fraction of a second.
_COPY_STEP = 64 << 20
_BUFFER = 8 << 20  # of the loop that stands in for copy_file_range
# What copy_file_range says when this pair of files, this kernel or this sandbox cannot do it. Anything else
# is a real fault.
_CANNOT_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)
_CANNOT_RESERVE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def _from_libc(name: str, *arguments: Any) -> Callable[..., int] | None:
    """The function `name` of the C library, or None where it has none (other systems, old libraries)."""
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if found is None:
        return None
    found.argtypes = arguments
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


_renameat2 = _from_libc("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_sync_file_range = _from_libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def reserve(fd: int, nbytes: int) -> None:
    """Make `fd` `nbytes` long with its blocks allocated: a full disk shows now, not after an hour of work.

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
    """Copy `nbytes` bytes of `source` into `target_fd`, in the kernel where it can.

    File systems that can share blocks (btrfs, xfs) then copy nothing.

    `sendfile` is no stand-in: it writes at the descriptor's own position, which threads share.

    Raises:
        MalformedError: `source` ends before.
        OSError: the target could not be written.
    """
    done = 0
    while done < nbytes:
        step = min(_COPY_STEP, nbytes - done)
        try:
            copied = os.copy_file_range(source.fd, target_fd, step, source_offset + done, target_offset + done)
        except AttributeError:  # not Linux
            break
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
            break
        if copied == 0:  # the end of the source, or a file system that will not say why: reading tells which
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
    """Every byte of `data` (bytes) at `offset`: short writes go on where they stopped.

    Raises:
        OSError: as `os.pwrite`.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to begin writing these bytes to disk, so that `fsync` finds little left to wait for.

    Only a hint: it promises nothing, and its failure is none.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def sync_folder(fd: int) -> None:
    """Make the entries of an open folder durable, where the file system knows how.

    Raises:
        OSError: the device failed.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems sync folders by themselves
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def rename_new(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Give a file a name nobody has, in one step where the system can; elsewhere there is a moment between the look and the step.

    Raises:
        FileExistsError: the name is taken.
        OSError: any other fault.
    """
    if _renameat2 is not None:
        if _renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
            return
        fault = ctypes.get_errno()
        if fault not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(fault, os.strerror(fault), os.fspath(new))
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
    os.rename(old, new)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swap two names atomically; False where this system or file system cannot.

    Raises:
        OSError: any other fault.
    """
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    fault = ctypes.get_errno()
    if fault in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(fault, os.strerror(fault), os.fspath(other))
