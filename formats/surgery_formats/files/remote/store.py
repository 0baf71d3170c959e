# SPDX-License-Identifier: Apache-2.0
"""Where objects are read from: a bucket, or a repository of the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["HEAD", "Listing", "ObjectFacts", "ObjectStore", "Reply"]

HEAD = 256 << 10
"""Bytes of an object that come with the first request: most headers."""


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a bucket says about an object.

    Attributes:
        size: Bytes.
        etag: Changes with every write.
        version: Where the bucket keeps versions, which one it is.
    """

    size: int
    etag: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies below a prefix, one level deep, by name."""

    files: dict[str, ObjectFacts] = field(default_factory=dict)
    folders: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.files or self.folders)


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes of an object, and what it was when they were read."""

    data: memoryview
    facts: ObjectFacts


class ObjectStore(Protocol):
    """Objects by their keys, some of which lie below a prefix. Every method may be called from any thread."""

    def url(self, key: str) -> str:
        """How an object is called in messages."""
        ...

    def listing(self, prefix: str) -> Listing:
        """What lies below `prefix`, one level deep."""
        ...

    def remembered(self, prefix: str) -> Listing | None:
        """The listing of `prefix`, if asking for it costs nothing."""
        ...

    def all_below(self, prefix: str) -> dict[str, ObjectFacts]:
        """Every object below `prefix`, however deep, by its name from there."""
        ...

    def facts(self, key: str) -> ObjectFacts:
        """What the object is now; a `NotFoundError` if there is none."""
        ...

    def facts_if_any(self, key: str) -> ObjectFacts | None:
        """As `facts`; None if there is none."""
        ...

    def read(
        self, key: str, start: int = 0, stop: int | None = None, etag: str = "", version: str | None = None
    ) -> Reply:
        """A range of an object, as far as it goes, if it still has that etag."""
        ...
