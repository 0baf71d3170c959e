# SPDX-License-Identifier: Apache-2.0
"""Files of an output that are finished before it is: whole objects beside it, each with a record, which a commit has copied.

    .OUT.surgery-<job>/model-00001-of-00004.safetensors
    .OUT.surgery-<job>/.surgery-finished/model-00001-of-00004.safetensors     job, size, etag, hashes, what was measured

A record is written after its object, and counts if the object still has the size and the etag that it names. So a run that
was killed is gone on with, and nothing has to be read again for that. Of a share, which is hidden itself, they lie in
their place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from surgery_formats.errors import NotFoundError, ProofError
from surgery_formats.files.output.journal import parse_line
from surgery_formats.files.output.manifest import FileRecord
from surgery_formats.files.output.scratch import stages_of
from surgery_formats.files.remote.bucket import Bucket
from surgery_formats.files.remote.path import RemotePath
from surgery_formats.files.remote.store import ObjectFacts
from surgery_formats.files.remote.unfinished import abort_unfinished

__all__ = ["MOST_COPIED", "FinishedFiles", "FinishedObject", "in_parallel", "remove_others"]

MOST_COPIED = 5 << 30
"""Bytes that S3 copies in one request."""
_COPIED_AT_ONCE = ("s3", "gs")  # Azure may copy after it has answered
_RECORDS = ".surgery-finished"
_AT_ONCE = 8  # requests
_NAME_LIMIT = 200  # bytes of the output's name, as on a disk
_RECORD_LIMIT = 64 << 20  # bytes
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class FinishedObject:
    """A whole file that is not part of the output yet.

    Attributes:
        key: Where it lies.
        facts: What it was when its hash was known.
        record: Of the file.
    """

    key: str
    facts: ObjectFacts
    record: FileRecord

    def is_same(self, bucket: Bucket) -> bool:
        """Whether it still is what it was."""
        now = bucket.facts_if_any(self.key)
        return now is not None and (now.size, now.etag) == (self.facts.size, self.facts.etag)

    def copy_to(self, bucket: Bucket, key: str) -> None:
        """Let the store copy it to `key`, where nothing is.

        The request names no etag, so it is asked for before and behind it: no object gets an old one again.

        Raises:
            ProofError: it is another one by now, or gone.
            ResourceError: the store does not copy it.
        """
        self._check_same(bucket)
        bucket.copy(self.key, key)
        self._check_same(bucket)

    def _check_same(self, bucket: Bucket) -> None:
        if not self.is_same(bucket):
            hint = "was this output written by another command meanwhile? run again"
            raise ProofError("a finished file was changed or removed", file=bucket.url(self.key), hint=hint)


class FinishedFiles:
    """Finished files of one job.

    Attributes:
        prefix: Where they lie.
    """

    def __init__(self, output: RemotePath, job: str, *, in_place: bool) -> None:
        self._bucket = output.bucket
        self._job = job
        name = os.fsdecode(os.fsencode(output.name)[:_NAME_LIMIT])
        self.prefix = output.key if in_place else (output.parent / f".{name}.surgery-{job[:16]}").key

    @staticmethod
    def can_copy(bucket: Bucket, nbytes: int) -> bool:
        """Whether the store copies a file of this size in one request, and answers when it is done."""
        return bucket.scheme in _COPIED_AT_ONCE and nbytes <= MOST_COPIED

    def key(self, name: str) -> str:
        """Where a file lies."""
        return f"{self.prefix}/{name}"

    def noted(self, record: FileRecord) -> FinishedObject:
        """A file is complete: write its record.

        Raises:
            ProofError: the store has other bytes than were sent.
            ResourceError: it does not take the record.
        """
        facts = self._bucket.facts(self.key(record.name))
        if facts.size != record.size:
            raise ProofError(
                f"has {facts.size} bytes after {record.size} were sent", file=self._bucket.url(self.key(record.name))
            )
        entry = {"plan": self._job, "name": record.name, "size": record.size, "etag": facts.etag}
        data = json.dumps({**entry, "record": record.record}, sort_keys=True, allow_nan=False).encode()
        self._bucket.put(self._record_key(record.name), data)
        return FinishedObject(self.key(record.name), facts, record)

    def look(self) -> dict[str, FinishedObject]:
        """What an earlier run of this job has finished, and still is what it was."""
        there = self._bucket.all_below(self.prefix)
        names = [name.removeprefix(f"{_RECORDS}/") for name in there if name.startswith(f"{_RECORDS}/")]
        found = in_parallel([partial(self._recalled, name) for name in names if name in there])
        return {finished.record.name: finished for finished in found if finished is not None}

    def _recalled(self, name: str) -> FinishedObject | None:
        try:
            facts = self._bucket.facts(self._record_key(name))
            data = (
                bytes(self._bucket.read(self._record_key(name), 0, facts.size).data)
                if facts.size <= _RECORD_LIMIT
                else b""
            )
            record = parse_line(data, self._job)
            if record is None or record.name != name:
                return None
            now, etag = self._bucket.facts(self.key(name)), json.loads(data).get("etag")
        except NotFoundError:
            return None
        return FinishedObject(self.key(name), now, record) if (now.size, now.etag) == (record.size, etag) else None

    def remove(self, finished: FinishedObject) -> None:
        """Remove a file and its record, unless another process has written it since."""
        if finished.is_same(self._bucket):
            self._bucket.delete([self._record_key(finished.record.name), finished.key])

    def _record_key(self, name: str) -> str:
        return f"{self.prefix}/{_RECORDS}/{name}"


def remove_others(output: RemotePath) -> None:
    """Remove what runs of any job have finished, or begun to send, for an output that is complete now.

    Raises:
        SurgeryError: it cannot be done.
    """
    bucket, parent = output.bucket, output.parent
    pattern = stages_of(os.fsdecode(os.fsencode(output.name)[:_NAME_LIMIT]))
    bucket.forget()
    for name in sorted(bucket.listing(parent.key).folders):
        if pattern.match(name):
            prefix = (parent / name).key
            abort_unfinished(bucket, prefix)
            bucket.delete([f"{prefix}/{below}" for below in bucket.all_below(prefix)])


def in_parallel(actions: list[Callable[[], Answer]]) -> list[Answer]:
    """Do all, some at a time; the first fault is raised."""
    with ThreadPoolExecutor(_AT_ONCE, "surgery-requests") as pool:
        return [done.result() for done in [pool.submit(action) for action in actions]]
