# SPDX-License-Identifier: Apache-2.0
"""Where an output folder is staged: beside it on a disk, or in memory and in uploads for a bucket."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from surgery_formats.errors import UsageError
from surgery_formats.files.output.scratch import OF_FILES
from surgery_formats.files.output.several import may_be_there
from surgery_formats.files.output.stage import Stage
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.text import show

__all__ = ["Staging", "check_folder", "stage_of"]


class Staging(Protocol):
    """Where the files of a job lie until they are complete: beside the output, or in memory and in uploads for a bucket."""

    @property
    def path(self) -> Path:
        """The folder of finished files."""
        ...

    @property
    def shown(self) -> Path:
        """The output as the user wrote it."""
        ...

    def check(self) -> None:
        """Refuse an output that could not be written, as of now."""
        ...

    def acquire(self) -> None:
        """Begin, as the only writer."""
        ...

    def release(self) -> None:
        """Remove what has not become the output; may be called twice."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Raise a `FitError` if no file of this size can be staged."""
        ...

    def sync(self) -> None:
        """Make the entries of `path` durable."""
        ...

    def publish(self) -> Path:
        """Let the output appear."""
        ...


def stage_of(
    out: str | os.PathLike[str],
    plan_id: str,
    *,
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str]],
    recorded: str | None = None,
    private: bool = False,
) -> Staging:
    """Where the output `out` is staged; the arguments are those of `surgery_formats.files.output.folder.output_folder`.

    Raises:
        UsageError: the name is that of a file.
    """
    if (path := to_path(out)).suffix in OF_FILES and not path.is_dir():
        raise UsageError(
            "a folder is written, and the name is that of a file",
            file=path,
            hint=f"write to {show(path.with_suffix(''), 200)}",
        )
    if isinstance(path, RemotePath):
        from surgery_formats.files.remote.stage import RemoteStage

        return RemoteStage(path, plan_id, overwrite=overwrite, inputs=inputs, private=private)
    return Stage(out, plan_id, overwrite=overwrite, inputs=inputs, recorded=recorded)


def check_folder(
    out: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse an output folder that could not be written, before hours are spent on it; nothing is touched.

    Raises:
        NotFoundError, UsageError, FitError, OutputExistsError: as entering an `output_folder` does.
    """
    if not may_be_there():  # else it may be what this command wrote before it was killed
        stage_of(out, "0" * 16, overwrite=overwrite, inputs=inputs).check()
