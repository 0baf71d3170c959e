# SPDX-License-Identifier: Apache-2.0
"""``s3://bucket/key`` as a path: what code asks a path is asked of the bucket. So it is with ``hf://org/name@commit/file``.

A prefix is a folder, an object is a file, and nothing is a link. Nothing is written through such a path: outputs have
their own way (`surgery_formats.files.remote.stage`). What is not here, such as `open`, finds no file.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Generator
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

from surgery_formats.errors import FitError, InputError, NotFoundError

if TYPE_CHECKING:
    from surgery_formats.files.remote.bucket import Bucket
    from surgery_formats.files.remote.store import Listing, ObjectFacts, ObjectStore

__all__ = ["SCHEMES", "RemotePath", "is_remote", "on_a_disk", "to_path"]

SCHEMES = ("s3", "gs", "az")
_STARTS = tuple(f"{scheme}:/" for scheme in SCHEMES)  # a path has lost one of the two slashes
HUB = "hf"
_PINNED = re.compile(rf"{HUB}://?(?:[^/@]+/)?[^/@]+@[0-9a-f]{{40}}(?:/|\Z)")
"""A repository of the hub at a commit; any other name of the hub is a reference (`surgery_formats.refs`)."""


def is_remote(value: str | os.PathLike[str]) -> bool:
    """Whether `value` names an object or a prefix: its text begins with a scheme."""
    text = os.fspath(value)
    return text.startswith(_STARTS) or _PINNED.match(text) is not None


def to_path(value: str | os.PathLike[str]) -> Path:
    """The path that `value` names: of the file system, or of a bucket.

    A relative folder that is really called ``s3:`` is named by its whole path.
    """
    if isinstance(value, RemotePath):
        return value
    return RemotePath(value) if is_remote(value) else Path(value)


def on_a_disk(value: str | os.PathLike[str], what: str) -> None:
    """Refuse a name in a bucket; `what` needs files of a disk.

    Raises:
        FitError: it is one.
    """
    if is_remote(value):
        raise FitError(f"{what}, which a bucket does not have", file=str(to_path(value)), hint="use a folder of a disk")


class RemotePath(PosixPath):
    """A path in a bucket. It answers what `Path` answers of files; the answers are remembered for a few seconds."""

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if text.startswith((*_STARTS, f"{HUB}:/")) else text

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> Any:
        return type(self), (str(self),)

    @property
    def bucket(self) -> Bucket:
        """The bucket, connected to; it can be written to.

        Raises:
            NotFoundError: no bucket is named, or the path has left it.
            FitError: it is the hub's.
            InputError: the library is missing.
        """
        from surgery_formats.files.remote.bucket import connect

        if not self.is_plain:
            raise NotFoundError("not the name of an object", file=str(self))
        if self._scheme == HUB:
            raise FitError("nothing is written to the hub", file=str(self), hint="write to a folder, and upload it")
        return connect(self._scheme, self.parts[1])

    @property
    def store(self) -> ObjectStore:
        """Where it is read from: the bucket, or the repository of the hub.

        Raises:
            NotFoundError, InputError: as `bucket`.
        """
        if self._scheme != HUB or not self.is_plain:
            return self.bucket
        from surgery_formats.files.remote.hub import repository_of

        return repository_of("/".join(self.parts[1 : self._above]))

    @property
    def key(self) -> str:
        """The name in the bucket; empty for the bucket itself."""
        return "/".join(self.parts[self._above :])

    @property
    def is_plain(self) -> bool:
        """Whether it names something in a bucket, without a step upwards."""
        return len(self.parts) >= self._above and self._scheme in (*SCHEMES, HUB) and ".." not in self.parts

    @property
    def _scheme(self) -> str:
        return self.parts[0][:-1] if self.parts else ""

    @property
    def _above(self) -> int:
        """How many parts come before the key: the scheme and the bucket, or the repository, whose name ends with its commit."""
        if self._scheme != HUB:
            return 2
        return next((number for number, part in enumerate(self.parts, 1) if "@" in part), len(self.parts) + 1)

    def facts(self) -> ObjectFacts | None:
        """What the bucket says about the object; None if there is none.

        Raises:
            InputError: the bucket does not tell.
        """
        if not self.is_plain or not self.key:
            return None
        store = self.store
        around = store.remembered(self.parent.key)
        if around is None and store.remembered(self.key):
            return None  # a folder
        try:
            return (around or self.parent.listing()).files.get(self.name)
        except NotFoundError:
            raise
        except InputError:  # who may list this prefix alone may still ask for the object
            return store.facts_if_any(self.key)

    def listing(self) -> Listing:
        """What lies below this prefix, one level deep."""
        return self.store.listing(self.key)

    def exists(self, **_: Any) -> bool:
        """Whether there is an object, or one below."""
        return self.is_dir() or self.is_file()

    def is_file(self, **_: Any) -> bool:
        """Whether there is an object of this name."""
        return self.facts() is not None

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below."""
        if not self.is_plain:
            return False
        around = self.store.remembered(self.parent.key) if self.key else None
        return bool(self.listing()) if around is None else self.name in around.folders

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self, **_: Any) -> os.stat_result:
        """Size and kind; all else is 0.

        Raises:
            FileNotFoundError: there is nothing.
        """
        facts = self.facts()
        if facts is None and not self.is_dir():
            raise NotFoundError("no such object", file=str(self))
        kind, size = (stat.S_IFDIR, 0) if facts is None else (stat.S_IFREG, facts.size)
        return os.stat_result((kind, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def lstat(self) -> os.stat_result:
        """As `stat`."""
        return self.stat()

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """What lies below, one level deep.

        Raises:
            FileNotFoundError: there is nothing.
        """
        listing = self.listing()
        if not listing:
            raise NotFoundError("no such folder", file=str(self))
        for name in sorted({*listing.files, *listing.folders}):
            yield self / name

    def glob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """What lies below, one level deep or, for ``*/name``, two, with names of the pattern."""
        first, _slash, rest = pattern.partition("/")
        for path in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(path.name, first):
                if not rest:
                    yield path
                elif path.is_dir():
                    yield from path.glob(rest)

    def rglob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """What lies below, however deep, with names of the pattern."""
        yield from self.glob(pattern)
        for path in self.iterdir() if self.is_dir() else ():
            if path.is_dir():
                yield from path.rglob(pattern)

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
            InputError: it cannot be read.
        """
        return bytes(self.store.read(self.key).data)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def resolve(self, strict: bool = False) -> RemotePath:
        """Itself: there are no links."""
        return self

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def samefile(self, other_path: Any) -> bool:
        """Whether both are called the same."""
        return str(self) == str(other_path)
