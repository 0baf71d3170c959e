# SPDX-License-Identifier: Apache-2.0
"""The hidden folder beside an output: one writer; renamed to the output in one step, or removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from surgery_formats.errors import FitError, NotFoundError, OutputExistsError, ResourceError
from surgery_formats.files.output.kernel_copy import exchange, sync_folder
from surgery_formats.files.output.manifest import MANIFEST, check_output_name
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.files.output.scratch import stages_of, sweep
from surgery_formats.files.output.several import is_of_plan, may_be_there, same_folder
from surgery_formats.text import show
from surgery_formats.whole import whole

__all__ = ["Stage"]

_PLAN = re.compile(r"[0-9a-f]{16,}\Z")
_NAME_LIMIT = 200  # bytes of the output's name inside the stage's name; file systems stop at 255
# Attempts to lock a stage that other processes keep finishing; each failure means that another one made progress.
_ATTEMPTS = 100
# Errors of rename when the folder's new name is in use. POSIX rename replaces an empty folder but nothing more, so it
# destroys nothing.
_IN_USE = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_Identity = tuple[int, int]


class Stage:
    """Where the files of one job lie until they are complete.

    Attributes:
        shown: The output path as the user wrote it.
        path: The staging folder.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        plan_id: str,
        *,
        overwrite: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        recorded: str | None = None,
    ) -> None:
        if not _PLAN.match(plan_id):
            raise ValueError("plan_id is not a hex digest")
        self.shown = Path(out)
        absolute = Path(os.path.realpath(self.shown)) if self.shown.name in ("", "..") else self.shown
        self._parent = Path(os.path.realpath(absolute.parent))
        self._final = self._parent / absolute.name
        name = os.fsdecode(os.fsencode(absolute.name)[:_NAME_LIMIT])
        self.path = self._parent / f".{name}.surgery-{plan_id[:16]}"
        self._others = stages_of(name)
        self._aside = self._parent / f"{self.path.name}.old"
        self._overwrite = overwrite
        self._inputs = [Path(path) for path in inputs]
        self._recorded = recorded or plan_id
        self._parent_fd = self._fd = -1

    @whole
    def acquire(self) -> None:
        """Create the stage, or take over one that a killed run left.

        Raises:
            NotFoundError: the parent folder does not exist.
            UsageError: the name is too long.
            FitError: the output overlaps an input.
            OutputExistsError: the output exists, or another process is writing it.
            ResourceError: the parent cannot be written.
        """
        self.check()
        try:
            with output_faults(self.shown):
                # Opened now, so that nothing after the rename can fail for lack of descriptors.
                self._parent_fd = os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._lock()
                self._put_back()
                self._refuse_existing()  # another process may just have written it
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Refuse an output that could not be written, as of now; nothing is touched.

        Raises:
            NotFoundError, UsageError, FitError, OutputExistsError: as `acquire`.
        """
        if not self._parent.is_dir():
            if self._parent.exists():
                raise NotFoundError("a file, not a folder to write into", file=self.shown.parent)
            raise NotFoundError(
                "no such folder to write into",
                file=self.shown.parent,
                hint=f"mkdir -p {show(self.shown.parent, 200)}",
            )
        check_output_name(self._final)
        self._refuse_unsafe()
        self._refuse_existing()

    @whole
    def release(self) -> None:
        """Remove the stage, unless it became the output, and release the lock; may be called twice."""
        try:
            if self._fd >= 0 and _names(self.path, self._fd):
                # anything left over is hidden, and the next identical run removes it
                _remove_all(self.path)
        finally:
            self._fd = _close(self._fd)
            self._parent_fd = _close(self._parent_fd)

    def reserve(self, nbytes: int) -> None:
        """The disk says what it has no space for."""

    def sync(self) -> None:
        """Make the stage's own entries durable."""
        sync_folder(self._fd)

    @whole
    def publish(self) -> Path:
        """Rename the stage to the output.

        Raises:
            OutputExistsError: the output exists and may not be replaced.
            OSError: the rename or the sync failed.
        """
        self.sync()
        old: Path | None = None
        try:
            os.rename(self.path, self._final)
        except OSError as error:
            if error.errno not in _IN_USE:
                raise
            if not self._overwrite or not _is_folder(self._final):
                if may_be_there() and same_folder(self._final, self.path):
                    return self._final
                raise self._exists() from error
            self._refuse_unsafe()
            old = self._swap()
        try:
            sync_folder(self._parent_fd)
        except BaseException:
            self._undo(old)
            raise
        if old is not None:
            self._remove_old(old)
        with contextlib.suppress(
            OSError
        ):  # the output is complete: what other commands began there is of no use any more
            sweep(self._parent, self._others)
        return self._final

    def _undo(self, old: Path | None) -> None:
        """Undo the rename: a failing run leaves what was there before."""
        if old != self.path:
            os.rename(self._final, self.path)
            if old is not None:
                os.rename(old, self._final)
        elif not exchange(self.path, self._final):
            raise ResourceError(
                "the output it replaced could not be put back",
                file=self.shown,
                hint=f"it is {show(old, 300)}",
            )

    def _swap(self) -> Path:
        """Swap the stage with the existing output; returns where the old output is now."""
        if exchange(self.path, self._final):
            return self.path
        # Two steps where the system cannot swap (some network file systems): a kill between them leaves no output,
        # and the next identical run restores the old one before it starts.
        os.rename(self._final, self._aside)
        try:
            os.rename(self.path, self._final)
        except OSError:
            os.rename(self._aside, self._final)
            raise
        return self._aside

    def _remove_old(self, old: Path) -> None:
        try:
            shutil.rmtree(old)
            sync_folder(self._parent_fd)  # or a power cut could bring it back
        except OSError as error:
            raise ResourceError(
                f"the new output is complete, but the old one could not be removed ({error.strerror})",
                file=self.shown,
                hint=f"remove {show(old, 300)} yourself",
            ) from error

    def _put_back(self) -> None:
        """Finish a two-step replacement that was killed halfway."""
        if _is_folder(self._aside):
            if os.path.lexists(self._final):
                shutil.rmtree(self._aside)
            else:
                os.rename(self._aside, self._final)

    def _lock(self) -> None:
        """Take the exclusive lock on the folder now at `path`, not on one renamed or removed meanwhile."""
        for _ in range(_ATTEMPTS):
            is_new = True
            try:
                os.mkdir(self.path)
            except FileExistsError:
                is_new = False
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError as error:
                self._fd = _close(self._fd)
                raise OutputExistsError(
                    "another process is writing it", file=self.shown, hint="wait until it has finished"
                ) from error
            except BaseException:
                self._fd = _close(self._fd)
                if is_new:
                    # report the first fault; only an empty folder is left behind
                    with contextlib.suppress(OSError):
                        os.rmdir(self.path)
                raise
            if _names(self.path, self._fd):
                if not is_new and os.fstat(self._fd).st_uid != os.geteuid():
                    self._fd = _close(self._fd)
                    raise ResourceError("belongs to another user", file=self.path, hint="remove it, or write elsewhere")
                return
            self._fd = _close(self._fd)
        raise ResourceError("other processes keep writing it", file=self.shown)

    def _exists(self) -> OutputExistsError:
        if self._overwrite:
            return OutputExistsError(
                "exists and is not a folder", file=self.shown, hint="remove it, or write elsewhere"
            )
        return OutputExistsError(
            "already exists", file=self.shown, hint="use `overwrite=True` to replace it, or write elsewhere"
        )

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self._final):
            return
        if not _is_folder(self._final) or (not self._overwrite and _has_entries(self._final)):
            if may_be_there() and is_of_plan(self._final, self._recorded):
                return
            raise self._exists()
        if _has_entries(self._final) and not (self._final / MANIFEST).is_file():
            raise OutputExistsError(
                "this folder was not written by surgery, so it is not replaced",
                file=self.shown,
                hint="remove it yourself, or write to another folder",
            )

    def _refuse_unsafe(self) -> None:
        """Refuse an output that overlaps an input. Folders compare by identity: links and case give them many names."""
        final = Path(os.path.realpath(self._final))
        for named in self._inputs:
            source = Path(os.path.realpath(named))
            output_id, input_id = _identity(final), _identity(source)
            hint = "write to a folder outside the inputs"
            if source == final or (output_id is not None and output_id == input_id):
                raise FitError("the output is one of the inputs", file=self.shown, hint=hint)
            if output_id is not None and output_id in map(_identity, source.parents):
                raise FitError(f"the output holds the input {show(named, 200)}", file=self.shown, hint=hint)
            if input_id is not None and input_id in map(_identity, final.parents):
                raise FitError(f"the output lies in the input {show(named, 200)}", file=self.shown, hint=hint)
        output_id = _identity(final)
        replaces = self._overwrite or (_is_folder(final) and not _has_entries(final))
        if output_id is not None and replaces:
            for name in (os.curdir, os.path.expanduser("~")):
                protected = Path(os.path.realpath(name))
                if output_id in map(_identity, (protected, *protected.parents)):
                    raise FitError(
                        "this folder contains the working folder or a home folder",
                        file=self.shown,
                        hint="write to another folder",
                    )


def _identity(path: Path) -> _Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _names(path: Path, fd: int) -> bool:
    """Whether `path` is still the folder open as `fd`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def _remove_all(path: Path) -> None:
    """Remove a folder that threads of an interrupted run may still write into."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.001)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _has_entries(path: Path) -> bool:
    with output_faults(path), os.scandir(path) as entries:
        return next(entries, None) is not None


def _close(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
