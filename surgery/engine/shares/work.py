# SPDX-License-Identifier: Apache-2.0
"""The seam between commands and clusters: what travels, what is done in shares, and who has them done.

Neither open files nor closures travel: a worker gets a `WorkRequest`, references and options, plans again, and compares the
id of its `Work` with the driver's. Then it writes one share. A `Cluster` gives the driver the folders of all shares, and
the driver copies, proves and commits as ever, so the output has the bytes that a single process writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from surgery.arguments import wrong_type
from surgery_formats.errors import UsageError
from surgery_formats.files.raw import File
from surgery_formats.files.remote.path import is_remote

if TYPE_CHECKING:
    from surgery.engine.execute import Run
    from surgery_formats.files.output.folder import OutputFolder

__all__ = ["Cluster", "EngineLike", "Work", "WorkRequest", "absolute", "portable", "portable_adapters"]


class WorkRequest(Protocol):
    """All that decides a piece of work, as plain values that can be sent; a frozen dataclass."""

    def __hash__(self) -> int:
        """Equal requests have one: a worker keeps the work of the last."""
        ...

    def work(self) -> Work:
        """Plan it: open the inputs. Equal requests on equal inputs give works of the same id.

        Raises:
            FitError, InputError: as the command.
        """
        ...


class Work(Protocol):
    """What a command will compute, planned, in pieces that are independent of each other."""

    @property
    def id(self) -> str:
        """Hex digest of inputs, options and version: equal works have equal shares."""
        ...

    @property
    def inputs(self) -> Sequence[File]:
        """Open files, which must not change until a share is written."""
        ...

    @property
    def roots(self) -> Sequence[Path]:
        """Files and folders that the user named."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that all shares hold together, about, or that are read for them where these are more: what they take time for."""
        ...

    @property
    def pieces(self) -> int:
        """Number of pieces; more shares than that would be empty."""
        ...

    @property
    def makes_files(self) -> bool:
        """Whether shares are files of the output, complete and with its hashes; else the driver makes files of what they hold."""
        ...

    @property
    def piece_memory(self) -> int:
        """Most bytes of memory that one piece takes while it is computed."""
        ...

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        """Write the files of share `index` of `count`, and return what else its manifest is to say.

        Every piece is in one share. The bytes of a piece depend on neither `index`, `count` nor `run`.

        Raises:
            SurgeryError: as the command.
        """
        ...


class Cluster(Protocol):
    """Who has shares done."""

    def shares(
        self, request: WorkRequest, work: Work, output: Path, run: Run
    ) -> AbstractContextManager[Sequence[Path]]:
        """The folders of all shares, in order, complete; removed when the block ends without an error.

        Args:
            request: What workers plan again.
            work: What the driver has planned of it.
            output: The output of the command; shares lie beside it.
            run: How.

        Raises:
            FitError: a share is missing, or the work cannot be done in shares.
            ProofError: a worker planned something else, or a share is another one.
            ResourceError: the cluster is not there, is too small, or keeps losing workers.
        """
        ...


EngineLike: TypeAlias = "Cluster | str"
"""What a verb takes: ``local``, ``ray``, ``ray:HOST:PORT``, or a cluster such as `surgery.engine.shares.folders.Shares`."""


def portable(reference: object, argument: str) -> str:
    """A reference as every worker has to write it: a path becomes absolute, a name of the hub or a bucket stays.

    Raises:
        UsageError: something that was opened, which cannot travel.
    """
    if not isinstance(reference, str | os.PathLike):
        raise UsageError(
            f"{argument} was opened here, and workers open their inputs themselves",
            hint=f"give the path: `{argument}=`",
        )
    text = os.fspath(reference)
    return absolute(text) if not is_remote(text) and os.path.lexists(text) else text


def absolute(path: str) -> str:
    """The whole path, wherever it is read. Its ``..`` stay: behind a link they lead elsewhere than the text says."""
    return str(Path(path).absolute())


def portable_adapters(adapters: object, argument: str = "adapters") -> tuple[tuple[str, float], ...]:
    """References of adapters with their weights, of whatever a verb takes as such.

    Raises:
        UsageError: an adapter that was opened, or none at all.
    """
    return tuple(_weighted(adapters, argument))


def _weighted(value: object, argument: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        yield from _weighted(value.items(), argument)
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real):
        yield portable(value[0], argument), float(value[1])
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike):
        for item in value:
            yield from _weighted(item, argument)
    elif isinstance(value, bytes):
        raise wrong_type(value, argument, "paths, alone or with weights")
    else:
        yield portable(value, argument), 1.0
