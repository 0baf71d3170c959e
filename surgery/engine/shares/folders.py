# SPDX-License-Identifier: Apache-2.0
"""Shares as folders beside the output: each appears complete or not at all, and a rerun resumes it, as any output.

.OUT.surgery-<job>.share-<i>-of-<n>/    what the worker computed, surgery_manifest.json

A share of other work has another name, so that it is never taken for one of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.execute import Run
from surgery.engine.shares.work import Work, WorkRequest, absolute
from surgery_formats.errors import FitError, OutputExistsError, ProofError, SurgeryError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.raw import File
from surgery_formats.files.remote.hub_cache import hub_file
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.text import listing, show

__all__ = ["Assignment", "Shares", "assignments", "finished_shares", "is_finished", "job_of", "write_share"]

_log = logging.getLogger("surgery.shares")

_PATIENCE = 60.0  # seconds in which the lock of a worker that was lost must be gone
_LONGEST = 120  # bytes of the output's name in that of a share


@dataclass(frozen=True, slots=True)
class Assignment:
    """One share for one worker, in plain values.

    Attributes:
        request: What to plan.
        work: The id that it must have.
        job: What `job_of` says where the driver planned it.
        index: Which share, from 0.
        count: How many there are.
        output: Of the whole command; the share is written beside it.
        verify: See `Run.verify_copies`: a share that is files of the output has its hashes.
        version: Of the program that planned.
    """

    request: WorkRequest
    work: str
    job: str
    index: int
    count: int
    output: str
    verify: bool = False
    version: str = __version__

    @property
    def folder(self) -> Path:
        """Where the share lies."""
        return _folder(self.job, to_path(self.output), self.index, self.count)


def assignments(
    request: WorkRequest, work: Work, output: str | os.PathLike[str], count: int, *, verify: bool = False
) -> tuple[Assignment, ...]:
    """All shares of a work, for a command with this `Run.verify_copies`.

    Raises:
        FitError: there are none.
    """
    if count < 1:
        raise FitError(f"there is no work in {count} shares")
    text = os.fspath(output)
    place = text if isinstance(to_path(text), RemotePath) else absolute(text)
    job = job_of(work, verify=verify)
    return tuple(Assignment(request, work.id, job, index, count, place, verify) for index in range(count))


def write_share(assignment: Assignment, run: Run | None = None, plan: Callable[[], Work] | None = None) -> Path:
    """Plan again, and write a share, unless that was done before.

    Args:
        assignment: Which share.
        run: How.
        plan: The request's work, by whoever keeps it; None asks the request.

    Returns:
        The folder of the share.

    Raises:
        ProofError: planned here it is other work, or work on other files.
        SurgeryError: as the command; nothing is left behind.
    """
    if assignment.version != __version__:
        raise ProofError(
            f"a worker has version {__version__} of surgery, and the driver {show(assignment.version, 40)}",
            hint="install the same version everywhere",
        )
    work = (plan or assignment.request.work)()
    if work.id != assignment.work:
        raise ProofError(
            f"planned by a worker, it is other work ({work.id[:16]} instead of {assignment.work[:16]})",
            hint="inputs, options and plugins must be the same everywhere",
        )
    if job_of(work, verify=assignment.verify) != assignment.job:
        raise ProofError(
            "a worker sees inputs of other sizes or times of modification",
            hint="all must read the same files of one file system, or one bucket",
        )
    index, count, folder = assignment.index, assignment.count, assignment.folder
    run = replace(run or Run(), verify_copies=assignment.verify)
    hashes = run.hashes if work.makes_files else ()  # what else a share holds has hashes of its own
    until = time.monotonic() + _PATIENCE
    while not is_finished(folder):
        _clear_remains(folder)
        try:
            with output_folder(folder, _of_share(assignment), inputs=work.roots, hashes=hashes, private=True) as staged:
                said = work.write_share(index, count, staged, run)
                for file in work.inputs:
                    file.check_unchanged()
                staged.commit({**said, "share": [index, count], "job": assignment.job})
        except OutputExistsError:
            # whoever had this share before is still there, or has just finished it
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    return folder


def job_of(work: Work, *, verify: bool = False) -> str:
    """Digest of the work, of the inputs' sizes and times, and of which hashes the files of an output have.

    Unlike an inode, these are the same on every machine of a file system. So a share of other inputs is never taken for
    one of these. Of a file of the hub, which each machine has in a cache of its own, they are its commit and name.
    """
    inputs = sorted(map(_seen, work.inputs))
    return hashlib.sha256(json.dumps([work.id, inputs, verify and work.makes_files]).encode()).hexdigest()


def _seen(file: File) -> list[str]:
    known = hub_file(file.path)
    return [file.path.name, *map(str, file.identity[2:] if known is None else (file.size, known))]


def is_finished(folder: Path) -> bool:
    """Whether a share is there, as of now."""
    if isinstance(folder, RemotePath):
        folder.bucket.forget()  # another machine wrote it
    return (folder / MANIFEST).exists()


@contextlib.contextmanager
def finished_shares(work: Work, output: Path, count: int, *, verify: bool = False) -> Iterator[Sequence[Path]]:
    """The folders of shares that are there, removed when the block ends without an error.

    Raises:
        FitError: a share is missing.
        ProofError: one is of other work.
    """
    job = job_of(work, verify=verify)
    folders = [_folder(job, output, index, count) for index in range(count)]
    if missing := [str(index) for index, folder in enumerate(folders) if not is_finished(folder)]:
        raise FitError(f"of {count} shares these are missing: {listing(missing)}", hint="run them again")
    for index, folder in enumerate(folders):
        manifest: dict[str, Any] = read_object(folder / MANIFEST, MANIFEST_LIMIT)
        if (manifest.get("share"), manifest.get("job")) != ([index, count], job):
            raise ProofError(
                "holds another share, or one of other work", file=folder, hint="remove it and run the share again"
            )
    yield folders
    for folder in folders:  # the output is complete: what is left is only space
        _remove(folder)


@dataclass(frozen=True, slots=True)
class Shares:
    """A cluster that is done: its `count` shares were written with `write_share`."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FitError(f"there is no work in {self.count} shares")

    def shares(
        self, request: WorkRequest, work: Work, output: Path, run: Run
    ) -> contextlib.AbstractContextManager[Sequence[Path]]:
        """See `Cluster.shares`."""
        return finished_shares(work, output, self.count, verify=run.verify_copies)


def _folder(job: str, output: Path, index: int, count: int) -> Path:
    name = os.fsdecode(os.fsencode(output.name)[:_LONGEST])
    return output.parent / f".{name}.surgery-{job[:16]}.share-{index}-of-{count}"


def _of_share(assignment: Assignment) -> str:
    """What a killed worker's folder is told by."""
    told = [assignment.job, assignment.index, assignment.count]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Remove a share, its manifest first: what a killed command leaves of one is no share then, and `_clear_remains` finds it."""
    try:
        if isinstance(folder, RemotePath):
            below = folder.bucket.all_below(folder.key)
            folder.bucket.delete([f"{folder.key}/{name}" for name in sorted(below, key=lambda name: name != MANIFEST)])
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
    except (OSError, SurgeryError) as error:  # the output is complete, so this is no fault of the command
        _log.warning("%s is of no more use, and could not be removed: %s", show(folder, 300), show(str(error), 300))


def _clear_remains(folder: Path) -> None:
    """Remove what is left of a share that was being removed: a folder appears with its manifest, so one without had it."""
    if isinstance(folder, RemotePath):
        return  # there files appear before their manifest, and what is none of the share goes when it is complete
    if folder.is_dir() and not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
