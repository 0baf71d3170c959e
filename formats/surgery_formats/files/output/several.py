# SPDX-License-Identifier: Apache-2.0
"""Commands with several outputs: each appears at once or not at all, and one that is there already need not stop the others.

A run that is killed between two outputs leaves the first. The same command must be able to go on, so inside `several_outputs` an
output that exists is no error if it is what the command would write there: it is made again, compared, and left as it is.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.manifest import MANIFEST, verify_folder

__all__ = ["is_of_plan", "may_be_there", "same_file", "same_folder", "several_outputs"]

_several: ContextVar[bool] = ContextVar("several", default=False)


@contextlib.contextmanager
def several_outputs(really: bool = True) -> Iterator[None]:
    """What is written inside belongs together; with `really` false nothing changes."""
    token = _several.set(really or _several.get())
    try:
        yield
    finally:
        _several.reset(token)


def may_be_there() -> bool:
    """Whether an output that exists may be one that this command wrote before it was killed."""
    return _several.get()


def is_of_plan(folder: Path, plan: str) -> bool:
    """Whether the manifest of `folder` names this plan."""
    try:
        return read_object(folder / MANIFEST, MANIFEST_LIMIT).get("plan") == plan
    except SurgeryError:
        return False


def same_folder(old: Path, new: Path) -> bool:
    """Whether `old` holds what its manifest says, and that is what `new` says."""
    try:
        verify_folder(old)
    except SurgeryError:
        return False
    return same_file(old / MANIFEST, new / MANIFEST)


def same_file(old: Path, new: Path) -> bool:
    """Whether two regular files have the same bytes."""
    return os.path.isfile(old) and not os.path.islink(old) and filecmp.cmp(old, new, shallow=False)
