# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are of no format, for checks that detection is quiet about them."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["foreign_paths"]


def foreign_paths(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Missing, empty, garbage and non-regular files under each of `names` in turn, then impossible names."""
    draw = random.Random(1)
    contents = (b"", b"\0", b"{}", b"not weights\n", b"\xff" * 64, draw.randbytes(8), draw.randbytes(5000))
    for name in names:
        path = folder / name
        yield path
        for content in contents:
            path.write_bytes(content)
            yield path
        path.unlink()
        path.mkdir()
        yield path
        (path / "README.md").write_text("# Nothing here\n")
        yield path
        shutil.rmtree(path)
        path.symlink_to(path)
        yield path
        path.unlink()
        if hasattr(os, "mkfifo"):
            os.mkfifo(path)
            yield path
            path.unlink()
    yield folder / "a\0name"
    yield folder / ("x" * 5000)
