# SPDX-License-Identifier: Apache-2.0
"""References to models. Local paths always win; the hub is contacted only for names written as hub names.

path                        a file or folder
hf://org/name[@rev][:file]  always the hub
s3://, gs://, az://         object storage, read where it lies
org/name[@rev][:file]       the hub, if neither that path nor a folder ``org`` exists here
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.gguf.container import GGUF
from surgery_formats.containers.gguf.splits import series
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.onnx.graph import external_locations
from surgery_formats.containers.weight_files import UNREAD_SUFFIXES, file_containers, holds_weights, is_weight_file
from surgery_formats.errors import NotFoundError
from surgery_formats.extras import require
from surgery_formats.files.remote.path import RemotePath, is_remote, to_path
from surgery_formats.text import closest, show

__all__ = ["HubName", "parse_hub_name", "resolve"]

_SCHEME = "hf://"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<repo>(?:{_WORD}/)?{_WORD})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,250}))?(?::(?P<file>[^:\\\0]{1,500}))?"
)
# Other copies of the weights; a repository often holds its model several times over.
_OTHER_COPIES = ("*.tflite", "*.mlpackage/*", "original/*", "consolidated*")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, or one file, on the hub.

    Attributes:
        repo: ``org/name``, or ``name`` for the few repositories without an organisation.
        revision: Branch, tag or commit; None for the default branch.
        file: A file in the repository; None for the whole repository.
    """

    repo: str
    revision: str | None = None
    file: str | None = None


def parse_hub_name(reference: str) -> HubName | None:
    """Parse ``[hf://]org/name[@rev][:file]``; None if `reference` does not have that form."""
    match = _HUB.fullmatch(reference.removeprefix(_SCHEME))
    if match is None or not (reference.startswith(_SCHEME) or "/" in match["repo"]):
        return None
    if match["file"] is not None and (match["file"].startswith("/") or ".." in match["file"].split("/")):
        return None
    return HubName(match["repo"], match["revision"], match["file"])


def resolve(reference: str | os.PathLike[str]) -> Path:
    """Return the local path of `reference`, downloading a hub repository into the hub's own cache first.

    Raises:
        NotFoundError: there is no such local path, and `reference` is not a hub name or cannot be downloaded.
        InputError: `reference` is a hub name, but huggingface_hub is not installed.
    """
    text = os.fspath(reference)
    if is_remote(text):
        return _in_a_bucket(text)
    path = Path(text)
    if text and _exists(path):
        return path
    name = parse_hub_name(text)
    if not text.startswith(_SCHEME) and (name is None or _looks_local(name.repo)):
        raise NotFoundError("no such file or folder", file=text, hint=_hint(path, name))
    if name is None:
        raise NotFoundError("not a hub name", file=text, hint="write hf://org/name; @revision and :file are optional")
    return _download(name, text)


def _in_a_bucket(text: str) -> Path:
    path = to_path(text)
    if not isinstance(path, RemotePath) or not path.is_plain:
        raise NotFoundError("not the name of an object", file=text, hint="write s3://bucket/name")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or contains a null character
        return False


def _looks_local(repo: str) -> bool:
    """Whether `repo` looks like a misspelt path, which must not become a network request."""
    return _exists(Path(repo.split("/")[0])) or repo.lower().endswith(".json") or holds_weights(repo.lower())


def _hint(path: Path, name: HubName | None) -> str | None:
    try:
        hint = closest(path.name, sorted(os.listdir(path.parent)))
    except (OSError, ValueError):
        hint = None
    if hint is None and name is not None:
        return f"write {_SCHEME}{show(name.repo)} if you mean the hub"
    return hint


def _near(text: str) -> str | None:
    """Hint at a local folder whose name is close to the first part of `text`."""
    return None if text.startswith(_SCHEME) else closest(text.split("/")[0], sorted(os.listdir()))


def _download(name: HubName, text: str) -> Path:
    hub = require("huggingface_hub", "names on the hub", otherwise="download the repository and give its folder")
    try:
        if name.file is not None:
            named = Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision))
            for other in series(Path(name.file)):  # the other files of a split GGUF lie beside it in the cache
                if other.name != named.name:
                    hub.hf_hub_download(name.repo, other.as_posix(), revision=name.revision)
            for location in external_locations(named) if name.file.endswith(ONNX.suffixes) else ():
                beside = Path(name.file).parent / location  # a graph's weights lie beside it in the repository, too
                hub.hf_hub_download(name.repo, beside.as_posix(), revision=name.revision)
            return named
        first, *others = file_containers().values()
        unread = [*_OTHER_COPIES, *(f"*{suffix}" for suffix in UNREAD_SUFFIXES if not is_weight_file(f"x{suffix}"))]
        unread += [f"*{suffix}" for suffix in GGUF.suffixes]  # one model in twenty sizes: its file must be named
        ignored = [*unread, *(f"*{suffix}" for container in others for suffix in container.suffixes)]
        folder = Path(hub.snapshot_download(name.repo, revision=name.revision, ignore_patterns=ignored))
        if not any(path.name.endswith(first.suffixes) for path in folder.rglob("*")):  # an older repository: pickles
            folder = Path(hub.snapshot_download(name.repo, revision=name.revision, ignore_patterns=unread))
    except Exception as error:  # the hub's client and its HTTP library raise many types
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the hub
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise NotFoundError(
            f"not found locally, and the hub could not provide it: {show(reason, 300)}",
            file=text,
            hint=_near(text) or "check the name; a gated or private repository needs 'hf auth login'",
        ) from error
    return folder
