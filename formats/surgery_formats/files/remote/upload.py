# SPDX-License-Identifier: Apache-2.0
"""An object while it is uploaded in parts: nobody sees it before `Upload.complete`, and nothing is left after `Upload.abort`.

The thread of an upload gives obstore a stream of bytes that does not end. What is written is sent as parts; the end of the
stream, which completes the upload, comes with `complete`, and an error in its place makes obstore give the upload up.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from surgery_formats.errors import OutputExistsError, ProofError, ResourceError
from surgery_formats.files.output.hashing import new_hash
from surgery_formats.files.remote.bucket import Bucket

__all__ = ["SMALL", "Upload", "part_size", "upload_file"]

SMALL = 5 << 20
"""The least that a part has, except the last: what is not larger is one request."""
_PART = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_READ = 8 << 20
_AT_ONCE = 4  # parts on their way
_WAITING = 2  # blocks that were written and not taken yet
_LOOK = 0.5  # seconds between looks at whether the thread still takes anything


def part_size(nbytes: int) -> int:
    """The size of parts that leaves almost nothing for the last one, which waits in memory for `Upload.complete`."""
    parts = max(1, min(nbytes // _PART, _MOST_PARTS))
    return max(nbytes // parts, SMALL)


def upload_file(bucket: Bucket, key: str, path: Path, *, new: bool = False) -> None:
    """Upload a whole file; a `new` object does not replace one that is there.

    Of a large one it is asked once more right before it appears: uploads in parts know no such condition.

    Raises:
        OutputExistsError: it is there.
        ResourceError: the store does not take it.
    """
    if (size := path.stat().st_size) <= SMALL:
        bucket.put(key, path.read_bytes(), new=new)
        return
    sent = Upload(bucket, key, size)
    try:
        with path.open("rb") as file:
            while block := file.read(_READ):
                sent.write(block)
        sent.end()
        if new and bucket.facts_if_any(key) is not None:
            raise OutputExistsError("exists", file=bucket.url(key))
        sent.complete()
    finally:
        sent.abort()
    bucket.forget()


class _GivenUp(Exception):
    """In the place of the end of a stream."""


class Upload:
    """One object, written from its first byte to its last by one thread at a time.

    Attributes:
        key: Its name in the bucket.
        nbytes: Bytes it will have.
    """

    def __init__(self, bucket: Bucket, key: str, nbytes: int, hashes: Sequence[str] = ()) -> None:
        self.key = key
        self.nbytes = nbytes
        self._bucket = bucket
        self._hashes = {kind: new_hash(kind) for kind in hashes}
        self._hashing = ThreadPoolExecutor(1, "surgery-hash")
        self._hashed: Future[None] | None = None
        self._given = 0
        self._blocks: queue.Queue[memoryview | None] = queue.Queue(_WAITING)
        self._decided = threading.Event()
        self._wanted = self._begun = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="surgery-upload", daemon=True)
        self._thread.start()

    @property
    def digests(self) -> dict[str, str]:
        """The hashes of all bytes that were written, in hexadecimal, by kind."""
        self._wait_for_hash()
        return {kind: state.hexdigest() for kind, state in self._hashes.items()}

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes. They must not be changed afterwards.

        Raises:
            ResourceError: the store does not take them.
            ProofError: more than planned.
        """
        view = memoryview(data).cast("B")
        self._given += len(view)
        if self._given > self.nbytes:
            raise ProofError(f"{self._given} bytes for the planned {self.nbytes}", file=self._bucket.url(self.key))
        self._wait_for_hash()
        if self._hashes:
            self._hashed = self._hashing.submit(self._hash, view)
        self._put(view)

    def end(self) -> None:
        """All bytes were written; they are sent, and the object still is not there.

        Raises:
            ResourceError: as `write`.
            ProofError: fewer than planned.
        """
        if self._given != self.nbytes:
            raise ProofError(f"{self._given} bytes of the planned {self.nbytes}", file=self._bucket.url(self.key))
        self._wait_for_hash()
        self._hashing.shutdown()
        self._put(None)

    def complete(self) -> None:
        """Let the object appear.

        Raises:
            ResourceError: the store does not take it.
        """
        before = self._bucket.facts_if_any(self.key)
        self._wanted = True
        self._decided.set()
        self._thread.join()
        if self._error is not None:
            # The answer may be what was lost: the upload is complete then, and repeated requests do not find it.
            after = self._bucket.facts_if_any(self.key)
            if after is None or after.size != self.nbytes or after == before:
                raise self._error

    def abort(self) -> None:
        """Give it up; may be called twice, and after `complete`, when it does nothing."""
        self._hashing.shutdown()
        self._decided.set()
        while self._thread.is_alive():
            try:
                self._blocks.put(None, timeout=_LOOK)  # a thread that waits for bytes
                break
            except queue.Full:
                continue
        self._thread.join()

    def _hash(self, view: memoryview) -> None:
        for state in self._hashes.values():
            state.update(view)

    def _wait_for_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()

    def _put(self, item: memoryview | None) -> None:
        while True:
            self._raise()
            try:
                return self._blocks.put(item, timeout=_LOOK)
            except queue.Full:
                continue

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _send(self, part: int) -> None:
        self._bucket.obstore.put(
            self._bucket.store,
            self.key,
            self._stream(),
            chunk_size=part,
            max_concurrency=_AT_ONCE,
            use_multipart=True,
        )

    def _stream(self) -> Iterator[Any]:
        self._begun = True
        while (block := self._blocks.get()) is not None:
            if self._decided.is_set() and not self._wanted:
                raise _GivenUp
            yield block
        self._decided.wait()
        if not self._wanted:
            raise _GivenUp

    def _run(self) -> None:
        part = part_size(self.nbytes)
        try:
            with self._bucket.faults(self.key, writing=True):
                # An answer that is dropped while the upload is begun is asked for again: nothing was taken yet.
                self._bucket.whole_answer(lambda: self._send(part), again=lambda: not self._begun)
        except _GivenUp:
            self._error = ResourceError("the upload was given up", file=self._bucket.url(self.key))
        except BaseException as error:  # for the thread that writes
            self._error = error
