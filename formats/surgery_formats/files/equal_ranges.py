# SPDX-License-Identifier: Apache-2.0
"""Whether ranges of files hold the same bytes, and which were found to, so that nobody compares them a second time.

A copy is compared while it is written, on a core that would wait for the writer. Whoever proves the output asks here
before it reads both files again. What is known goes by the files' identities, so it ends when one of them changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from surgery_formats.files.raw import File, FileIdentity, identity_of, read_all

__all__ = ["EqualRanges", "equal_ranges", "holds"]

_STEP = 1 << 20  # bytes, of which a core keeps two near it
_scratch = threading.local()  # two buffers of a thread: fresh memory would cost as much as reading
_Range = tuple[FileIdentity, int, int]
_known: dict[FileIdentity, dict[int, _Range]] = {}


@dataclass(frozen=True)
class EqualRanges:
    """What was found in one file.

    Attributes:
        found: By offset: the other file, the offset there, and the number of bytes.
    """

    found: dict[int, _Range] = field(default_factory=dict)

    def add(self, offset: int, other: File, other_offset: int, nbytes: int) -> None:
        """Note that `nbytes` bytes at `offset` are those of another file."""
        self.found[offset] = other.identity, other.begin + other_offset, nbytes

    @contextmanager
    def known(self, fd: int) -> Iterator[None]:
        """Let `known_to_be_equal` tell of them, as ranges of the open file `fd`, which is complete."""
        identity = identity_of(fd)
        _known[identity] = self.found
        try:
            yield
        finally:
            del _known[identity]


def equal_ranges(file: File, offset: int, other: File, other_offset: int, nbytes: int) -> bool:
    """Whether ranges of two files, or of one, hold the same bytes: as it is known, or as reading both shows.

    Raises:
        MalformedError: a file ends too early.
    """
    places = (file.identity, file.begin + offset), (other.identity, other.begin + other_offset)
    if places[0] == places[1]:
        return True
    if any(_known.get(here[0], {}).get(here[1]) == (*there, nbytes) for here, there in (places, places[::-1])):
        return True
    for start in range(0, nbytes, _STEP):
        left, right = (buffer[: nbytes - start] for buffer in _buffers())
        file.read_into(left, offset + start)
        other.read_into(right, other_offset + start)
        if not _equal(left, right):
            return False
    return True


def holds(fd: int, data: memoryview, offset: int) -> bool:
    """Whether a file holds the bytes `data` at `offset`."""
    for start in range(0, len(data), _STEP):
        piece = data[start : start + _STEP]
        found = _buffers()[0][: len(piece)]
        if read_all(fd, found, offset + start) < len(piece) or not _equal(piece, found):
            return False
    return True


def _buffers() -> tuple[memoryview, memoryview]:
    if not hasattr(_scratch, "buffers"):
        _scratch.buffers = memoryview(bytearray(_STEP)), memoryview(bytearray(_STEP))
    left, right = _scratch.buffers
    return left, right


def _equal(left: memoryview, right: memoryview) -> bool:
    """Compared as whole words as far as they go, which lets other threads run."""
    import numpy

    words = len(left) // 8 * 8
    mine, theirs = (numpy.frombuffer(side[:words], numpy.uint64) for side in (left, right))
    return bool((mine == theirs).all()) and left[words:] == right[words:]
