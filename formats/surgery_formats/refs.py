# SPDX-License-Identifier: Apache-2.0
"""References to models. Local paths always win; the hub is contacted only for names written as hub names.

path                        a file or folder
hf://org/name[@rev][:file]  always the hub
hf://org/name@commit/file   a file there, as messages and manifests call it
s3://, gs://, az://         object storage, read where it lies
org/name[@rev][:file]       the hub, if neither that path nor a folder ``org`` exists here

Weights on the hub are read where they lie, too, as far as headers and samples go; what is read in full goes into the hub's
own cache (`surgery_formats.files.remote.hub`).
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
from surgery_formats.errors import NotFoundError, SurgeryError
from surgery_formats.files.remote.hub import HubRepository, library, open_repository
from surgery_formats.files.remote.hub_faults import fault_of, is_out_of_reach
from surgery_formats.files.remote.path import RemotePath, is_remote, to_path
from surgery_formats.text import closest, show

__all__ = ["HubName", "parse_hub_name", "resolve"]

_SCHEME = "hf://"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<repo>(?:{_WORD}/)?{_WORD})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,250}))?(?::(?P<file>[^:\\\0]{1,500}))?"
)
# How a repository is written elsewhere: the address of its page, or the scheme with a slash too few.
_ADDRESS = re.compile(rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/?)(?P<repo>(?:{_WORD}/)?{_WORD})")
_INSIDE = re.compile(rf"{_SCHEME}(?P<repo>{_WORD}/{_WORD})/(?P<file>.*)")
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
    """Return the path of `reference`: here, in a bucket, or on the hub, of which nothing but a listing was asked for yet.

    Raises:
        NotFoundError: there is no such local path, and `reference` is not a hub name, or there is nothing there.
        InputError: `reference` is a hub name, but huggingface_hub is not installed, or the hub does not let us in.
    """
    text = os.fspath(reference)
    if is_remote(text):
        return _in_a_bucket(text)
    path = Path(text)
    if text and _exists(path):
        return path
    name = parse_hub_name(text)
    if not text.startswith(_SCHEME) and (name is None or _looks_local(name.repo)):
        raise NotFoundError("no such file or folder", file=text, hint=_hint(text, name))
    if name is None:
        hint = "write hf://org/name; @revision and :file are optional"
        if inside := _INSIDE.fullmatch(text):
            file = inside["file"].strip("/")
            hint = f"write {_SCHEME}{inside['repo']}" + (f":{show(file)}, a file follows a colon" if file else "")
        raise NotFoundError("not a hub name", file=text, hint=hint)
    return _on_the_hub(name, text)


def _in_a_bucket(text: str) -> Path:
    path = to_path(text)
    if not isinstance(path, RemotePath) or not path.is_plain:
        raise NotFoundError("not the name of an object", file=text, hint="write s3://bucket/name")
    if text.startswith(_SCHEME):
        repo, _, rest = text.removeprefix(_SCHEME).partition("@")
        commit, _, file = rest.partition("/")
        root = _on_the_hub(HubName(repo, commit, None), text)
        return root / file if file else root
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or contains a null character
        return False


def _looks_local(repo: str) -> bool:
    """Whether `repo` looks like a misspelt path, which must not become a network request."""
    return _exists(Path(repo.split("/")[0])) or _ends_as_a_file(repo)


def _ends_as_a_file(repo: str) -> bool:
    """Whether it ends as a file of weights or a configuration does, and no repository."""
    return repo.lower().endswith(".json") or holds_weights(repo.lower())


def _hint(text: str, name: HubName | None) -> str | None:
    if address := _ADDRESS.match(text):
        return f"write {_SCHEME}{show(address['repo'])} if you mean the hub"
    path = Path(text)
    try:
        hint = closest(path.name, sorted(os.listdir(path.parent)), within=str(path.parent))
    except (OSError, ValueError):
        hint = None
    if hint is None and name is not None and not _ends_as_a_file(name.repo):
        return f"write {_SCHEME}{show(name.repo)} if you mean the hub"
    return hint


def _on_the_hub(name: HubName, text: str) -> Path:
    try:
        repository = _repository_or_cached(name, text)
    except SurgeryError as error:
        error.file = error.file or text
        if not text.startswith(_SCHEME):  # it may be a misspelt path
            error.message = (
                f"no file or folder of this name is here, so it was taken for one on the hub: {error.message}"
            )
            error.hint = closest(text.split("/")[0], sorted(os.listdir())) or error.hint
        raise
    if isinstance(repository, Path):
        return repository
    _hide_other_copies(repository)
    root = RemotePath(f"{_SCHEME}{repository.name}")
    if name.file is None:
        _needs_a_file_named(repository, text)
        return repository.folder_if_cached() or root
    repository.facts(name.file)
    if is_weight_file(name.file):  # the other files of a split GGUF are found beside it
        return (None if series(Path(name.file)) else repository.cached(name.file)) or root / name.file
    return _downloaded(repository, name.file)


def _repository_or_cached(name: HubName, text: str) -> HubRepository | Path:
    """The repository, or without a network what the hub's cache holds of it."""
    if library().constants.HF_HUB_OFFLINE:
        return _from_cache(name, text)
    try:
        return open_repository(name.repo, name.revision, text)
    except SurgeryError as error:
        if error.__cause__ is None or not is_out_of_reach(error.__cause__):
            raise
        try:
            return _from_cache(name, text)
        except NotFoundError:
            raise error from error.__cause__


def _needs_a_file_named(repository: HubRepository, text: str) -> None:
    """Refuse a repository that holds nothing but copies of which one has to be chosen."""
    seen = repository.visible
    hidden = sorted(name for name in repository.all_names if name not in seen and holds_weights(name))
    if hidden and not any(holds_weights(name) for name in seen):
        hint = f"name one, such as {_SCHEME}{show(repository.repo)}:{show(hidden[0])}"
        raise NotFoundError(
            f"no model that is read as a whole, but {len(hidden)} files of weights", file=text, hint=hint
        )


def _downloaded(repository: HubRepository, file: str) -> Path:
    """A file that other libraries read from a disk; the weights of a graph lie beside it, there as in the repository."""
    path = repository.download(file)
    for location in external_locations(path) if file.endswith(ONNX.suffixes) else ():
        repository.download((Path(file).parent / location).as_posix())
    return path


def _hide_other_copies(repository: HubRepository) -> None:
    """Leave out of listings what is no part of the model: one repository often holds it several times over."""
    first, *others = file_containers().values()
    unread = [*_OTHER_COPIES, *(f"*{suffix}" for suffix in UNREAD_SUFFIXES if not is_weight_file(f"x{suffix}"))]
    unread += [f"*{suffix}" for suffix in GGUF.suffixes]  # one model in twenty sizes: its file must be named
    repository.hidden = [*unread, *(f"*{suffix}" for container in others for suffix in container.suffixes)]
    if not any(name.endswith(first.suffixes) for name in repository.visible):
        repository.hidden = unread  # an older repository: pickles


def _from_cache(name: HubName, text: str) -> Path:
    """What the hub's cache holds, without a network.

    Raises:
        NotFoundError: nothing.
    """
    hub = library()
    try:
        if name.file is None:
            return Path(hub.snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        return Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision, local_files_only=True))
    except Exception as error:  # the hub's client and its HTTP library raise many types
        raise fault_of(error, text, name.repo) from error
