# SPDX-License-Identifier: Apache-2.0
"""A folder in memory, for what must not be on a disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from surgery_formats.errors import ResourceError

__all__ = ["memory_folder"]


def memory_folder() -> Path:
    """A folder of this user's that is no disk; where the system has none, the one for temporary files.

    Raises:
        ResourceError: somebody else has taken its name.
    """
    shared = Path("/dev/shm")
    folder = (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / f"surgery-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise ResourceError("belongs to another user", file=folder)
    return folder
