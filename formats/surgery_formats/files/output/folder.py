# SPDX-License-Identifier: Apache-2.0
"""A folder that appears complete or not at all; an identical run resumes where a killed one stopped.

Everything is written into a staging folder beside the output (same file system), which is renamed once all of it is on
disk:

    flock(stage)                                   one writer; the kernel releases the lock when it dies
    per file   name.part -> fsync -> name -> fsync(folder) -> journal line, fsync
    commit     manifest, fsync; remove journal; fsync(every folder); rename(stage, out); fsync(parent)

The stage's name holds the plan's digest, so jobs do not meet. Files that the journal does not list are deleted.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.hashing import hash_threads, new_hash
from surgery_formats.files.output.journal import JOURNAL, Journal, has_size
from surgery_formats.files.output.kernel_copy import sync_folder, write_new
from surgery_formats.files.output.manifest import (
    MANIFEST,
    FileRecord,
    digests_of,
    manifest_bytes,
    safe_name,
)
from surgery_formats.files.output.output_file import OutputFile, output_faults
from surgery_formats.files.output.resume import Finished, remove, same_digest, sweep
from surgery_formats.files.output.stage import Stage
from surgery_formats.files.output.staging import Staging, stage_of
from surgery_formats.files.raw import File
from surgery_formats.files.remote.path import RemotePath
from surgery_formats.text import listing, show
from surgery_formats.whole import whole

if TYPE_CHECKING:
    from surgery_formats.files.remote.stage import RemoteStage
    from surgery_formats.files.remote.upload import Upload

__all__ = ["QUICK", "SIGNED", "FileRecord", "OutputFile", "OutputFolder", "Verify", "output_folder"]

_log = logging.getLogger("surgery.files")

Verify = Callable[[Path, FileRecord], bool]

QUICK = ("xxh3",)
"""Hashes that tell a damaged file, at the price of reading it from memory."""
SIGNED = ("xxh3", "sha256")
"""Those from which a folder has a digest that others can sign; sha256 takes about a second for a GB (docs/verifying.md)."""
_NO_LINK = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP})


def output_folder(
    out: str | os.PathLike[str],
    plan_id: str,
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    verify: Verify | None = None,
    hashes: Sequence[str] = QUICK,
    recorded: str | None = None,
    private: bool = False,
) -> OutputFolder:
    """Return the output folder of one job, for use in a ``with`` statement that ends with `OutputFolder.commit`.

    Args:
        out: Must not exist, or be an empty folder; its parent must exist.
        plan_id: Hex digest of the inputs and options: equal jobs resume each other, different jobs never meet.
        overwrite: Replace an existing folder, atomically.
        inputs: Files and folders that are read; the output must not be, contain, or lie in one of them.
        verify: Checks whether a file that an interrupted run finished is still good. The default compares the hash
            of the whole file.
        hashes: `QUICK`, `SIGNED` or none, of every file that is not written at once; small ones have both.
        recorded: The plan that its manifest will name, where that is another than `plan_id`.
        private: Nobody looks there but for the manifest: in a bucket, weights may appear as they are finished.

    Raises:
        UsageError: the name is that of a file.
    """
    stage = stage_of(out, plan_id, overwrite=overwrite, inputs=inputs, recorded=recorded, private=private)
    return OutputFolder(stage, plan_id, verify, hashes)


class OutputFolder:
    """A staged output folder, see `output_folder`. `create`, `write_small` and all of `OutputFile` are thread-safe.

    Attributes:
        finished: Files that an interrupted, identical run finished. Each is checked at its first lookup and becomes
            part of the output then; files that are never looked up do not.
    """

    finished: Mapping[str, FileRecord]

    def __init__(self, stage: Staging, plan_id: str, verify: Verify | None, hashes: Sequence[str]) -> None:
        self._stage = stage
        self._plan = plan_id
        self._verify = verify or same_digest
        self._lock = threading.RLock()
        self._open: dict[str, OutputFile] = {}
        self._done: dict[str, FileRecord] = {}
        self._taken: set[str] = set()
        self._journal: Journal | None = None
        self._hashes = tuple(hashes)
        self._threads = hash_threads()
        self.finished = self._kept = Finished({}, self._is_good)

    @whole
    def __enter__(self) -> Self:
        self._stage.acquire()
        try:
            with output_faults(self._stage.shown):
                self._recover()
            if noted := self._kept.unclaimed():  # each is checked when it is looked up, and not before
                _log.info("%d files of an earlier run are in %s", len(noted), self._stage.path)
        except BaseException:
            self._leave()
            raise
        return self

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @property
    def shown(self) -> Path:
        """The output as the user wrote it, for messages."""
        return self._stage.shown

    @property
    def staged(self) -> Path:
        """Where finished files lie, under their final names, until the commit."""
        return self._stage.path

    def create(self, name: str, nbytes: int) -> OutputFile:
        """Create the file `name` (``file`` or ``folder/file``) of exactly `nbytes` bytes, and reserve its space.

        Raises:
            FitError: the name is unsafe or already taken.
            ResourceError: no space.
        """
        self._stage.reserve(nbytes)
        path = self._claim(name)
        output = OutputFile(
            name,
            path.with_name(path.name + ".part"),
            self._stage.shown / name,
            nbytes,
            self._publish,
            self._hashes,
            self._threads,
        )
        with self._lock:
            self._open[name] = output
        return output

    @property
    def in_order(self) -> bool:
        """Whether weights are uploaded as they are made, so that they have to come in the order of their files."""
        return not isinstance(self._stage, Stage)

    @property
    def _remote(self) -> RemoteStage:
        from surgery_formats.files.remote.stage import RemoteStage

        assert isinstance(self._stage, RemoteStage)
        return self._stage

    def upload(self, name: str, nbytes: int, *, verify: bool = False, keep: bool = False) -> Upload:
        """As `create` for an output in a bucket, byte by byte in order; it counts once it is `noted`.

        Args:
            name: The file.
            nbytes: Its size.
            verify: Whether it is read back before the output is complete.
            keep: Whether much is still to be done after it, so that a run that is killed should not have to send it again.

        Raises:
            FitError: as `create`.
        """
        self._claim(name)
        return self._remote.upload(name, nbytes, self._hashes, verify=verify, keep=keep)

    def noted(self, name: str, upload: Upload, record: Mapping[str, Any]) -> None:
        """The upload has all its bytes; its hashes go into the manifest beside what is in `record`."""
        digests = {kind: digest for kind, digest in upload.digests.items() if kind in self._hashes}
        noted = FileRecord(name, upload.nbytes, {**record, **digests})
        self._remote.sent(noted)
        with self._lock:
            self._done[name] = noted

    def reread(self, name: str) -> None:
        """A file that was finished before is read again before an output in a bucket is complete."""
        self._remote.reread(self.finished[name])

    def version(self, name: str) -> str | int:
        """What changes when a finished file is written to: its time of modification, or its etag."""
        return self._remote.etag(name) if self.in_order else os.stat(self.staged / name).st_mtime_ns

    def link(self, name: str, source: File) -> None:
        """Hard-link `source` as `name`: no bytes are written, and a write to either file changes both.

        Raises:
            FitError: as `create`, or `source` lies on another file system.
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

    def take(self, source: Path, record: FileRecord) -> bool:
        """Let a file that another process wrote and proved be the file of `record`, which `finished` has then.

        It is hard-linked, so `source` stays what it is until this folder is committed or given up, and no bytes are moved. A
        bucket makes a copy of it when this folder is committed.

        Returns:
            False where that cannot be done: the file system has no links, or `source` is of another one or of another user; the
            store does not copy that much.

        Raises:
            FitError, ResourceError: as `create`.
        """
        path = self._claim(record.name)
        if isinstance(source, RemotePath):
            return self._kept_if(self._remote.take(source, record), record)
        with output_faults(self._stage.shown / record.name):
            try:
                os.link(source, path, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                return self._kept_if(False, record)
        return self._kept_if(True, record)

    def _kept_if(self, taken: bool, record: FileRecord) -> bool:
        with self._lock:
            self._kept.add(record) if taken else self._taken.discard(record.name)
        return taken

    def write_small(self, name: str, data: bytes) -> None:
        """Write a small file at once. It has no journal line: a resumed run writes it again.

        Raises:
            FitError, ResourceError: as `create`.
        """
        self._claim(name)
        self._put(name, data)
        with self._lock:
            self._done[name] = FileRecord(name, len(data), digests_of(data))

    def write_made(self, name: str, nbytes: int, pieces: Iterable[bytes | memoryview]) -> None:
        """As `write_small` for a file that is made piece by piece.

        Raises:
            FitError, ResourceError: as `create`; what `pieces` raises.
        """
        self._stage.reserve(nbytes)
        path, states = self._claim(name), {kind: new_hash(kind) for kind in SIGNED}

        def hashed() -> Iterator[bytes | memoryview]:
            for piece in pieces:
                for state in states.values():
                    state.update(piece)
                yield piece

        with output_faults(self._stage.shown / name, nbytes):
            size = _write_whole(path, hashed())
        with self._lock:
            self._done[name] = FileRecord(name, size, {kind: state.hexdigest() for kind, state in states.items()})

    def record(self, name: str) -> FileRecord:
        """The record of a file that is finished.

        Raises:
            KeyError: it is not.
        """
        return self._done[name] if name in self._done else self._kept[name]

    @whole
    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and rename the folder to its final name. Nothing can be added afterwards.

        Raises:
            ProofError: a file was created but not finished.
            OutputExistsError: the output was created by another process meanwhile.
            ResourceError: the disk is full or failed.
        """
        if self._open:
            raise ProofError(f"never finished: {listing(sorted(self._open))}", file=self._stage.shown)
        files = {**self._kept.claimed(), **self._done}
        data = manifest_bytes(manifest, self._plan, files)
        with output_faults(self._stage.shown):
            for name in self._kept.unclaimed():
                self._discard(name)
            self._put(MANIFEST, data)
            _log.debug("%d files are complete in %s", len(files), self._stage.path)
            self._opened_journal.remove()
            for folder in sorted({Path(name).parent for name in files} - {Path()}):
                sync_folder(self._stage.path / folder)
            return self._stage.publish()

    def _claim(self, name: str) -> Path:
        """Reserve `name` and return its path; removes what an earlier run left there."""
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

    @whole
    def _put(self, name: str, data: bytes) -> None:
        with output_faults(self._stage.shown / name, len(data)):
            _write_whole(self._stage.path / name, [data])

    @whole
    def _publish(self, output: OutputFile, details: Mapping[str, Any]) -> None:
        """Rename a synced file and write its journal line; called by `OutputFile.finish`."""
        record = FileRecord(output.name, output.nbytes, dict(details))
        target = self._stage.path / output.name
        os.rename(output.path, target)
        if target.parent != self._stage.path:
            sync_folder(target.parent)
        self._stage.sync()
        self._opened_journal.note(record)
        with self._lock:
            self._done[output.name] = record
            self._open.pop(output.name, None)

    def _recover(self) -> None:
        """Open the journal and delete everything in the stage that it does not list."""
        self._journal = Journal.open(self._stage.path, self._plan)
        noted = self._journal.noted()
        sweep(self._stage.path, {JOURNAL, *noted})
        if self.in_order:
            noted |= self._remote.recalled()
        self.finished = self._kept = Finished(noted, self._is_good)

    def _is_good(self, record: FileRecord) -> bool:
        if self.in_order:  # its etag was compared
            return {*self._hashes} <= {*record.record}
        path = self._stage.path / record.name
        return has_size(path, record.size) and {*self._hashes} <= {*record.record} and self._verify(path, record)

    def _discard(self, name: str) -> None:
        if self.in_order:
            self._remote.discard(name)
            return
        path = self._stage.path / name
        remove(path)
        if path.parent != self._stage.path and not os.listdir(path.parent):
            os.rmdir(path.parent)

    @property
    def _opened_journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _leave(self) -> None:
        """Close every descriptor and remove the stage, unless it became the output."""
        for output in list(self._open.values()):
            output.abandon()
        self._threads.shutdown(cancel_futures=True)
        for output in list(self._open.values()):
            output.close()
        if self._journal is not None:
            self._journal.close()
        self._stage.release()


def _write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write a file that has its name when all of it is on the disk; returns its size."""
    part = path.with_name(path.name + ".part")
    size = write_new(part, pieces)
    os.rename(part, path)
    return size
