# SPDX-License-Identifier: Apache-2.0
"""A finished output sent to a repository of the Hugging Face hub: in one commit, so that all of it is seen there or nothing.

What can be refused is refused by `check_push`, before there is an output. Afterwards a folder and the branch hold the same
files: what the branch had besides is deleted by the same commit, since the shards of an older model would be loaded in the
place of the new ones.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.errors import InputError, OutputExistsError, ProofError, ResourceError, SurgeryError, UsageError
from surgery_formats.files.raw import stays_inside
from surgery_formats.files.remote.hub import library, repeated
from surgery_formats.files.remote.hub_faults import is_dropped, push_fault
from surgery_formats.text import show

__all__ = ["PushTarget", "Pushed", "check_push", "push"]

_THEIRS = ".gitattributes"  # the hub's own: which files are kept as large ones
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 30  # without a byte
_OFFLINE = "unset HF_HUB_OFFLINE, or push the output later with 'hf upload'"
_LOGIN = "set HF_TOKEN to a token that may write, or run 'hf auth login'"


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where an output goes on the hub.

    Attributes:
        repo: ``org/name``.
        branch: None for the default one. One that is not there is made, out of the default one.
        private: A repository that is made is private, and one that is there has to be.
        overwrite: Files that are there may be replaced or deleted.
        message: Of the commit, one line.
    """

    repo: str
    branch: str | None = None
    private: bool = False
    overwrite: bool = False
    message: str = "Upload model"

    @property
    def shown(self) -> str:
        """What messages call it, and how it can be read: ``hf://org/name@branch``."""
        return f"hf://{self.repo}" + (f"@{self.branch}" if self.branch else "")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is on the hub now.

    Attributes:
        repo: ``org/name``.
        commit: 40 hexadecimal digits.
        url: Its page.
        files: How many were pushed.
        nbytes: Their bytes.
        warnings: What the hub says of the model card.
    """

    repo: str
    commit: str
    url: str
    files: int
    nbytes: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Head:
    """What a branch holds; one that is not there yet begins as the default branch.

    Attributes:
        commit: Of the branch, or of that with which it begins.
        names: Its files.
        exists: Whether the branch is there.
        private: Whether the repository is.
    """

    commit: str
    names: frozenset[str]
    exists: bool
    private: bool


def check_push(target: PushTarget, only: str | None = None) -> None:
    """Refuse what could not be pushed; nothing is changed on the hub.

    Args:
        target: Where it would go.
        only: The name of the output, if it is a single file.

    Raises:
        UsageError: the name is none, or the environment forbids to ask the hub.
        OutputExistsError: the branch holds files.
        MissingPackageError: huggingface_hub is not installed.
        ResourceError: there is no token, or it may not write there.
    """
    hub = library("pushes to the hub", otherwise="push the output later")
    _check_name(hub, target)
    if hub.constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE forbids to ask the hub", file=target.shown, hint=_OFFLINE)
    if not hub.get_token():
        raise ResourceError("there is no token for the hub", file=target.shown, hint=_LOGIN)
    with _faults(target):
        if (head := _head(hub, target)) is None:
            _check_namespace(hub, target)
        else:
            _check_there(target, head, None if only is None else {only})
            _check_rights(hub, target)


def push(output: Path, target: PushTarget, *, bars: bool = False) -> Pushed:
    """Push a file, or all files of a folder but those whose names begin with a dot.

    Args:
        output: What was written; it is only read.
        target: Where it goes.
        bars: Whether huggingface_hub shows bars on stderr.

    Raises:
        SurgeryError: as `check_push`, which is asked again, or the push failed: the branch is as it was.
        ProofError: the hub holds other files than were sent.
    """
    files = _files(output)
    check_push(target, None if output.is_dir() else output.name)
    hub = library()
    with _faults(target), _silent(hub, bars=bars), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        head = _prepared(hub, target)
        gone = head.names - files.keys() - {_THEIRS} if output.is_dir() else frozenset()
        operations = [
            *(hub.CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(gone)),
            *(hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
        ]
        commit = _committed(
            lambda: hub.HfApi().create_commit(
                target.repo,
                operations,
                commit_message=target.message,
                revision=target.branch,
                parent_commit=head.commit,
            ),
            lambda: _moved(hub, target, head),
        )
        _prove(hub, target, commit, files, whole=output.is_dir())
    url = f"{hub.constants.ENDPOINT}/{target.repo}" + (f"/tree/{target.branch}" if target.branch else "")
    told = tuple(dict.fromkeys(" ".join(str(one.message).split()) for one in said if one.category is UserWarning))
    return Pushed(target.repo, commit, url, len(files), sum(path.stat().st_size for path in files.values()), told)


def _check_name(hub: Any, target: PushTarget) -> None:
    if target.repo.count("/") != 1:
        raise UsageError(f"'{show(target.repo)}' is not ORG/NAME", hint="write the user or the organisation before it")
    try:
        hub.utils.validate_repo_id(target.repo)
    except ValueError as error:
        raise UsageError(f"'{show(target.repo)}' is no name for a repository", hint=_rule(error)) from error
    if target.branch is not None and _COMMIT.fullmatch(target.branch):
        raise UsageError("a commit cannot be pushed to", file=target.shown, hint="name a branch, or nothing")


def _rule(error: ValueError) -> str:
    """The rule of the hub that a name breaks; the name itself is behind the colon."""
    return show(str(error).partition(":")[0], 200)


def _head(hub: Any, target: PushTarget) -> _Head | None:
    """What the branch holds now; None if there is no such repository that we may see."""

    def ask(revision: str | None) -> Any:
        return repeated(lambda: hub.HfApi().model_info(target.repo, revision=revision, timeout=_SECONDS))

    try:
        told, exists = ask(target.branch), True
    except hub.errors.RevisionNotFoundError:
        told, exists = ask(None), False
    except hub.errors.GatedRepoError:
        raise
    except hub.errors.RepositoryNotFoundError:
        return None
    return _Head(told.sha, frozenset(file.rfilename for file in told.siblings), exists, bool(told.private))


def _check_there(target: PushTarget, head: _Head, written: Collection[str] | None) -> None:
    """Refuse a repository that is public where a private one is wanted, and files that would be replaced unasked."""
    if target.private and not head.private:
        raise UsageError(
            "the repository is public",
            file=target.shown,
            hint="make it private on its page, or name a new one",
        )
    there = head.names - {_THEIRS} if written is None else head.names & set(written)
    if there and head.exists and not target.overwrite:
        first = min(there)
        what = f"'{show(first)}'" + (f" and {len(there) - 1} more" if len(there) > 1 else "")
        raise OutputExistsError(
            f"the branch holds files already: {what}",
            file=target.shown,
            hint="name another repository or a new @branch, or pass `overwrite=True`: the commits before stay in its history",
        )


def _check_rights(hub: Any, target: PushTarget) -> None:
    api = hub.HfApi()
    if (
        "write" in inspect.signature(api.auth_check).parameters
    ):  # huggingface_hub before 1.5: the push itself has to tell
        api.auth_check(target.repo, write=True)


def _check_namespace(hub: Any, target: PushTarget) -> None:
    """Refuse a repository that this token could not make, as far as the hub tells."""
    told = hub.HfApi().whoami()
    owner, _, _ = target.repo.partition("/")
    role = told.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ResourceError("the token may only read", file=target.shown, hint=_LOGIN)
    known = {told.get("name", ""), *(org.get("name", "") for org in told.get("orgs", ()))}
    if role == "write" and owner.lower() not in {name.lower() for name in known}:
        raise ResourceError(
            f"there is no such repository, and {show(told.get('name', ''))} may make none for '{show(owner)}'",
            file=target.shown,
            hint="check the name, or set HF_TOKEN to the token of a member",
        )


def _prepared(hub: Any, target: PushTarget) -> _Head:
    """The branch, which is made if it is not there."""
    api = hub.HfApi()
    if _head(hub, target) is None:
        api.create_repo(target.repo, private=target.private or None)  # otherwise as its owner has set it
    head = _head(hub, target)
    if head is None:
        raise ResourceError("the hub does not show the repository that it made", file=target.shown, hint="run again")
    if not head.exists:
        api.create_branch(target.repo, branch=target.branch)
    return head


def _committed(commit: Callable[[], Any], moved: Callable[[], str | None]) -> str:
    """The commit that was made; where its answer was lost, the branch tells whether it was."""
    try:
        return str(commit().oid)
    except Exception as error:  # the hub's client and its HTTP library raise many types
        if not is_dropped(error) or (found := moved()) is None:
            raise
        return found


def _moved(hub: Any, target: PushTarget, before: _Head) -> str | None:
    """The branch's commit, if it is another than before."""
    head = _head(hub, target)
    return None if head is None or head.commit == before.commit else head.commit


def _prove(hub: Any, target: PushTarget, commit: str, files: Mapping[str, Path], *, whole: bool) -> None:
    """Compare the hub's listing of `commit` with the files: names, sizes, hashes."""
    told = repeated(lambda: hub.HfApi().model_info(target.repo, revision=commit, files_metadata=True, timeout=_SECONDS))
    there = {file.rfilename: file for file in told.siblings}
    for name, path in files.items():
        if (file := there.get(name)) is None:
            hint = "a .gitignore of the repository may name it"
            raise ProofError("the hub left a file out", file=f"{target.shown}:{name}", hint=hint)
        same = file.size == path.stat().st_size and (
            file.blob_id == _blob(path) if file.lfs is None else file.lfs.sha256 == _sha256(path)
        )
        if not same:
            raise ProofError("the hub holds another file than was pushed", file=f"{target.shown}:{name}")
    if whole and (more := there.keys() - files.keys() - {_THEIRS}):
        raise ProofError("the hub holds a file that was not pushed", file=f"{target.shown}:{min(more)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blob(path: Path) -> str:
    """Git's hash of a small file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _files(output: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository."""
    if not output.is_dir():
        return {output.name: output}
    files = {
        path.relative_to(output).as_posix(): path
        for path in sorted(output.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(output).parts)
    }
    if outside := next((path for path in files.values() if not stays_inside(path)), None):
        raise InputError("the link leads out of its folder, and is not pushed", file=outside, hint="copy what it names")
    return files


@contextmanager
def _faults(target: PushTarget) -> Iterator[None]:
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # the hub's client and its HTTP library raise many types
        if isinstance(error, OSError) and error.errno is not None and not is_dropped(error):
            raise  # the disk, not the hub
        raise push_fault(error, target.shown) from error


@contextmanager
def _silent(hub: Any, *, bars: bool) -> Iterator[None]:
    """Without what huggingface_hub would print."""
    told, logs = hub.utils, hub.utils.logging
    verbosity, hidden = logs.get_verbosity(), told.are_progress_bars_disabled()
    logs.set_verbosity_error()
    if not bars:
        told.disable_progress_bars()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if not (bars or hidden):
            told.enable_progress_bars()
