# SPDX-License-Identifier: Apache-2.0
"""What huggingface_hub and its HTTP library raise, as errors of ours: who is not let in, what is not there, what is not reached.

Their own words are left out. They hold addresses, and those of files may be signed.
"""

from __future__ import annotations

import errno
import os

from surgery_formats.errors import InputError, MalformedError, NotFoundError, ProofError, ResourceError, SurgeryError
from surgery_formats.text import show

__all__ = ["cache_fault", "fault_of", "is_dropped", "is_expired", "is_offline", "is_out_of_reach", "push_fault"]

_GONE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "IncompleteSnapshotError"}
_DROPPED = {408, 425, 429, 500, 502, 503, 504}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_TRANSPORT = {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError", "ProxyError"}

_UNREACHED, _CHECK = "the hub cannot be reached", "check the network and HF_ENDPOINT"
_ANSWERS: dict[int, tuple[str, str | None, str | None]] = {
    401: (
        "the hub does not accept the token",
        "it may have expired: 'hf auth login'",
        "it may have expired: set HF_TOKEN, or run 'hf auth login'",
    ),
    402: ("the hub asks for a payment", None, "see the plan of its owner"),
    403: (
        "the hub denies access",
        "the token needs the right to read this repository",
        "the token needs the right to write to this repository; HF_TOKEN goes before 'hf auth login'",
    ),
    404: (
        "the hub has no such repository, or hides it",
        "a private repository needs HF_TOKEN or 'hf auth login'",
        "check the name; the token may not see a private repository",
    ),
    409: (
        "the hub answers that something is in the way",
        None,
        "the repository may be there and hidden from this token, or somebody else writes to it",
    ),
    412: ("the branch moved while it was pushed to", None, "look at it, and push again"),
    413: ("the files are too large for the hub", None, "a smaller `shard_size=` may help"),
    429: ("the hub has had too many requests", "wait, or set HF_TOKEN", "wait"),
}
"""Statuses of the hub: what is told, with a hint to one who reads and one to one who pushes; None where it says no more."""


def is_dropped(error: BaseException) -> bool:
    """Whether asking once more may help: the connection was lost, or the hub is busy."""
    if (status := _status(error)) is not None:
        return status in _DROPPED
    return bool(_names(error) & _TRANSPORT) and not is_offline(error)


def is_expired(error: BaseException) -> bool:
    """Whether an address that was signed for a while may be good no longer."""
    return _status(error) in (401, 403, 404, 410)


def is_offline(error: BaseException) -> bool:
    """Whether the environment forbids asking."""
    return "OfflineModeIsEnabled" in _names(error)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether the hub said nothing at all, so that what the cache holds is the best there is."""
    return is_dropped(error) or bool(_names(error) & _GONE)


def cache_fault(error: OSError) -> ResourceError | None:
    """The error to raise where the cache cannot be written: of a user without a home, its folder is none that can be made."""
    if error.errno not in _NOT_WRITABLE:
        return None
    return ResourceError(
        f"the hub's cache cannot be written ({error.strerror})",
        file=error.filename,
        hint="set HF_HOME to a folder that can be",
    )


def fault_of(error: BaseException, shown: str | os.PathLike[str], repo: str) -> SurgeryError:
    """The error to raise for `error`, which ended a reading of `shown` in the repository `repo`."""
    names, status = _names(error), _status(error)
    if names & _GONE:
        return NotFoundError(
            "the hub's cache does not hold it, and HF_HUB_OFFLINE forbids to ask the hub",
            file=shown,
            hint=f"unset HF_HUB_OFFLINE, or {_otherwise(repo)}",
        )
    if "GatedRepoError" in names:
        return InputError(
            "the repository is gated, and these credentials were not let in",
            file=shown,
            hint=f"ask for access on the page of {show(repo)}, then set HF_TOKEN or run 'hf auth login'",
        )
    if "RevisionNotFoundError" in names:
        return NotFoundError("the repository has no such revision", file=shown, hint="check what follows the @")
    if "EntryNotFoundError" in names:
        return NotFoundError("no such file in the repository", file=shown, hint="check what follows the colon")
    if "DisabledRepoError" in names:
        return InputError("the hub has disabled the repository", file=shown)
    if "RepositoryNotFoundError" in names or status == 404:
        message, hint = _answer(404)
        if os.environ.get("HF_TOKEN"):
            hint = "if it is private, HF_TOKEN may not read it"
        first = "check the name" if "/" in repo else _otherwise(repo)
        return NotFoundError(message, file=shown, hint=f"{first}; {hint}")
    if status is not None:
        message, hint = _answer(status)
        return InputError(message, file=shown, hint=hint)
    if is_dropped(error):
        return InputError(_UNREACHED, file=shown, hint=f"{_CHECK}, or {_otherwise(repo)}")
    return NotFoundError(f"the hub could not provide it: {_words(error)}", file=shown)


def push_fault(error: BaseException, shown: str) -> SurgeryError:
    """The error to raise for `error`, which ended a push to `shown`."""
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        said = show(" ".join(str(error).split()).partition(". - ")[2], 300)
        return MalformedError(f"the hub does not take the metadata of README.md: {said}", file=shown)
    error = _source(error)
    status = 403 if "GatedRepoError" in _names(error) else _status(error)
    if status is not None:
        message, hint = _answer(status, pushing=True)
        return (ProofError if status == 412 else ResourceError)(message, file=shown, hint=hint)
    if is_dropped(error):
        return ResourceError(_UNREACHED, file=shown, hint=_CHECK)
    return ResourceError(f"the hub did not take it: {_words(error)}", file=shown)


def _otherwise(repo: str) -> str:
    """What to do about a repository that is not here; a name without an organisation is mostly half of one."""
    if "/" in repo:
        return f"run 'hf download {show(repo)}' where there is a network"
    return f"write hf://ORG/{show(repo)} or hf://{show(repo)}/NAME: all repositories but a few old ones are ORG/NAME"


def _answer(status: int, *, pushing: bool = False) -> tuple[str, str]:
    """What is told of a status of the hub, and a hint."""
    message, read, pushed = _ANSWERS.get(status, ("", None, None))
    hint = pushed if pushing else read
    if hint is None:
        return f"the hub answers {status}", f"{'push' if pushing else 'run'} again later"
    return message, hint


def _source(error: BaseException) -> BaseException:
    """What an error was raised from, where that came from the hub: an upload's is wrapped."""
    inner = error
    while inner.__cause__ is not None and _status(inner) is None:
        inner = inner.__cause__
    return inner if _status(inner) is not None or is_dropped(inner) else error


def _words(error: BaseException) -> str:
    """The first line of what an error that is none of these says."""
    return show(next(iter(str(error).splitlines()), "") or type(error).__name__, 300)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
