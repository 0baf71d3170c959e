# SPDX-License-Identifier: Apache-2.0
"""An output below a prefix: complete when its manifest is there, which is written last.

Small files wait in a folder in memory, weights in uploads that are not completed. Then everything appears, one object after
the other, since no store changes several objects at once:

    marker (what is going to be written) -> weights -> small files, configurations and indices last -> sizes compared
    -> with `overwrite` what the old output had besides -> manifest -> marker removed

With `overwrite` the old manifest goes after the marker is there. A marker without a manifest is what a killed run leaves:
the next run, of any job, takes what it lists for its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from surgery_formats.errors import FitError, OutputExistsError, ProofError, SurgeryError
from surgery_formats.files.output.manifest import MANIFEST, UNFINISHED
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.output.scratch import sweep
from surgery_formats.files.output.stage import Stage
from surgery_formats.files.remote.bucket import Bucket
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.files.remote.store import ObjectFacts
from surgery_formats.files.remote.unfinished import abort_unfinished
from surgery_formats.files.remote.upload import Upload, upload_file
from surgery_formats.text import nbytes as readable
from surgery_formats.whole import interruptible

__all__ = ["RemoteStage"]

_LAST = ("config.json", "model_index.json", ".index.json")  # what programs look for first
_AT_ONCE = 8
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
    ) -> None:
        self.shown = out
        self._inputs = [to_path(path) for path in inputs]
        self._overwrite = overwrite
        self._job = plan_id
        name = hashlib.sha256(str(out).encode(errors="surrogatepass")).hexdigest()[:16]
        self._local = Stage(memory_folder() / name, plan_id)
        self.path = self._local.path
        self._uploads: dict[str, Upload] = {}
        self._checked: list[str] = []
        self._waiting = 0
        self._claimed = False  # the marker of this run may be there
        self._left: ObjectFacts | None = None  # the marker of a killed run, as this one has found it

    @property
    def bucket(self) -> Bucket:
        """The bucket that is written to."""
        return self.shown.bucket

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
            abort_unfinished(self.bucket, self.shown.key)
        except BaseException:
            self._local.release()
            raise

    def release(self) -> None:
        """Give up everything that has not appeared; may be called twice."""
        try:
            for upload in self._uploads.values():
                upload.abort()
            self._uploads.clear()
        finally:
            self._local.release()

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

    def upload(self, name: str, nbytes: int, hashes: Sequence[str], *, verify: bool = False) -> Upload:
        """A file of weights that goes to the bucket as it is made; with `verify` it is read back before it counts."""
        upload = self._uploads[name] = Upload(self.bucket, self._key(name), nbytes, [*dict.fromkeys(("xxh3", *hashes))])
        if verify:
            self._checked.append(name)
        return upload

    @interruptible
    def publish(self) -> RemotePath:
        """Let the output appear.

        Raises:
            OutputExistsError: something has appeared there meanwhile.
            ProofError: what is there is not what was sent.
            ResourceError: the store does not take it. What had appeared is removed.
        """
        small = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*") if path.is_file()}
        names = [name for name in sorted({*self._uploads, *small}) if name != MANIFEST]
        sizes = {name: upload.nbytes for name, upload in self._uploads.items()}
        sizes |= {name: path.stat().st_size for name, path in small.items() if name != MANIFEST}
        try:
            stale = self._claim(names)
            self._in_parallel([upload.complete for upload in self._uploads.values()])
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
        with contextlib.suppress(SurgeryError):  # the output is complete, and the next run removes the marker
            self.bucket.delete([self._key(UNFINISHED)])
        abort_unfinished(self.bucket, self.shown.key)  # a request that was repeated has begun two
        return self.shown

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
        for name in self._checked:
            if self._digest(name, there[name]) != self._uploads[name].digests["xxh3"]:
                raise ProofError("the store gives back other bytes than were sent", file=self.shown / name)

    def _digest(self, name: str, facts: ObjectFacts) -> str:
        from surgery_formats.files.remote.ranges import BLOCK, RemoteObject

        source = RemoteObject(self.bucket, self._key(name), facts, memoryview(b""))
        state, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK, facts.size)))
        for at in range(0, facts.size, BLOCK):
            state.update(buffer[: source.read_into(buffer, at)])
        source.close()
        return state.hexdigest()

    def _in_parallel(self, actions: list[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(_AT_ONCE, "surgery-complete") as pool:
            for done in [pool.submit(action) for action in actions]:
                done.result()

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
                bucket.delete([self._key(UNFINISHED)])
                del there[UNFINISHED]
            if not self._overwrite:
                hint = "use `overwrite=True` to replace it, or write elsewhere"
                raise OutputExistsError("already exists", file=self.shown, hint=hint)
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
