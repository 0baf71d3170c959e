# SPDX-License-Identifier: Apache-2.0
"""A torch checkpoint around a pickle written by hand."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.torch_pickles import Write


@pytest.fixture
def archive(tmp_path: Path) -> Write:
    """A zip checkpoint with the given pickle and storages."""

    def archive(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
        path = tmp_path / "x.bin"
        with zipfile.ZipFile(path, "w", compression) as zipped:
            zipped.writestr("archive/data.pkl", pickled)
            zipped.writestr("archive/byteorder", "little")
            zipped.writestr("archive/version", "3\n")
            for key, data in storages.items():
                zipped.writestr(f"archive/data/{key.removeprefix('s')}", data)
        return path

    return archive
