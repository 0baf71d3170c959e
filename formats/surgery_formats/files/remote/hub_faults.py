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
    """The error to raise for `error`, about `shown` of the repository `repo`."""
    names, status = _names(error), _status(error)
    named = bool(os.environ.get("HF_TOKEN"))
    if names & _GONE:
        return NotFoundError(
            "the hub's cache does not hold it, and HF_HUB_OFFLINE forbids to ask the hub",
            file=shown,
            hint=f"unset HF_HUB_OFFLINE, or run 'hf download {show(repo)}' where there is a network",
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
        hint = "check the name; a private repository needs HF_TOKEN or 'hf auth login'"
        if named:
            hint = "check the name; if it is private, HF_TOKEN may not read it"
        return NotFoundError("the hub has no such repository, or hides it", file=shown, hint=hint)
    if status == 401:
        return InputError("the hub does not accept the token", file=shown, hint="it may have expired: 'hf auth login'")
    if status == 403:
        return InputError("the hub denies access", file=shown, hint="the token needs the right to read this repository")
    if status == 429:
        return InputError("the hub has had too many requests", file=shown, hint="wait, or set HF_TOKEN")
    if status is not None:
        return InputError(f"the hub answers {status}", file=shown, hint="run again later")
    if is_dropped(error):
        return InputError(
            "the hub cannot be reached",
            file=shown,
            hint=f"check the network and HF_ENDPOINT, or run 'hf download {show(repo)}' where there is a network",
        )
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return NotFoundError(f"the hub could not provide it: {show(said, 300)}", file=shown)


def push_fault(error: BaseException, shown: str) -> SurgeryError:
    """The error to raise for `error`, which ended a push to `shown`."""
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        said = show(" ".join(str(error).split()).partition(". - ")[2], 300)
        return MalformedError(f"the hub does not take the metadata of README.md: {said}", file=shown)
    error = _source(error)
    names, status = _names(error), _status(error)
    if "GatedRepoError" in names or status == 403:
        hint = "the token needs the right to write to this repository; HF_TOKEN goes before 'hf auth login'"
        return ResourceError("the hub denies access", file=shown, hint=hint)
    if status == 401:
        hint = "it may have expired: set HF_TOKEN, or run 'hf auth login'"
        return ResourceError("the hub does not accept the token", file=shown, hint=hint)
    if status == 402:
        return ResourceError("the hub asks for a payment", file=shown, hint="see the plan of its owner")
    if status == 404:
        hint = "check the name; the token may not see a private repository"
        return ResourceError("the hub has no such repository, or hides it", file=shown, hint=hint)
    if status == 409:
        hint = "the repository may be there and hidden from this token, or somebody else writes to it"
        return ResourceError("the hub answers that something is in the way", file=shown, hint=hint)
    if status == 412:
        return ProofError("the branch moved while it was pushed to", file=shown, hint="look at it, and push again")
    if status == 413:
        return ResourceError("the files are too large for the hub", file=shown, hint="a smaller `shard_size=` may help")
    if status == 429:
        return ResourceError("the hub has had too many requests", file=shown, hint="wait")
    if status is not None:
        return ResourceError(f"the hub answers {status}", file=shown, hint="push again later")
    if is_dropped(error):
        return ResourceError("the hub cannot be reached", file=shown, hint="check the network and HF_ENDPOINT")
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ResourceError(f"the hub did not take it: {show(said, 300)}", file=shown)


def _source(error: BaseException) -> BaseException:
    """What an error was raised from, where that came from the hub: an upload's is wrapped."""
    inner = error
    while inner.__cause__ is not None and _status(inner) is None:
        inner = inner.__cause__
    return inner if _status(inner) is not None or is_dropped(inner) else error


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
