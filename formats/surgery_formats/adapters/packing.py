# SPDX-License-Identifier: Apache-2.0
"""How the tensors of a written adapter become one file: safetensors, unless its format's program reads another.

A packing plans a file from names, types and shapes alone. Where its bytes depend on values (a checksum before a tensor, what lies
behind all of them) they are made front to back, else in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery_formats.adapters.hashes import HASHES, FileHashes
from surgery_formats.containers.base import FileLayout, TensorSpec
from surgery_formats.containers.safetensors import layout, reference_order
from surgery_formats.containers.torch.layout import plan_archive

__all__ = ["PackedFile", "Packing", "laid_out", "packed_as_safetensors", "packed_as_torch"]

Packing = Callable[[Sequence[TensorSpec], Mapping[str, str]], "PackedFile"]
"""From tensors and free strings to the plan of a file that holds them."""

Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file before its tensors are known.

    Attributes:
        header: Its first bytes.
        ranges: ``(offset, nbytes)`` of every tensor by name, in order of position.
        nbytes: All of it.
        before: The bytes between a tensor and what is in front of it, given its name and its bytes; None for nothing.
        end: The bytes behind the last tensor, asked for when all others are known.
        known_header: The first bytes as they are in the end, if they say something of the tensors; as long as `header`.
    """

    header: bytes
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int
    before: Callable[[str, Data], bytes] | None = None
    end: Callable[[], bytes] = bytes
    known_header: Callable[[], bytes] | None = None

    @property
    def in_any_order(self) -> bool:
        """Whether no byte of the file depends on a tensor before it."""
        return self.before is None

    def pieces(self, tensors: Iterable[tuple[str, Data]]) -> Iterator[tuple[int, Data]]:
        """All bytes with their positions, a header that has to wait once more; `tensors` as in `ranges` unless `in_any_order`."""
        yield 0, self.header
        at = len(self.header)
        for name, data in tensors:
            if self.before is not None and (gap := self.before(name, data)):
                yield at, gap
            at, nbytes = self.ranges[name]
            yield at, data
            at += nbytes
        if rest := self.end():
            yield at, rest
        if self.known_header is not None:
            yield 0, self.known_header()


def packed_as_safetensors(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
    """A file of safetensors, in the order of the reference implementation. Hashes among the strings become those of the file."""
    entries = reference_order(tensors)
    header, ranges = layout(entries, metadata)
    nbytes = max((offset + size for offset, size in ranges.values()), default=len(header))
    if not (asked := HASHES.keys() & metadata.keys()):
        return PackedFile(header, ranges, nbytes)
    hashes = FileHashes(entries, metadata)

    def taken(name: str, data: Data) -> bytes:
        hashes.update(name, data)
        return b""

    def known_header() -> bytes:
        found = {key: value for key, value in hashes.values().items() if key in asked}
        return layout(entries, {**metadata, **found})[0]

    return PackedFile(header, ranges, nbytes, taken, known_header=known_header)


def packed_as_torch(tensors: Sequence[TensorSpec], metadata: Mapping[str, str], within: str = "") -> PackedFile:
    """A torch archive of a dict of tensors, or of ``{within: dict}``; it has no place for free strings."""
    plan = plan_archive(tensors, within)
    return PackedFile(plan.header, plan.ranges, plan.nbytes, plan.before, plan.end)


def laid_out(plan: FileLayout) -> PackedFile:
    """A file whose gaps are zeros."""
    gaps = {offset + nbytes: nbytes for offset, nbytes in plan.padding}
    last = max((offset + nbytes for offset, nbytes in plan.ranges.values()), default=len(plan.header))

    def before(name: str, data: Data) -> bytes:
        return bytes(gaps.get(plan.ranges[name][0], 0))

    return PackedFile(plan.header, plan.ranges, plan.nbytes, before, lambda: bytes(plan.nbytes - last))
