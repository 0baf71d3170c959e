# SPDX-License-Identifier: Apache-2.0
"""An output below a prefix: complete when its manifest is there, which is written last.

Small files wait in a folder in memory, weights in uploads that are not completed, or as finished objects beside the output
(`FinishedFiles`), which another run goes on with. Then everything appears, one object after the other, since no store changes
several objects at once:

    marker (what is going to be written) -> weights: uploads completed, finished objects copied by the store -> small files,
    configurations and indices last -> sizes compared -> with `overwrite` what the old output had besides -> manifest
    -> finished objects removed -> marker removed

With `overwrite` the old manifest goes after the marker is there. A marker without a manifest is what a killed run leaves:
the next run, of any job, takes what it lists for its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from surgery_formats.errors import FitError, OutputExistsError, ProofError, SurgeryError
from surgery_formats.files.output.manifest import MANIFEST, UNFINISHED, FileRecord
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.output.scratch import sweep
from surgery_formats.files.output.stage import Stage
from surgery_formats.files.remote.bucket import Bucket
from surgery_formats.files.remote.finished import FinishedFiles, FinishedObject, in_parallel, remove_others
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.files.remote.store import ObjectFacts
from surgery_formats.files.remote.unfinished import abort_unfinished
from surgery_formats.files.remote.upload import Upload, upload_file
from surgery_formats.text import nbytes as readable
from surgery_formats.whole import interruptible, whole

__all__ = ["RemoteStage"]

_LAST = ("config.json", "model_index.json", ".index.json")  # what programs look for first
_WORTH_KEEPING = 64 << 20  # bytes that are sent again rather than kept
_MOST_WAITING = 2 << 30  # bytes of files that are made at once and proved before they appear, such as adapters
_MARKER_LIMIT = 16 << 20
_STAGES = re.compile(r"\.[0-9a-f]{16}\.surgery-[0-9a-f]{16}\Z")  # in memory, of every output


class RemoteStage:
    """Where the files of one job lie until they are complete, for an output in a bucket; see `Stage`.

    Attributes:
        shown: The output as the user wrote it.
        path: The folder of small files.
    """

    def __init__(
        self,
        out: RemotePath,
        plan_id: str,
        *,
        overwrite: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        private: bool = False,
    ) -> None:
        self.shown = out
        self._inputs = [to_path(path) for path in inputs]
        self._overwrite = overwrite
        self._job = plan_id
        name = hashlib.sha256(str(out).encode(errors="surrogatepass")).hexdigest()[:16]
        self._local = Stage(memory_folder() / name, plan_id)
        self.path = self._local.path
        self._private = private
        self._uploads: dict[str, Upload] = {}
        self._finished: dict[str, FinishedObject] = {}
        self._of_others: set[str] = set()  # finished ones that stay where they are
        self._checked: dict[str, str] = {}  # names, and the hash that has to be read
        self._waiting = 0
        self._claimed = False  # the marker of this run may be there
        self._lost = 0
        self._left: ObjectFacts | None = None  # the marker of a killed run, as this one has found it

    @property
    def bucket(self) -> Bucket:
        """The bucket that is written to."""
        return self.shown.bucket

    @functools.cached_property
    def _beside(self) -> FinishedFiles:
        return FinishedFiles(self.shown, self._job, in_place=self._private)

    def check(self) -> None:
        """Refuse an output that could not be written, as of now.

        Raises:
            FitError, OutputExistsError: as `acquire`.
        """
        self._refuse_unsafe()
        self._there()

    @interruptible
    def acquire(self) -> None:
        """Make the folder in memory, and give up uploads that a killed run began.

        Raises:
            FitError: the output overlaps an input, or is a whole bucket.
            OutputExistsError: something is there, or another process of this machine is writing it.
        """
        self._refuse_unsafe()
        try:
            self._left = self._there().get(UNFINISHED)
        except OutputExistsError:  # what waited in memory for it when its run was killed, waits for nobody
            with contextlib.suppress(SurgeryError):
                self._local.acquire()
                self._local.release()
            raise
        with contextlib.suppress(OSError):  # what killed runs left in memory: every run begins anew
            sweep(self.path.parent, _STAGES)
        try:
            self._local.acquire()
            for prefix in {self.shown.key, self._beside.prefix}:
                abort_unfinished(self.bucket, prefix)
            self._finished = self._beside.look()
        except BaseException:
            self._local.release()
            raise
        self._lost = self._unanswered()

    def release(self) -> None:
        """Give up everything that has not appeared; may be called twice.

        If a store could not be reached, finished files stay for another run.
        """
        try:
            for upload in self._uploads.values():
                upload.abort()
            self._uploads.clear()
            if self._unanswered() == self._lost:
                with contextlib.suppress(SurgeryError):
                    in_parallel([functools.partial(self._beside.remove, file) for file in self._own()])
            self._finished.clear()
        finally:
            self._local.release()

    def _own(self) -> list[FinishedObject]:
        return [file for name, file in self._finished.items() if name not in self._of_others]

    def _unanswered(self) -> int:
        """How many requests to the buckets of this job had no answer."""
        stores = {path.store for path in (self.shown, *self._inputs) if isinstance(path, RemotePath)}
        return sum(store.lost for store in stores if isinstance(store, Bucket))

    def sync(self) -> None:
        """Nothing here is durable before it is uploaded."""

    def reserve(self, nbytes: int) -> None:
        """Make sure that a file of `nbytes` bytes may wait in memory.

        Raises:
            FitError: with the others it takes too much.
        """
        self._waiting += nbytes
        if self._waiting > _MOST_WAITING:
            raise FitError(
                f"{readable(self._waiting)} would have to wait in memory, which takes up to {readable(_MOST_WAITING)}",
                file=self.shown,
                hint="write to a folder, and upload it",
            )

    @whole  # an upload that has begun is known to `release`
    def upload(
        self, name: str, nbytes: int, hashes: Sequence[str], *, verify: bool = False, keep: bool = False
    ) -> Upload:
        """A file of weights that goes to the bucket as it is made.

        Args:
            name: The file.
            nbytes: Its size.
            hashes: Of the whole file.
            verify: Whether it is read back before it counts.
            keep: Whether it is of use to another run once it is whole, since others are still to be made.
        """
        worth = keep and nbytes >= _WORTH_KEEPING and FinishedFiles.can_copy(self.bucket, nbytes)
        key = self._beside.key(name) if worth or self._private else self._key(name)
        upload = self._uploads[name] = Upload(self.bucket, key, nbytes, [*dict.fromkeys(("xxh3", *hashes))])
        if verify:
            self._checked[name] = ""
        return upload

    def sent(self, record: FileRecord) -> None:
        """All bytes of a file were sent; if it is to be kept, it is completed now, and has this record.

        Raises:
            ResourceError: the store does not take it.
            ProofError: the store has another number of bytes.
        """
        name = record.name
        upload = self._uploads[name]
        if name in self._checked:
            self._checked[name] = upload.digests["xxh3"]
        if self._private or upload.key != self._key(name):
            upload.complete()
            self._finished[name] = self._beside.noted(record)
            del self._uploads[name]

    def recalled(self) -> Mapping[str, FileRecord]:
        """The files that an earlier run of this job has finished."""
        return {name: file.record for name, file in self._finished.items()}

    def discard(self, name: str) -> None:
        """A finished file is not wanted: it is removed."""
        if (file := self._finished.pop(name, None)) is not None:
            self._beside.remove(file)

    def reread(self, record: FileRecord) -> None:
        """A finished file is to be read before it counts."""
        self._checked[record.name] = record.record["xxh3"]

    def take(self, source: RemotePath, record: FileRecord) -> bool:
        """Let an object that another process wrote and proved be copied to the output; False if the store does not do that.

        Raises:
            NotFoundError: it is not there.
        """
        if not FinishedFiles.can_copy(self.bucket, record.size) or source.bucket is not self.bucket:
            return False
        self._finished[record.name] = FinishedObject(source.key, self.bucket.facts(source.key), record)
        self._of_others.add(record.name)
        return True

    def etag(self, name: str) -> str:
        """The etag of a finished file."""
        return self._finished[name].facts.etag

    @interruptible
    def publish(self) -> RemotePath:
        """Let the output appear.

        Raises:
            OutputExistsError: something has appeared there meanwhile.
            ProofError: what is there is not what was sent.
            ResourceError: the store does not take it. What had appeared is removed.
        """
        small = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*") if path.is_file()}
        names = [name for name in sorted({*self._uploads, *self._finished, *small}) if name != MANIFEST]
        sizes = {name: upload.nbytes for name, upload in self._uploads.items()}
        sizes |= {name: file.record.size for name, file in self._finished.items()}
        sizes |= {name: path.stat().st_size for name, path in small.items() if name != MANIFEST}
        copied = {} if self._private else self._finished
        try:
            stale = self._claim(names)
            # A store that says that it has copied, and has not, must not pass with what was there.
            self.bucket.delete([self._key(name) for name in copied if name in stale])
            in_parallel(
                [upload.complete for upload in self._uploads.values()]
                + [functools.partial(file.copy_to, self.bucket, self._key(name)) for name, file in copied.items()]
            )
            ordered = sorted(small.keys() - {MANIFEST}, key=lambda name: (name.endswith(_LAST), name))
            for name in ordered:
                upload_file(self.bucket, self._key(name), small[name])
            self._prove(sizes)
            self.bucket.delete([self._key(name) for name in sorted(stale - set(names))])
            self.bucket.put(self._key(MANIFEST), small[MANIFEST].read_bytes(), new=True)
        except BaseException:
            if self._claimed:
                with contextlib.suppress(SurgeryError):  # the first fault is reported; the marker lists what is left
                    self._take_back(names, small[MANIFEST].read_bytes())
            raise
        self._finished.clear()
        with contextlib.suppress(
            SurgeryError
        ):  # the output is complete, and the next run removes the rest and the marker
            self._tidy()
        abort_unfinished(self.bucket, self.shown.key)  # a request that was repeated has begun two
        return self.shown

    def _tidy(self) -> None:
        if not self._private:
            remove_others(self.shown)
        self.bucket.delete([self._key(UNFINISHED)])

    def _take_back(self, names: list[str], manifest: bytes) -> None:
        """Remove what has appeared, first the manifest, whose answer may be what failed; not the output of another run."""
        if self.bucket.facts_if_any(self._key(MANIFEST)) is not None:
            if self.bucket.read(self._key(MANIFEST)).data != manifest:
                return
            self.bucket.delete([self._key(MANIFEST)])
        self.bucket.delete([self._key(name) for name in (*names, UNFINISHED)])

    def _claim(self, names: list[str]) -> set[str]:
        """Say what is going to be written, and take an old manifest away; the names that the old output had.

        Raises:
            OutputExistsError: another run has said so since this one began.
        """
        there = self._there()
        if (marker := there.get(UNFINISHED)) not in (None, self._left) and self._told(marker).get("job") != self._job:
            raise OutputExistsError("another process is writing it", file=self.shown)
        told = json.dumps({"job": self._job, "files": sorted({*names, *there} - {MANIFEST, UNFINISHED})}).encode()
        self._claimed = True
        try:
            self.bucket.put(self._key(UNFINISHED), told, new=marker is None)
        except FileExistsError as error:
            self._claimed = False
            raise OutputExistsError("another process is writing it", file=self.shown) from error
        if MANIFEST in there:
            self.bucket.delete([self._key(MANIFEST)])
        return set(there) - {UNFINISHED, MANIFEST}

    def _prove(self, sizes: dict[str, int]) -> None:
        """Compare what the bucket says it has with what was sent, and the bytes of files that are to be verified."""
        self.bucket.forget()
        there = self.bucket.all_below(self.shown.key)
        for name, size in sizes.items():
            if name not in there or there[name].size != size:
                found = "is not there" if name not in there else f"has {there[name].size} bytes"
                raise ProofError(f"{found} after {size} were sent", file=self.shown / name)
        for name, digest in self._checked.items():
            if self._digest(name, there[name]) != digest:
                raise ProofError("the store gives back other bytes than were sent", file=self.shown / name)

    def _digest(self, name: str, facts: ObjectFacts) -> str:
        from surgery_formats.files.remote.ranges import BLOCK, RemoteObject

        source = RemoteObject(self.bucket, self._key(name), facts, memoryview(b""))
        state, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK, facts.size)))
        for at in range(0, facts.size, BLOCK):
            state.update(buffer[: source.read_into(buffer, at)])
        source.close()
        return state.hexdigest()

    def _key(self, name: str) -> str:
        return f"{self.shown.key}/{name}"

    def _there(self) -> dict[str, ObjectFacts]:
        """What is below the prefix, if it may be replaced.

        Raises:
            OutputExistsError: it may not.
        """
        bucket, key = self.bucket, self.shown.key
        there = bucket.all_below(key)
        if bucket.facts_if_any(key) is not None:
            raise OutputExistsError("exists and is not a folder", file=self.shown, hint="write elsewhere")
        if MANIFEST in there:
            if UNFINISHED in there:  # of a run that was killed after its last step
                self._tidy()
                del there[UNFINISHED]
            if not self._overwrite:
                hint = "use `overwrite=True` to replace it, or write elsewhere"
                raise OutputExistsError("already exists", file=self.shown, hint=hint)
        elif self._private:
            pass  # whatever is there, a run that was killed has left it
        elif UNFINISHED not in there:
            if there:
                raise OutputExistsError(
                    "these objects were not written by surgery, so they are not replaced",
                    file=self.shown,
                    hint="remove them yourself, or write elsewhere",
                )
        elif stranger := sorted(there.keys() - self._listed(there[UNFINISHED]) - {UNFINISHED}):
            raise OutputExistsError(f"holds '{stranger[0]}', which no run of surgery has begun", file=self.shown)
        return there

    def _listed(self, marker: ObjectFacts) -> set[str]:
        """The names in the marker of a killed run."""
        files = self._told(marker).get("files")
        return {str(name) for name in files} if isinstance(files, list) else set()

    def _told(self, marker: ObjectFacts) -> dict[str, Any]:
        """What a marker says; nothing if it is none of ours."""
        if not 0 < marker.size <= _MARKER_LIMIT:
            return {}
        try:
            told = json.loads(bytes(self.bucket.read(self._key(UNFINISHED), 0, marker.size).data))
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}

    def _refuse_unsafe(self) -> None:
        if not self.shown.is_plain or not self.shown.key:
            raise FitError("an output needs a name in its bucket", file=self.shown, hint="write s3://bucket/name")
        hint = "write to a prefix outside the inputs"
        for source in self._inputs:
            if isinstance(source, RemotePath):
                if source == self.shown:
                    raise FitError("the output is one of the inputs", file=self.shown, hint=hint)
                if self.shown in source.parents:
                    raise FitError(f"the output holds the input {source}", file=self.shown, hint=hint)
                if source in self.shown.parents:
                    raise FitError(f"the output lies in the input {source}", file=self.shown, hint=hint)
