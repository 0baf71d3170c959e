# SPDX-License-Identifier: Apache-2.0
"""What a kill would leave at each call of a run, kept from one run that is not killed.

The kernel has all that a killed process wrote, and nothing of what it had not written: what lies in the folders when a call begins
is what a kill there leaves. So a run is stopped at each call for long enough to copy the folders. Calls at which they hold the same
names and bytes leave the same state, and one of these is tried.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["States", "tree_digest"]

# Of folders between steps, at random, and of outputs made of what lies in them, by its time and inode.
_OWN = re.compile(rb"\.surgery-(?:scratch-)?[0-9a-f]{16}|\"plan\": \"[0-9a-f]+\"")

_JOURNAL = ".surgery-journal"


def tree_digest(folders: Iterable[Path]) -> str:
    """One hash over names, links and bytes, but for what two runs of a command call differently."""
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            state.update(b"\0" + _OWN.sub(b"", os.fsencode(path.relative_to(folder.parent))) + b"\0")
            if path.is_symlink():
                state.update(b"link " + os.fsencode(os.readlink(path)))
            elif path.is_file():
                data = path.read_bytes()
                state.update(hashlib.sha256(_OWN.sub(b"", data) if path.name == _JOURNAL else data).digest())
    return state.hexdigest()


class States:
    """Copies of some folders, by the point at which they were made.

    Attributes:
        within: Whether this thread makes a copy, so that its own calls do not count.
    """

    def __init__(self, kept: Path, folders: tuple[Path, ...], inputs: Iterable[Path]) -> None:
        self._kept, self._folders = kept, folders
        files = (path for folder in inputs for path in folder.rglob("*") if path.is_file())
        self._inputs = {(status.st_dev, status.st_ino) for status in map(os.stat, files)}
        self._lock = threading.Lock()
        self.within = threading.local()
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()

    def keep(self, point: str) -> None:
        """Copy the folders as they are now."""
        with self._lock:
            self.within.now = True
            try:
                for folder in self._folders:
                    self._copy(folder, self._kept / point / folder.name)
            finally:
                self.within.now = False

    def restore(self, point: str) -> None:
        """Let the folders be as they were."""
        for folder in self._folders:
            shutil.rmtree(folder)
            self._copy(self._kept / point / folder.name, folder)

    def digest(self, point: str) -> str:
        """See `tree_digest`."""
        return tree_digest(self._kept / point / folder.name for folder in self._folders)

    def _copy(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target, symlinks=True, copy_function=self._copy_file)

    def _copy_file(self, source: str, target: str) -> None:
        """Inputs are linked, so that their identities stay: they are never written to."""
        status = os.stat(source)
        if (status.st_dev, status.st_ino) in self._inputs:
            os.link(source, target)
        else:
            shutil.copy2(source, target)
