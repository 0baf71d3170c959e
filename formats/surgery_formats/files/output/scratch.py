# SPDX-License-Identifier: Apache-2.0
"""Folders for what is gone afterwards, and the removal of what killed runs left, or its use by the same command.

Whoever uses a hidden file or folder holds a lock on it, which the kernel gives up at death: what nobody locks is litter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from surgery_formats.errors import OutputExistsError, ResourceError, SurgeryError
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.whole import whole

__all__ = ["OF_FILES", "hidden_beside", "kept_folder", "scratch_folder", "stages_of", "sweep"]

_NAME = re.compile(r"\.surgery-scratch-[0-9a-f]{16}\Z")
_ATTEMPTS = 100
_NAME_LIMIT = 200  # bytes of the output's name inside a hidden one; file systems stop at 255
OF_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".onnx", ".onnx_adapter")
"""How the names of single files end."""


@contextlib.contextmanager
@whole
def scratch_folder(beside: Path | None) -> Iterator[Path]:
    """A new hidden folder, removed at the end whatever happens; one that a killed run left there goes first.

    Args:
        beside: The folder to make it in, on the disk of an output; None, or one that does not exist, for the system's folder
            of temporary files.

    Raises:
        ResourceError: it cannot be made.
    """
    parent = beside if beside is not None and beside.is_dir() else Path(tempfile.gettempdir())
    with output_faults(parent):
        sweep(parent, _NAME)
        path, fd = _made(parent)
    try:
        with _unnamed(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def hidden_beside(out: Path, job: str) -> Path:
    """The hidden name of what belongs to the output `out`: one that is swept when any command has completed it."""
    if out.suffix in OF_FILES:
        return out.parent / f".{out.stem[:150]}.surgery-{job[:16]}{out.suffix}"
    return out.parent / f".{os.fsdecode(os.fsencode(out.name)[:_NAME_LIMIT])}.surgery-{job[:16]}"


@contextlib.contextmanager
@whole
def kept_folder(path: Path, shown: Path, last: str) -> Iterator[Path]:
    """The hidden folder `path`, new or as a killed run left it, removed at the end whatever happens.

    Args:
        path: Its parent must exist.
        shown: The output that it belongs to, for messages.
        last: The name in it that is removed last, so that what it tells of is told until there is nothing else.

    Raises:
        OutputExistsError: another process uses it.
        ResourceError: it cannot be made, or belongs to another user.
    """
    with output_faults(shown):
        fd = _taken(path, shown)
    try:
        with _unnamed(path):
            yield path
    finally:
        for name in os.listdir(path):
            if name != last:
                inner = path / name
                shutil.rmtree(inner, ignore_errors=True) if inner.is_dir() else inner.unlink()
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


@contextlib.contextmanager
def _unnamed(path: Path) -> Iterator[None]:
    """Errors inside do not name this folder, which nobody knows, and which is gone when the message is read."""
    try:
        yield
    except SurgeryError as error:
        inside = f"{error.file or ''}{os.sep}".removeprefix(f"{path}{os.sep}").removesuffix(os.sep)
        if inside != (error.file or ""):
            error.file = os.fspath(path.parent) if isinstance(error, ResourceError) or not inside else inside
        raise


def _taken(path: Path, shown: Path) -> int:
    """A descriptor that holds the lock of the folder `path`, which is there then."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            fd = _locked(path)
        except BaseException:
            with contextlib.suppress(OSError):  # what a killed run left is not empty, and stays
                os.rmdir(path)
            raise
        if fd is not None:
            if os.fstat(fd).st_uid != os.geteuid():
                os.close(fd)
                raise ResourceError("belongs to another user", file=path, hint="remove it, or write elsewhere")
            return fd
        if path.is_dir():
            raise OutputExistsError("another process is writing it", file=shown, hint="wait until it has finished")
    raise ResourceError("other processes keep writing it", file=shown)


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder, and a descriptor that holds its lock."""
    for _ in range(_ATTEMPTS):
        path = parent / f".surgery-scratch-{secrets.token_hex(8)}"
        os.mkdir(path, 0o700)
        try:
            fd = _locked(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise
        if fd is not None:
            return path, fd
    raise ResourceError("other processes keep removing what is made in it", file=parent)


def stages_of(name: str, suffix: str = "") -> re.Pattern[str]:
    """The hidden names under which commands write the output `name`."""
    return re.compile(re.escape(f".{name}.surgery-") + r"[0-9a-f]{16}" + re.escape(suffix) + r"\Z")


def sweep(parent: Path, names: re.Pattern[str]) -> None:
    """Remove the files and folders of `parent` with these names that no process locks; whatever cannot be removed stays."""
    for name in os.listdir(parent):
        if not names.match(name):
            continue
        path = parent / name
        with contextlib.suppress(OSError):
            if (fd := _locked(path)) is None:
                continue
            try:
                if os.fstat(fd).st_uid != os.geteuid():
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(fd)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of `path`; None if another process does, or it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
