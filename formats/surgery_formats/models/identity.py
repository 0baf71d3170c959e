# SPDX-License-Identifier: Apache-2.0
"""Identity of inputs: a quick fingerprint of a file, and the content id of a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable

import xxhash

from surgery_formats.files.raw import File, FileIdentity
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["Digests", "content_id", "fingerprint", "fingerprint_of", "shard_fingerprints", "tensor_digest"]

_HEAD = 1 << 20
_SAMPLES = 64
_SAMPLE = 16 << 10
_WHOLE = 8 << 20  # files up to this size are hashed whole
_OF_OBJECTS: dict[FileIdentity, str] = {}
_PIECE = 64 << 10  # read at a time: the head alone would be a tenth of what an export takes beside its imports


def fingerprint(file: File) -> str:
    """xxh3-128 of a small file, or of the size, the head and 64 samples spread over a large one.

    It identifies a job, so that an interrupted run can resume. It is no proof of equality: files are watched for change
    while they are used.
    """
    if file.remote is None:
        return fingerprint_of(file.size, lambda offset, nbytes: file.blocks(offset, nbytes, _PIECE))
    if file.identity not in _OF_OBJECTS:  # each sample is a request
        file.remote.warm(list(_ranges(file.size)))
        _OF_OBJECTS[file.identity] = fingerprint_of(
            file.size, lambda offset, nbytes: file.blocks(offset, nbytes, nbytes)
        )
    return _OF_OBJECTS[file.identity]


def fingerprint_of(size: int, read: Callable[[int, int], Iterable[bytes | bytearray | memoryview]]) -> str:
    """`fingerprint` of a file of `size` bytes, which need not exist yet.

    ``read(offset, nbytes)`` returns its bytes in pieces.
    """
    state = xxhash.xxh3_128(str(size).encode())
    for offset, nbytes in _ranges(size):
        for piece in read(offset, nbytes):
            state.update(piece)
    return state.hexdigest()


def shard_fingerprints(checkpoint: Checkpoint) -> dict[str, str]:
    """The `fingerprint` of every file of weights, by its path in the model: two networks have files of one name."""
    return {
        (f"{component.name}/" if component.name else "") + shard.path.name: fingerprint(shard.file)
        for component in checkpoint.components.values()
        for shard in component.shards
    }


def _ranges(size: int) -> Iterable[tuple[int, int]]:
    if size <= _WHOLE:
        return [(0, size)]
    gap = (size - _HEAD - _SAMPLE) // _SAMPLES
    return [(0, _HEAD), *((_HEAD + i * gap, _SAMPLE) for i in range(_SAMPLES)), (size - _SAMPLE, _SAMPLE)]


class Digests:
    """Computes `tensor_digest` from bytes that are read for another purpose, so that they are not read twice.

    Any thread may use it; the bytes of one tensor must come in order.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, int, int, int], tuple[xxhash.xxh3_128, list[int]]] = {}
        self._noted: dict[tuple[int, int, int, int], str] = {}
        self._lock = threading.Lock()

    def claim(self, tensor: StoredTensor) -> Callable[[int, memoryview], None] | None:
        """The function to call with ``(offset in the tensor, bytes)``.

        None if another caller has claimed the tensor, or if its bytes are not those stored.
        """
        if tensor.strides is not None:
            return None
        state, reached = xxhash.xxh3_128(), [0]
        with self._lock:
            if tensor.place in self._states:
                return None
            self._states[tensor.place] = state, reached

        def seen(offset: int, data: memoryview) -> None:
            if offset == reached[0]:  # what comes out of order leaves the digest incomplete
                state.update(data)
                reached[0] += len(data)

        return seen

    def known(self, tensor: StoredTensor) -> str | None:
        """The digest, if all bytes have been seen."""
        if tensor.place in self._noted:
            return self._noted[tensor.place]
        state, reached = self._states.get(tensor.place, (None, [0]))
        return state.hexdigest() if state is not None and reached[0] == tensor.nbytes else None

    def note(self, tensor: StoredTensor, digest: str) -> None:
        """Take the digest from who has seen the bytes."""
        self._noted[tensor.place] = digest

    def of(self, tensor: StoredTensor) -> str:
        """The digest; reads the tensor if its bytes have not all been seen."""
        return self.known(tensor) or tensor_digest(tensor)


def content_id(checkpoint: Checkpoint, digest: Callable[[StoredTensor], str] | None = None) -> str:
    """sha256 over the sorted ``(component, name, dtype, shape, xxh3-128 of the bytes)`` of all tensors.

    Independent of sharding, order, metadata and place. Reads every byte once, unless `digest` has it already
    (`Digests.of`).
    """
    digest = digest or tensor_digest
    lines = [
        f"{component.name}\0{tensor.name}\0{tensor.dtype.label}\0{list(tensor.shape)}\0{digest(tensor)}"
        for component in checkpoint.components.values()
        for tensor in component.tensors.values()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogatepass")).hexdigest()


def tensor_digest(tensor: StoredTensor) -> str:
    """xxh3-128 of a stored tensor's bytes, read in steps."""
    state = xxhash.xxh3_128()
    for block in tensor.file.blocks(tensor.offset, tensor.nbytes):
        state.update(block)
    return state.hexdigest()
