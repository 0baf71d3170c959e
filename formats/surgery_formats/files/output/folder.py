# SPDX-License-Identifier: Apache-2.0
"""A folder that appears complete or not at all; an identical run goes on where a killed one stopped.

Everything is written below a staging folder beside the output (same file system), which is renamed when all
of it is on disk:

    flock(stage)                                   one writer; the kernel lets go when it dies
    per file   name.part -> fsync -> name -> fsync(folder) -> journal line, fsync
    commit     manifest, fsync; journal away; fsync(every folder); rename(stage, out); fsync(parent)

The stage's name holds the plan's digest, so another job never sees it. Whatever its journal does not vouch
for is deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.kernel_copy import sync_folder, write_all
from surgery_formats.files.output.manifest import (
    MANIFEST,
    FileRecord,
    manifest_bytes,
    safe_name,
    verify_folder,
)
from surgery_formats.files.output.output_file import OutputFile, check_disk, output_faults
from surgery_formats.files.output.resume import Finished, has_size, parse_line, same_digest
from surgery_formats.files.output.stage import Stage
from surgery_formats.files.raw import File
from surgery_formats.text import listing, show

__all__ = [
    "FileRecord",
    "OutputFile",
    "OutputFolder",
    "Verify",
    "check_disk",
    "output_folder",
    "verify_folder",
]

Verify = Callable[[Path, FileRecord], bool]

_JOURNAL = ".surgery-journal"


def output_folder(
    out: str | os.PathLike[str],
    plan_id: str,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    verify: Verify | None = None,
) -> OutputFolder:
    """The output folder of one job: use it in a ``with`` statement and end with `OutputFolder.commit`.

    Args:
        out: Must not exist, or be an empty folder; its parent must exist.
        plan_id: Hex digest of the inputs and options: equal jobs resume each other, others never meet.
        overwrite: Replace an existing folder, atomically.
        inputs: Files and folders that are read; the output may not be, hold, or lie in one of them.
        verify: Says whether a file that an interrupted run finished is still good; without it, its whole-file
            hash does.
    """
    return OutputFolder(Stage(out, plan_id, overwrite=overwrite, inputs=inputs), plan_id, verify)


class OutputFolder:
    """See `output_folder`. Any thread may call `create`, `write_small` and everything of `OutputFile`.

    Attributes:
        finished: Files that an earlier, interrupted, identical run finished; each is checked when it is first
            looked up, and is part of the output from then on. Those never looked up are not.
    """

    finished: Mapping[str, FileRecord]

    def __init__(self, stage: Stage, plan_id: str, verify: Verify | None) -> None:
        self._stage = stage
        self._plan = plan_id
        self._verify = verify or same_digest
        self._lock = threading.RLock()
        self._open: dict[str, OutputFile] = {}
        self._done: dict[str, FileRecord] = {}
        self._taken: set[str] = set()
        self._journal = -1
        self.finished = self._kept = Finished({}, self._is_good)

    def __enter__(self) -> Self:
        self._stage.acquire()
        try:
            with output_faults(self._stage.shown):
                self._recover()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @property
    def staged(self) -> Path:
        """Where finished files lie until the commit, under their final names."""
        return self._stage.path

    def create(self, name: str, nbytes: int) -> OutputFile:
        """A new file of `nbytes` bytes, its space reserved.

        Args:
            name: ``file`` or ``folder/file``.
            nbytes: Its exact size.

        Raises:
            FitError: not a safe name, or the name is taken.
            ResourceError: no space.
        """
        path = self._claim(name)
        made = OutputFile(name, path.with_name(path.name + ".part"), self._stage.shown / name, nbytes, self._publish)
        with self._lock:
            self._open[name] = made
        return made

    def link(self, name: str, source: File) -> None:
        """Another name for `source`, a hard link: no bytes are written, and whoever writes into one writes into both.

        Raises:
            FitError: as `create`, or it lies on another file system.
        """
        path = self._claim(name)
        try:
            os.link(os.path.realpath(source.path), path)
        except OSError as error:
            raise FitError(
                f"cannot be linked to ({error.strerror})", file=source.path, hint="copy it instead"
            ) from error
        source.check_unchanged()
        with self._lock:
            self._done[name] = FileRecord(name, source.size, {})

    def write_small(self, name: str, data: bytes) -> None:
        """A small file at once. It is not worth a journal line: a resumed run writes it again.

        Raises:
            FitError, ResourceError: as `create`.
        """
        self._claim(name)
        self._put(name, data)
        with self._lock:
            self._done[name] = FileRecord(name, len(data), {"xxh3": xxhash.xxh3_128_hexdigest(data)})

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and give the folder its name. Nothing can be added afterwards.

        Raises:
            ProofError: a file was begun and not finished.
            OutputExistsError: the output appeared meanwhile.
            ResourceError: the disk did not take it.
        """
        if self._open:
            raise ProofError(f"never finished: {listing(sorted(self._open))}", file=self._stage.shown)
        files = {**self._kept.claimed(), **self._done}
        data = manifest_bytes(manifest, self._plan, files)
        with output_faults(self._stage.shown):
            for name in self._kept.unclaimed():
                self._discard(name)
            self._put(MANIFEST, data)
            self._close_journal()
            os.unlink(self._stage.path / _JOURNAL)
            for folder in sorted({Path(name).parent for name in files} - {Path()}):
                _sync_folder(self._stage.path / folder)
            return self._stage.publish()

    def _claim(self, name: str) -> Path:
        """Where the new file `name` goes; what an earlier run left there is gone afterwards."""
        parts = safe_name(name)
        path = self._stage.path.joinpath(*parts)
        with self._lock, output_faults(self._stage.shown / name):
            if name in self._taken:
                raise FitError(f"two output files are called '{show(name)}'", file=self._stage.shown)
            self._taken.add(name)
            if self._kept.forget(name):
                self._discard(name)
            if len(parts) == 2 and not path.parent.is_dir():
                os.mkdir(path.parent)
        return path

    def _put(self, name: str, data: bytes) -> None:
        path = self._stage.path / name
        part = path.with_name(path.name + ".part")
        with output_faults(self._stage.shown / name, len(data)):
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                write_all(fd, memoryview(data), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(part, path)

    def _publish(self, made: OutputFile, record: Mapping[str, Any]) -> None:
        """Rename a synced file and write its journal line; called by `OutputFile.finish`."""
        found = FileRecord(made.name, made.nbytes, dict(record))
        entry = {"plan": self._plan, "name": found.name, "size": found.size, "record": found.record}
        # A line begins with a line break: one torn by a kill cannot swallow the next.
        line = b"\n" + json.dumps(entry, sort_keys=True, allow_nan=False).encode() + b"\n"
        target = self._stage.path / made.name
        os.rename(made.path, target)
        if target.parent != self._stage.path:
            _sync_folder(target.parent)
        self._stage.sync()
        with self._lock:
            write_all(self._journal, memoryview(line), os.fstat(self._journal).st_size)
        os.fsync(self._journal)
        with self._lock:
            self._done[made.name] = found
            self._open.pop(made.name, None)

    def _recover(self) -> None:
        """Open the journal and delete everything in the stage that it does not vouch for."""
        self._journal = os.open(
            self._stage.path / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
        noted: dict[str, FileRecord] = {}
        for line in os.pread(self._journal, os.fstat(self._journal).st_size, 0).split(b"\n"):
            found = parse_line(line, self._plan)
            if found is not None and has_size(self._stage.path / found.name, found.size):
                noted[found.name] = found
        kept = {_JOURNAL, *noted}
        folders = {name.split("/")[0] for name in noted if "/" in name}
        for name in os.listdir(self._stage.path):
            if name in folders:
                for inner in os.listdir(self._stage.path / name):
                    if f"{name}/{inner}" not in kept:
                        _remove(self._stage.path / name / inner)
            elif name not in kept:
                _remove(self._stage.path / name)
        self.finished = self._kept = Finished(noted, self._is_good)

    def _is_good(self, found: FileRecord) -> bool:
        path = self._stage.path / found.name
        return has_size(path, found.size) and self._verify(path, found)

    def _discard(self, name: str) -> None:
        path = self._stage.path / name
        _remove(path)
        if path.parent != self._stage.path and not os.listdir(path.parent):
            os.rmdir(path.parent)

    def _close_journal(self) -> None:
        fd, self._journal = self._journal, -1
        if fd >= 0:
            os.close(fd)

    def _leave(self) -> None:
        """Give every descriptor back; the stage goes too unless it became the output."""
        for made in list(self._open.values()):
            made.close()
        self._close_journal()
        self._stage.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_folder(fd)
    finally:
        os.close(fd)
