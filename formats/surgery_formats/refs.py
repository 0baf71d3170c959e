# SPDX-License-Identifier: Apache-2.0
"""References to models: what lies here always wins; the hub is asked only for what the user wrote as a name of the hub.

path                      a file or folder
hf://org/name[@rev][:file]   always the hub
org/name[@rev][:file]     the hub, if neither that path nor a folder ``org`` is here
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.containers.weight_files import UNREAD_SUFFIXES, file_containers, holds_weights
from surgery_formats.errors import InputError, NotFoundError
from surgery_formats.text import closest, show

__all__ = ["HubName", "parse_hub_name", "resolve"]

_SCHEME = "hf://"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<repo>(?:{_WORD}/)?{_WORD})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,250}}))?(?::(?P<file>[^:\\\0]{{1,500}}))?"
)
# Weights nobody asked for here; a repository often holds its model several times over.
_OTHER_WEIGHTS = (
    *(f"*{suffix}" for suffix in UNREAD_SUFFIXES),
    *("*.tflite", "*.mlpackage/*", "original/*", "consolidated*"),
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A name of the hub.

    Attributes:
        repo: ``org/name``, or ``name`` for the few without an organisation.
        revision: Branch, tag or commit; None is the default branch.
        file: One file of it; None is all.
    """

    repo: str
    revision: str | None = None
    file: str | None = None


def parse_hub_name(reference: str) -> HubName | None:
    """Take ``[hf://]org/name[@rev][:file]`` apart; None if `reference` is not of that form."""
    found = _HUB.fullmatch(reference.removeprefix(_SCHEME))
    if found is None or not (reference.startswith(_SCHEME) or "/" in found["repo"]):
        return None
    if found["file"] is not None and (found["file"].startswith("/") or ".." in found["file"].split("/")):
        return None
    return HubName(found["repo"], found["revision"], found["file"])


def resolve(reference: str | os.PathLike[str]) -> Path:
    """Where `reference` lies on this machine; a repository of the hub is downloaded into the hub's own cache first.

    Raises:
        NotFoundError: nothing local has that name, and it is no name of the hub, or the hub does not give it.
        InputError: it is a name of the hub, and huggingface_hub is not installed.
    """
    text = os.fspath(reference)
    path = Path(text)
    if text and _exists(path):
        return path
    name = parse_hub_name(text)
    if not text.startswith(_SCHEME) and (name is None or _looks_local(name.repo)):
        raise NotFoundError("no such file or folder", file=text, hint=_hint(path, name))
    if name is None:
        raise NotFoundError(
            "not a name of the hub", file=text, hint="write hf://org/name, @revision and :file optional"
        )
    return _download(name, text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a null character: nothing has such a name
        return False


def _looks_local(repo: str) -> bool:
    """A misspelt path must not become a request to the network."""
    return _exists(Path(repo.split("/")[0])) or repo.lower().endswith(".json") or holds_weights(repo.lower())


def _hint(path: Path, name: HubName | None) -> str | None:
    try:
        found = closest(path.name, sorted(os.listdir(path.parent)))
    except (OSError, ValueError):
        found = None
    if found is None and name is not None:
        return f"write {_SCHEME}{show(name.repo)} if you mean the hub"
    return found


def _near(text: str) -> str | None:
    """A folder here whose name is nearly the first one of `text`."""
    return None if text.startswith(_SCHEME) else closest(text.split("/")[0], sorted(os.listdir()))


def _download(name: HubName, text: str) -> Path:
    hub = _hub()
    try:
        if name.file is not None:
            return Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision))
        first, *others = file_containers().values()
        ignored = [*_OTHER_WEIGHTS, *(f"*{suffix}" for container in others for suffix in container.suffixes)]
        folder = Path(hub.snapshot_download(name.repo, revision=name.revision, ignore_patterns=ignored))
        if not any(
            path.name.endswith(first.suffixes) for path in folder.rglob("*")
        ):  # an older repository has pickles only
            ignored = list(_OTHER_WEIGHTS)
            folder = Path(hub.snapshot_download(name.repo, revision=name.revision, ignore_patterns=ignored))
    except Exception as error:  # whatever the hub's client and the HTTP library below it raise
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the hub
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise NotFoundError(
            f"nothing here has that name, and the hub did not give it: {show(said, 300)}",
            file=text,
            hint=_near(text) or "check the name; a gated or private repository needs 'hf auth login'",
        ) from error
    return folder


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InputError(
            "names of the hub need the package huggingface_hub",
            hint="pip install huggingface_hub, or download the repository and name its folder",
        ) from error
