# SPDX-License-Identifier: Apache-2.0
"""A repository of the Hugging Face hub at one commit: its files by ranges, and whole ones through the hub's own cache.

The listing, headers and samples come over the network as they are asked for. What is small, or read in full, is downloaded
into the cache once, where other programs find it too. A branch stands for one commit from the first look on.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import logging
import os
import threading
import time
import urllib.parse
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from surgery_formats.errors import InputError, NotFoundError, ProofError, SurgeryError
from surgery_formats.extras import require
from surgery_formats.files.remote.hub_faults import cache_fault, fault_of, is_dropped, is_expired
from surgery_formats.files.remote.store import HEAD, Listing, ObjectFacts, Reply

__all__ = ["HubRepository", "library", "open_repository", "repeated", "repository_of"]

_log = logging.getLogger("surgery.remote")

_SMALL = 1 << 20
"""Bytes of a file that is downloaded at once."""
_LEAST_BY_RANGES, _MOST_BY_RANGES = 4 << 20, 32 << 20
"""Bytes of a file that come in ranges before all of it is downloaded: an eighth of it, within these, and less than half."""
_HEADS = 64
"""First ranges that are kept: commands open a file more than once, and its header is what they want of it."""
_REMEMBERED = 60.0  # seconds that a branch stays where it was seen
_LOCATION = 300.0  # seconds; signed addresses are good for an hour
_TRIES = 4
_PAUSE = 0.2  # seconds
_SECONDS = 30  # without a byte
Answer = TypeVar("Answer")


def library(purpose: str = "names on the hub", otherwise: str = "download the repository and give its folder") -> Any:
    """huggingface_hub.

    Args:
        purpose: What needs it, in the plural.
        otherwise: What can be done without it.

    Raises:
        MissingPackageError: it is not installed.
        InputError: it is too old.
    """
    hub = require("huggingface_hub", purpose, otherwise=otherwise)
    if hub.__version__.startswith("0."):
        raise InputError(f"huggingface_hub {hub.__version__} is too old", hint="pip install -U huggingface_hub")
    for part in ("constants", "errors", "utils"):  # it is lazy, and has no attributes for them before
        importlib.import_module(f"huggingface_hub.{part}")
    return hub


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the hub sends who asks for a file."""

    url: str
    until: float


class HubRepository:
    """The files of one commit; every method may be called from any thread.

    Attributes:
        name: ``org/name@commit``, what its paths begin with.
        repo: ``org/name``.
        commit: 40 hexadecimal digits.
        hidden: Patterns of files that listings leave out, such as other copies of the weights.
    """

    def __init__(self, repo: str, revision: str | None, commit: str, tree: dict[str, ObjectFacts]) -> None:
        self.name = f"{repo}@{commit}"
        self.repo = repo
        self.commit = commit
        self.hidden: Sequence[str] = ()
        self._revision = revision
        self._tree = tree
        self._lock = threading.Lock()
        self._busy: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._by_ranges: defaultdict[str, int] = defaultdict(int)
        self._cached: dict[str, Path] = {}
        self._locations: dict[str, _Location] = {}
        self._heads: OrderedDict[str, bytes] = OrderedDict()

    def url(self, key: str) -> str:
        """How a file is called in messages, and can be given again."""
        return f"hf://{self.name}/{key}"

    @property
    def all_names(self) -> list[str]:
        """The names of all files."""
        return list(self._tree)

    @property
    def visible(self) -> list[str]:
        """The names of files that listings have."""
        return [name for name in self._tree if not any(fnmatch.fnmatch(name, pattern) for pattern in self.hidden)]

    def listing(self, prefix: str) -> Listing:
        """What lies below `prefix`, one level deep, without what is hidden."""
        return _one_level(self.all_below(prefix))

    def remembered(self, prefix: str) -> Listing | None:
        """As `listing`, with what is hidden: who knows its name gets it."""
        inside = f"{prefix}/" if prefix else ""
        return _one_level(
            {name.removeprefix(inside): told for name, told in self._tree.items() if name.startswith(inside)}
        )

    def all_below(self, prefix: str) -> dict[str, ObjectFacts]:
        """Every file below `prefix`, however deep, without what is hidden."""
        inside = f"{prefix}/" if prefix else ""
        return {name.removeprefix(inside): self._tree[name] for name in self.visible if name.startswith(inside)}

    def facts(self, key: str) -> ObjectFacts:
        """What the file is, hidden or not.

        Raises:
            NotFoundError: there is none.
        """
        if (found := self._tree.get(key)) is None:
            raise NotFoundError("no such file in the repository", file=self.url(key))
        return found

    def facts_if_any(self, key: str) -> ObjectFacts | None:
        """As `facts`; None if there is none."""
        return self._tree.get(key)

    def read(
        self, key: str, start: int = 0, stop: int | None = None, etag: str = "", version: str | None = None
    ) -> Reply:
        """A range of a file, as far as it goes; `etag` and `version` are this commit's.

        Raises:
            NotFoundError: there is none.
            ProofError: the hub gives something else than it lists.
            InputError: it cannot be read.
        """
        facts = self.facts(key)
        stop = facts.size if stop is None else min(stop, facts.size)
        local = self.cached(key)
        if local is None and stop <= len(head := self._heads.get(key, b"")):
            return Reply(memoryview(head)[start:stop], facts)
        if local is None and self._is_wanted_whole(key, facts, stop - start):
            local = self.download(key)
        if local is None:
            return Reply(memoryview(self._range(key, facts, start, stop)), facts)
        with local.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise ProofError("the hub's cache holds a shorter file", file=local, hint="remove it, and run again")
        return Reply(memoryview(data), facts)

    def cached(self, key: str) -> Path | None:
        """Where the file lies in the hub's cache, if it does."""
        if (known := self._cached.get(key)) is not None:
            return known
        found = library().try_to_load_from_cache(self.repo, key, revision=self.commit)
        if not isinstance(found, str):
            return None
        self._cached[key] = Path(found)
        return self._cached[key]

    def folder_if_cached(self) -> Path | None:
        """The folder of this commit in the cache, if all that is visible lies there."""
        names = self.visible
        if not names or any(self.cached(name) is None for name in names):
            return None
        return Path(*self._cached[names[0]].parts[: -len(names[0].split("/"))])

    def download(self, key: str) -> Path:
        """Put the whole file into the cache.

        Raises:
            InputError: it cannot be read.
            ProofError: it is another one than was listed.
        """
        with self._lock:
            busy = self._busy[key]
        with busy:
            if (found := self.cached(key)) is not None:
                return found
            hub = library()
            with self._faults(key):
                # By the name of the branch, so that the cache knows it when there is no network; it may have moved.
                path = Path(hub.hf_hub_download(self.repo, key, revision=self._revision))
                if self.commit not in path.parts:
                    path = Path(hub.hf_hub_download(self.repo, key, revision=self.commit))
            if path.stat().st_size != self.facts(key).size:
                raise ProofError("the downloaded file has another size than the hub lists", file=self.url(key))
            self._cached[key] = path
            return path

    def _is_wanted_whole(self, key: str, facts: ObjectFacts, nbytes: int) -> bool:
        with self._lock:
            self._by_ranges[key] += nbytes
            most = min(max(facts.size // 8, _LEAST_BY_RANGES), _MOST_BY_RANGES, facts.size // 2)
            return facts.size <= _SMALL or self._by_ranges[key] > most

    def _range(self, key: str, facts: ObjectFacts, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        _log.debug("get %s, bytes %d to %d", self.url(key), start, stop)

        def ask() -> bytes:
            return self._ranged(key, facts, start, stop)

        def look_again() -> None:
            self._locations.pop(key, None)

        with self._faults(key):
            known = key in self._locations  # an address that expires does so for all threads, and the first forgets it
            try:
                data = repeated(ask, look_again)
            except Exception as error:  # of two HTTP libraries without a common base; others go on
                if not (is_expired(error) and (known or key in self._locations)):
                    raise
                look_again()
                data = repeated(ask, look_again)
        if start == 0:
            with self._lock:
                self._heads[key] = data[:HEAD]
                while len(self._heads) > _HEADS:
                    self._heads.popitem(last=False)
        return data

    def _ranged(self, key: str, facts: ObjectFacts, start: int, stop: int) -> bytes:
        tools, url = library().utils, self._location(key, facts)
        sent = tools.build_hf_headers(library_name="surgery") if _origin(url) == _origin(self._endpoint()) else {}
        asked = {**sent, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        to_others = not sent  # who is sent the token sends nobody on
        with tools.get_session().stream(
            "GET", url, headers=asked, follow_redirects=to_others, timeout=_SECONDS
        ) as answer:
            tools.hf_raise_for_status(answer)
            told = f"bytes {start}-{stop - 1}/{facts.size}"
            if answer.status_code != 206 or answer.headers.get("Content-Range", told) != told:
                raise InputError("the hub does not answer with the range that was asked for", file=self.url(key))
            data = bytearray()
            for piece in answer.iter_raw():
                data += piece
                if len(data) > stop - start:
                    break
        if len(data) != stop - start:
            raise ConnectionResetError(f"{len(data)} bytes of {stop - start}")
        return bytes(data)

    def _location(self, key: str, facts: ObjectFacts) -> str:
        """Where its bytes are, asked for with the token; the address itself may be another host's, and a secret."""
        with self._lock:
            asking = self._asking[key]
        with asking:  # once, however many threads want a range
            if (known := self._locations.get(key)) is None or time.monotonic() >= known.until:
                known = self._locations[key] = self._ask_location(key, facts)
            return known.url

    def _ask_location(self, key: str, facts: ObjectFacts) -> _Location:
        hub = library()
        told = hub.get_hf_file_metadata(
            hub.hf_hub_url(self.repo, key, revision=self.commit, endpoint=self._endpoint()), timeout=_SECONDS
        )
        if told.commit_hash not in (None, self.commit) or (told.etag, told.size) != (facts.etag, facts.size):
            raise ProofError("the hub gives another file than it lists", file=self.url(key), hint="run again")
        return _Location(str(told.location), time.monotonic() + _LOCATION)

    def _endpoint(self) -> str:
        return str(library().constants.ENDPOINT)

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        try:
            yield
        except SurgeryError:
            raise
        except Exception as error:  # the hub's client and its HTTP library raise many types
            if isinstance(error, OSError) and error.errno is not None and not is_dropped(error):
                if (fault := cache_fault(error)) is not None:
                    raise fault from error
                raise  # the disk, not the hub
            raise fault_of(error, self.url(key), self.repo) from error


_opened: dict[tuple[str, str | None], tuple[float, HubRepository]] = {}
_lock = threading.Lock()


def open_repository(repo: str, revision: str | None, shown: str | os.PathLike[str]) -> HubRepository:
    """The repository at the commit that `revision` stands for: one request, and none for the next minute.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit; None for the default branch.
        shown: What messages call it.

    Raises:
        InputError: it cannot be read, and why.
    """
    with _lock:
        when, known = _opened.get((repo, revision), (0.0, None))
    if known is not None and time.monotonic() - when < _REMEMBERED:
        return known
    hub = library()
    try:
        told = repeated(lambda: hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_SECONDS))
    except Exception as error:  # the same; a fault of this machine goes on as it is
        if isinstance(error, OSError) and error.errno is not None and not is_dropped(error):
            raise
        raise fault_of(error, shown, repo) from error
    tree = {file.rfilename: _facts(file, told.sha) for file in told.siblings if file.size is not None}
    opened = HubRepository(repo, revision, told.sha, tree)
    with _lock:
        for key in ((repo, revision), (repo, told.sha)):
            _opened[key] = time.monotonic(), opened
    return opened


def repository_of(name: str) -> HubRepository:
    """The repository of ``org/name@commit``.

    Raises:
        InputError: it cannot be read.
    """
    repo, _, commit = name.partition("@")
    with _lock:
        _, known = _opened.get((repo, commit), (0.0, None))  # a commit stays what it is
    return known or open_repository(repo, commit, f"hf://{name}")


def _one_level(below: dict[str, ObjectFacts]) -> Listing:
    files = {name: told for name, told in below.items() if "/" not in name}
    return Listing(files, frozenset(name.partition("/")[0] for name in below if "/" in name))


def _facts(file: Any, commit: str) -> ObjectFacts:
    etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
    return ObjectFacts(int(file.size), str(etag), commit)


def repeated(ask: Callable[[], Answer], before: Callable[[], object] = lambda: None) -> Answer:
    """Ask again after a dropped connection; `before` each repetition."""
    for attempt in range(_TRIES - 1):
        try:
            return ask()
        except Exception as error:  # the same; only a lost connection is asked again
            if not is_dropped(error):
                raise
            before()
            time.sleep(_PAUSE * 4**attempt)
    return ask()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
