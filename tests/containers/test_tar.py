# SPDX-License-Identifier: Apache-2.0
"""Tar archives: what Python's tarfile writes is found in every form, and a damaged or hostile one ends in an error."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from surgery_formats.containers.stored_zip import Member
from surgery_formats.containers.tar import is_tar, tar_members
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file

END = bytes(1024)


def header(name: str = "x", size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf()


def extended(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header, and a member for which it holds."""
    return header(size=len(records), kind=kind) + records.ljust(512, b"\0") + header("y")


def members(path: Path, content: bytes) -> dict[str, Member]:
    path.write_bytes(content)
    return tar_members(open_file(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_is_read(form: int, tmp_path: Path) -> None:
    deep, path = "/".join(["a" * 40] * 3), tmp_path / "a.tar"
    files = {"./x": b"1" * 700, f"{deep}/b": b"22", "../c": b"", "model_weights.ckpt": b"3" * 512}
    with tarfile.open(path, "w:", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert is_tar(path)
    found = tar_members(open_file(path))
    assert {name: path.read_bytes()[m.offset : m.offset + m.nbytes] for name, m in found.items()} == {
        name.removeprefix("./"): data for name, data in files.items()
    }


@pytest.mark.parametrize("size", [0, 100, 511, 512, 600, 1200, 2000, 2047])
def test_an_archive_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    whole = header(size=700) + bytes(1024) + header("y")
    assert members(tmp_path / "a.tar", whole + END).keys() == {"x", "y"}
    with pytest.raises(MalformedError, match=r"cut short|beyond the archive"):
        members(tmp_path / "a.tar", whole[:size])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header("a", kind=tarfile.SYMTYPE, link="/etc/passwd"), "'a' is no plain file"),
        (header(size=8**10), "beyond the archive"),
        (b"\x01" + header()[1:], "is damaged"),
        (header() * 2, "'x' appears twice"),
        (extended(b"20 path=a_longer_one\n", tarfile.XGLTYPE), "extended header"),
        (extended(b"12 path=abc\n", tarfile.XGLTYPE), "for all tar members"),
        (extended(b"99 path=x\n"), "extended header"),
        (extended(b"22 GNU.sparse.major=1\n"), "holes"),
        (extended(b"x"), "extended header"),
        (extended(b"x path=abc\n"), "is no number"),
    ],
)
def test_hostile_archives_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=said):
        members(tmp_path / "a.tar", content + END)
