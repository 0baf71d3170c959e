# SPDX-License-Identifier: Apache-2.0
"""Ranges are compared once: what was found while a file was written counts until one of the files changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files import equal_ranges as module
from surgery_formats.files.equal_ranges import EqualRanges, equal_ranges, holds
from surgery_formats.files.output.single import SingleFile, write_single
from surgery_formats.files.raw import File, open_file

SIZE = (2 << 20) + 13  # two steps and an odd rest


def two(folder: Path, at: int | None = None) -> tuple[File, File]:
    """A file, and one with the same bytes behind 5 others, of which one may differ."""
    data = os.urandom(SIZE)
    changed = bytearray(data)
    if at is not None:
        changed[at] ^= 1
    (folder / "a").write_bytes(data)
    (folder / "b").write_bytes(b"12345" + changed)
    return open_file(folder / "a"), open_file(folder / "b")


@pytest.mark.parametrize("at", [None, 0, 1 << 20, (1 << 20) - 1, SIZE - 1])
def test_one_byte_tells_two_ranges_apart(tmp_path: Path, at: int | None) -> None:
    a, b = two(tmp_path, at)
    assert equal_ranges(a, 0, b, 5, SIZE) is (at is None)
    assert equal_ranges(a, 0, b.window(5, SIZE), 0, SIZE) is (at is None)
    with b.opened as fd:
        assert holds(fd, memoryview((tmp_path / "a").read_bytes()), 5) is (at is None)


def test_a_range_beyond_the_end_is_no_equal_one(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    with pytest.raises(MalformedError):
        equal_ranges(a, 0, b, 5, SIZE + 1)
    with b.opened as fd:
        assert not holds(fd, memoryview((tmp_path / "a").read_bytes() + b"?"), 5)


def test_what_is_known_is_not_read_and_ends_with_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = two(tmp_path, at=7)
    ranges = EqualRanges()
    ranges.add(5, a, 0, SIZE)  # a lie, which only reading would find
    assert not equal_ranges(a, 0, b, 5, SIZE)
    with b.opened as fd, ranges.known(fd):
        assert equal_ranges(a, 0, b, 5, SIZE)
        assert equal_ranges(b, 5, a, 0, SIZE)
        assert not equal_ranges(a, 0, b, 5, SIZE - 1)
        os.utime(tmp_path / "b", ns=(0, 1))
        assert not equal_ranges(a, 0, open_file(tmp_path / "b"), 5, SIZE)
    assert not equal_ranges(a, 0, b, 5, SIZE)
    assert not module._known


def test_a_file_that_holds_other_bytes_than_were_written_never_appears(tmp_path: Path) -> None:
    source, _ = two(tmp_path)

    def fill(file: SingleFile) -> None:
        data = memoryview((tmp_path / "a").read_bytes())
        file.pwrite(data, 0)
        file.confirm(data, 0, source, 0)
        file.pwrite(bytes([data[9] ^ 1]), 9)  # the disk errs
        file.confirm(data, 0, source, 0)

    with pytest.raises(ProofError, match="other bytes than were written"):
        write_single(tmp_path / "out", "1" * 64, SIZE, fill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
