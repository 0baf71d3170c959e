# SPDX-License-Identifier: Apache-2.0
"""One bucket, through obstore: what it holds, ranges of objects, uploads; its faults as errors of ours.

Requests that fail on the way are repeated by obstore, with growing pauses; what remains becomes one message. Listings are
remembered for a few seconds, since readers ask for dozens of files that are not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from surgery_formats.allocator import keep_large_blocks, limit_arenas
from surgery_formats.errors import InputError, NotFoundError, OutputExistsError, ProofError, ResourceError, SurgeryError
from surgery_formats.extras import require
from surgery_formats.files.remote.store import Listing, ObjectFacts, Reply
from surgery_formats.text import show

__all__ = ["Bucket", "connect"]

_log = logging.getLogger("surgery.remote")

RETRIES = 8
"""How often a request is repeated: within about half a minute."""
_REMEMBERED = 10.0  # seconds
_ASKED_AGAIN = 2
_DELETED_AT_ONCE = 1000
_PAUSE = 0.2  # seconds
_ANSWER = timedelta(minutes=5)  # for one request with its body
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
Answer = TypeVar("Answer")
_STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}


@functools.cache
def connect(scheme: str, name: str) -> Bucket:
    """The bucket of this name; there is one object for each, so that its connections are used again.

    Raises:
        InputError: obstore is not installed, or the environment's settings are not taken.
    """
    limit_arenas()  # before obstore starts its threads
    keep_large_blocks()
    obstore = require("obstore", "names of object storage")
    options: dict[str, Any] = {"timeout": _ANSWER, "connect_timeout": timedelta(seconds=10)}
    if any(os.environ.get(variable, "").startswith("http://") for variable in _ENDPOINTS[scheme]):
        options["allow_http"] = True  # whoever names such an endpoint means it
    retries = {"max_retries": RETRIES, "retry_timeout": timedelta(minutes=2)}
    try:
        kind = getattr(importlib.import_module("obstore.store"), _STORES[scheme])
        store = kind(name, client_options=options, retry_config=retries, **_credentials(scheme))
    except Exception as error:  # of settings in the environment: many types
        hint = _CREDENTIALS.get(scheme)
        raise InputError(f"cannot be connected to: {_said(error)}", file=f"{scheme}://{name}", hint=hint) from error
    return Bucket(scheme, name, obstore, store)


def _credentials(scheme: str) -> dict[str, Any]:
    """What finds keys in ``~/.aws``, which obstore does not read, if boto3 is there and no variable has them."""
    told = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    container = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    files = (os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials", "~/.aws/config")
    if scheme != "s3" or any(os.environ.get(variable) for variable in (*told, *container)):
        return {}
    if not any(os.path.exists(os.path.expanduser(file)) for file in files):
        return {}
    try:
        provider = importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider()
    except ImportError:
        return {}
    return {"credential_provider": provider}


class Bucket:
    """A bucket; every method may be called from any thread.

    Attributes:
        scheme: Of which store it is.
        name: Its name.
        lost: How many requests have failed because the store could not be reached, or was not able to answer.
    """

    def __init__(self, scheme: str, name: str, library: ModuleType, store: Any) -> None:
        self.scheme = scheme
        self.name = name
        self.obstore = library
        self.store = store
        self.lost = 0
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, Listing]] = {}

    def url(self, key: str) -> str:
        """How an object is called in messages."""
        return f"{self.scheme}://{self.name}/{key}"

    def listing(self, prefix: str) -> Listing:
        """What lies below `prefix`, one level deep; a few seconds old at most.

        Raises:
            InputError: the bucket cannot be listed.
        """
        now = time.monotonic()
        if (known := self.remembered(prefix)) is not None:
            return known
        with self.faults(prefix):
            found = self.whole_answer(lambda: self.obstore.list_with_delimiter(self.store, prefix or None))
        inside = f"{prefix}/" if prefix else ""
        files = {
            meta["path"].removeprefix(inside): _facts(meta)
            for meta in found["objects"]
            if meta["path"].startswith(inside) and meta["path"] != inside
        }
        folders = frozenset(str(path).removeprefix(inside).rstrip("/") for path in found["common_prefixes"])
        listing = Listing(files, folders)
        with self._lock:
            self._seen = {at: seen for at, seen in self._seen.items() if now - seen[0] < _REMEMBERED}
            self._seen[prefix] = now, listing
        return listing

    def remembered(self, prefix: str) -> Listing | None:
        """The listing of `prefix`, if it was made in the last seconds."""
        with self._lock:
            when, known = self._seen.get(prefix, (0.0, None))
        return known if known is not None and time.monotonic() - when < _REMEMBERED else None

    def all_below(self, prefix: str) -> dict[str, ObjectFacts]:
        """Every object below `prefix`, however deep, by its name from there.

        Raises:
            InputError: the bucket cannot be listed.
        """
        inside = f"{prefix}/" if prefix else ""
        with self.faults(prefix):
            chunks = self.whole_answer(lambda: list(self.obstore.list(self.store, prefix or None)))
        return {meta["path"].removeprefix(inside): _facts(meta) for chunk in chunks for meta in chunk}

    def facts(self, key: str) -> ObjectFacts:
        """What the object is now.

        Raises:
            NotFoundError: there is none.
            InputError: it cannot be asked for.
        """
        with self.faults(key):
            return _facts(self.obstore.head(self.store, key))

    def facts_if_any(self, key: str) -> ObjectFacts | None:
        """As `facts`; None if there is none."""
        try:
            return self.facts(key)
        except NotFoundError:
            return None

    def read(
        self, key: str, start: int = 0, stop: int | None = None, etag: str = "", version: str | None = None
    ) -> Reply:
        """A range of an object, as far as it goes.

        Args:
            key: The object.
            start: The first byte.
            stop: The byte behind the last one; None reads to the end.
            etag: What the object must still have.
            version: Which of its versions is read.

        Raises:
            NotFoundError: there is none.
            ProofError: it has another etag.
            InputError: it cannot be read.
        """
        options: dict[str, Any] = {"range": (start, stop)} if stop is not None else {}
        if etag:
            options["if_match"] = etag
        if version is not None:
            options["version"] = version
        with self.faults(key):
            return self.whole_answer(lambda: self._read(key, options))

    def _read(self, key: str, options: dict[str, Any]) -> Reply:
        _log.debug("get %s %s", self.url(key), options.get("range", ""))
        got = self.obstore.get(self.store, key, options=options)
        return Reply(memoryview(got.bytes()), _facts(got.meta))

    def whole_answer(self, ask: Callable[[], Answer], again: Callable[[], bool] = lambda: True) -> Answer:
        """Ask again if a connection was dropped in the middle of an answer, which obstore does not, as long as `again`."""
        for _ in range(_ASKED_AGAIN):
            try:
                return ask()
            except self.obstore.exceptions.GenericError as error:
                if "body error" not in str(error) or not again():
                    raise
        return ask()

    def put(self, key: str, data: bytes, *, new: bool = False) -> None:
        """Write a small object in one request.

        Args:
            key: The object.
            data: What it will hold.
            new: Whether one that is there is left alone.

        Raises:
            OutputExistsError: it is there.
            ResourceError: it cannot be written.
        """
        mode = "create" if new else "overwrite"
        self.forget()
        try:
            with self.faults(key, writing=True):
                self._repeated(partial(self.obstore.put, self.store, key, data, mode=mode, use_multipart=False))
        except OutputExistsError:
            # What is there may be this, if the answer to the first request was lost.
            if self.read(key).data != data:
                raise

    def copy(self, key: str, to: str) -> None:
        """Have the store copy an object; what is at `to` gives way.

        Raises:
            NotFoundError: there is none.
            ResourceError: the store does not copy it.
        """
        self.forget()
        with self.faults(key, writing=True):
            self._repeated(partial(self.obstore.copy, self.store, key, to))

    def delete(self, keys: list[str]) -> None:
        """Delete objects, there or not.

        Raises:
            ResourceError: they cannot be deleted.
        """
        # Of one that is not there S3 says nothing, and other stores an error. S3 takes many with one request.
        step = _DELETED_AT_ONCE if self.scheme == "s3" else 1
        for start in range(0, len(keys), step):
            some = keys[start : start + step]
            with self.faults(some[0], writing=True), contextlib.suppress(FileNotFoundError):
                self._repeated(partial(self.obstore.delete, self.store, some))
        self.forget()

    def _repeated(self, ask: Callable[[], object]) -> None:
        """Make a request that does no harm if it is made twice, though obstore does not know that and would not repeat it."""
        for attempt in range(_ASKED_AGAIN):
            try:
                ask()
                return
            except self.obstore.exceptions.GenericError as error:
                if _STATUS.search(str(error)):
                    raise
                time.sleep(_PAUSE * 4**attempt)
        ask()

    def forget(self) -> None:
        """Forget the listings: something was written."""
        with self._lock:
            self._seen.clear()

    @contextlib.contextmanager
    def faults(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Turn obstore's errors on the object `key` into ours, with what to do."""
        try:
            yield
        except SurgeryError:
            raise
        except FileNotFoundError as error:
            raise NotFoundError(*_missing(error), file=self.url(key)) from error
        except self.obstore.exceptions.BaseError as error:
            raise self._fault(error, key, writing) from error

    def _fault(self, error: Exception, key: str, writing: bool) -> SurgeryError:
        faults, file = self.obstore.exceptions, self.url(key)
        text = str(error).partition("\n\nDebug source")[0]
        kind = ResourceError if writing else InputError
        status = found[1] if (found := _STATUS.search(text)) else ""
        if "NoSuchBucket" in text:
            return NotFoundError("no such bucket", file=file)
        if isinstance(error, faults.AlreadyExistsError):
            return OutputExistsError("exists", file=file)
        if isinstance(error, faults.PreconditionError):
            return ProofError("the input changed while it was read", file=file, hint="run again")
        if status == "403":
            hint = (
                "check what these credentials may do here; a region or an endpoint that is not the bucket's looks alike"
            )
            return kind("access is denied", file=file, hint=hint)
        if status == "401":
            return kind("the credentials are not accepted", file=file, hint="they may be wrong, or no longer good")
        if "169.254.169.254" in text or "metadata.google" in text:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
            return kind("no credentials were found", file=file, hint=_CREDENTIALS.get(self.scheme, hint))
        if "without LOCATION" in text or "AuthorizationHeaderMalformed" in text:
            return kind("the bucket is in another region", file=file, hint="name it with AWS_REGION")
        if status:
            self.lost += status >= "500"
            said = text[text.index("status code: ") + len("status code: ") :]
            return kind(f"the store answers {_said(said.rstrip(': '))}", file=file, hint="run again, or ask its keeper")
        if "scheme is not allowed" in text:
            return kind(
                "plain http:// is refused", file=file, hint=f"name the endpoint with {_ENDPOINTS[self.scheme][0]}"
            )
        self.lost += 1
        hint = "check the endpoint and the network, and run again"
        return kind(f"the connection failed, and {RETRIES} repetitions did not help", file=file, hint=hint)


_STATUS = re.compile(r"status code: (\d+)")
_CREDENTIALS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run 'gcloud auth application-default login'",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


def _missing(error: Exception) -> tuple[str]:
    return ("no such bucket",) if "NoSuchBucket" in str(error) else ("no such object",)


def _facts(meta: Any) -> ObjectFacts:
    version = meta.get("version")
    return ObjectFacts(int(meta["size"]), meta.get("e_tag") or "", None if version == "null" else version)


def _said(error: object) -> str:
    """The first line of what a library says, as one line that can be shown."""
    return show(next(iter(str(error).splitlines()), "") or type(error).__name__, 300)
