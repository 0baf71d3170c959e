# SPDX-License-Identifier: Apache-2.0
"""One output file that appears complete or not at all: written to a hidden name, synced, renamed without replacing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery_formats.errors import FitError, NotFoundError, OutputExistsError, ProofError, ResourceError
from surgery_formats.files.equal_ranges import EqualRanges, holds
from surgery_formats.files.output.kernel_copy import (
    exchange,
    rename_new,
    reserve,
    start_writeback,
    sync_folder,
    write_all,
)
from surgery_formats.files.output.manifest import check_output_name
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.output.output_file import WRITEBACK_STEP, output_faults
from surgery_formats.files.output.scratch import scratch_folder, stages_of, sweep
from surgery_formats.files.output.several import may_be_there, same_file
from surgery_formats.files.raw import File
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.text import show
from surgery_formats.whole import whole

__all__ = ["SingleFile", "check_single", "check_writable", "write_single"]

Prove = Callable[[Path], None]


class SingleFile:
    """The file while it is written, by position only, like `OutputFile`."""

    def __init__(self, fd: int, path: Path, shown: Path, nbytes: int) -> None:
        self._fd = fd
        self._shown = shown
        self.path = path
        self.nbytes = nbytes
        self.equal = EqualRanges()
        self._unsynced = 0

    def pwrite(self, data: memoryview | bytes | bytearray, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            ResourceError: the disk is full or failed.
        """
        with output_faults(self._shown, self.nbytes):
            write_all(self._fd, memoryview(data).cast("B"), offset)
            self._unsynced += len(data)
            if self._unsynced >= WRITEBACK_STEP:
                self._unsynced = 0
                start_writeback(self._fd, 0, 0)

    def confirm(self, data: memoryview, offset: int, source: File, source_offset: int) -> None:
        """Read back what lies at `offset`, which must be `data`, and note that it is equal to that range of `source`.

        Args:
            data: As read from `source`.
            offset: Where it was written.
            source: The file that it was read from.
            source_offset: Where it lies there.

        Raises:
            ProofError: the file holds other bytes.
        """
        if not holds(self._fd, data, offset):
            raise ProofError("the disk gives back other bytes than were written", file=self._shown)
        self.equal.add(offset, source, source_offset, len(data))


def write_single(
    out: str | os.PathLike[str],
    job: str,
    nbytes: int,
    fill: Callable[[SingleFile], None],
    *,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    prove: Prove | None = None,
) -> Path:
    """Write the file `out`.

    Such files are small, so nothing is resumed: a killed run leaves at most a hidden ``.<name>.surgery-*`` beside the
    output, and the same job takes it over.

    Args:
        out: Must not exist unless `overwrite`; its parent must.
        job: Hex digest of inputs and options, which identifies the job.
        nbytes: Exact size.
        fill: Writes every byte.
        overwrite: Replace an existing file, atomically.
        inputs: Files and folders that are read; the output must not be one of them, nor lie in one.
        prove: Called with the finished file while it is still hidden; an exception leaves no output.

    Raises:
        NotFoundError: the parent folder does not exist.
        UsageError: the name is too long.
        OutputExistsError: the output exists.
        FitError: the output is an input, lies in one, or is there and no regular file.
        ResourceError: the disk is full or failed.
    """
    if isinstance(remote := to_path(out), RemotePath):
        return _write_object(remote, job, nbytes, fill, overwrite=overwrite, inputs=inputs, prove=prove)
    shown = Path(out)
    final = check_single(shown, overwrite=overwrite, inputs=inputs)
    parent = final.parent
    # The suffix stays last, because readers that prove the hidden file go by it.
    hidden = parent / f".{shown.stem[:150]}.surgery-{job[:16]}{shown.suffix}"
    with output_faults(shown, nbytes):
        fd = _open_hidden(hidden, shown)
        try:
            reserve(fd, nbytes)
            file = SingleFile(fd, hidden, shown, nbytes)
            fill(file)
            with ThreadPoolExecutor(1, "surgery-sync") as pool:  # the disk and the proof do not wait for each other
                synced = pool.submit(os.fsync, fd)
                if prove is not None:
                    with file.equal.known(fd):
                        prove(hidden)
                synced.result()
            _publish(hidden, final, shown, overwrite=overwrite)
            if overwrite and os.path.lexists(hidden):
                _remove_old(hidden, shown)
        except BaseException:
            _give_up(hidden)  # or, where the output is complete already, the old one
            raise
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):  # the output is complete: what other commands began there is of no use any more
        sweep(parent, stages_of(shown.stem[:150], shown.suffix))
    return shown


def check_single(out: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Path:
    """Where the file `out` would lie, if `write_single` can write it; nothing is written.

    Raises:
        NotFoundError, UsageError, OutputExistsError, FitError: as `write_single` does.
    """
    if isinstance(out, RemotePath):
        if any(source in (out, *out.parents) for source in inputs):
            raise FitError("the output is an input, or lies in one", file=out, hint="inputs are never changed")
        if out.exists() and not overwrite:
            raise _exists(out)
        return out
    final = Path(os.path.realpath(out.parent)) / out.name
    if not final.parent.is_dir():
        what = "a file, not a folder to write into" if final.parent.exists() else "no such folder to write into"
        raise NotFoundError(what, file=out.parent)
    check_output_name(final)
    _refuse(final, out, inputs, overwrite=overwrite)
    return final


def check_writable(final: Path, shown: Path) -> None:
    """Refuse a place where no file can be made, by making one without a name beside `final`.

    Rights alone do not tell: root may write anywhere, and yet not into ``/proc`` or what is mounted to be read.

    Raises:
        ResourceError: no file can be made there.
    """
    with output_faults(shown), tempfile.TemporaryFile(prefix=".surgery-", dir=final.parent):
        pass


def _write_object(
    out: RemotePath,
    job: str,
    nbytes: int,
    fill: Callable[[SingleFile], None],
    *,
    overwrite: bool,
    inputs: tuple[Path, ...],
    prove: Prove | None,
) -> Path:
    """An object: made and proved in memory, then uploaded, which is one step."""
    from surgery_formats.files.remote.upload import upload_file

    check_single(out, overwrite=overwrite, inputs=inputs)
    with scratch_folder(memory_folder()) as folder:
        made = write_single(folder / out.name, job, nbytes, fill, prove=prove)
        try:
            upload_file(out.bucket, out.key, made, new=not overwrite)
        except FileExistsError as error:
            raise _exists(out) from error
    return out


def _refuse(final: Path, shown: Path, inputs: tuple[Path, ...], *, overwrite: bool) -> None:
    for source in inputs:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(source, final):
                raise FitError("the output is an input", file=shown, hint="inputs are never changed")
        if source.is_dir() and any(_same(source, folder) for folder in final.parents):
            what = f"the output lies in the input {show(source, 200)}"
            raise FitError(what, file=shown, hint="inputs are never changed")
    if os.path.lexists(final):
        if final.is_dir() or not (overwrite or may_be_there()):
            raise _exists(shown)
        if not stat.S_ISREG(mode := os.lstat(final).st_mode) and not stat.S_ISLNK(mode):
            raise FitError("is no regular file, and is not replaced", file=shown, hint="give another name")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


@whole
def _give_up(hidden: Path) -> None:
    with contextlib.suppress(OSError):  # why it is given up matters more
        hidden.unlink(missing_ok=True)


@whole
def _publish(hidden: Path, final: Path, shown: Path, *, overwrite: bool) -> None:
    """Give the file its name, durably. What it replaces is at `hidden` then, and back if that fails."""
    if overwrite and os.path.lexists(final):
        if not exchange(hidden, final):
            os.replace(hidden, final)
            sync_folder(final.parent)
            return
        try:
            sync_folder(final.parent)
        except BaseException:
            exchange(hidden, final)
            raise
        return
    try:
        rename_new(hidden, final)
    except FileExistsError as error:
        if not (may_be_there() and same_file(final, hidden)):
            raise _exists(shown) from error
        hidden.unlink()
        return
    try:
        sync_folder(final.parent)
    except BaseException:
        os.rename(final, hidden)
        raise


@whole
def _remove_old(hidden: Path, shown: Path) -> None:
    try:
        hidden.unlink()
        sync_folder(hidden.parent)  # or a power cut could bring it back
    except OSError as error:
        raise ResourceError(
            f"the new output is complete, but the old one could not be removed ({error.strerror})",
            file=shown,
            hint=f"remove {show(hidden, 300)} yourself",
        ) from error


@whole
def _open_hidden(hidden: Path, shown: Path) -> int:
    """Open the hidden file, empty and locked; a file left by a killed run is taken over.

    Raises:
        OutputExistsError: another process is writing it.
    """
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.lstat(hidden)):  # its writer finished between the two calls
            raise BlockingIOError
        os.ftruncate(fd, 0)
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise OutputExistsError("another process is writing it", file=shown, hint="wait for it to finish") from error
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):  # nobody holds it: what a killed run left there is written anew anyway
            hidden.unlink()
        raise
    return fd


def _exists(shown: Path) -> OutputExistsError:
    return OutputExistsError("already exists", file=shown, hint="give another name, or `overwrite=True`")
