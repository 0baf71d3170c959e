# SPDX-License-Identifier: Apache-2.0
"""Files of torch checkpoints that are damaged or lie: zip archives, and the older format."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from tests.support.torch_pickles import Write, open_torch, tensor


def assert_refused(path: Path, what: str) -> None:
    with pytest.raises(MalformedError, match=what) as caught:
        open_torch(path)
    assert caught.value.file == str(path)


def test_a_zip_bomb_is_refused(archive: Write) -> None:
    path = archive(b"\x80\x02" + tensor(numel=1 << 24) + b".", s0=bytes(1 << 26), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert_refused(path, "compressed")


def test_a_false_size_is_refused(archive: Write) -> None:
    path = archive(b"N.", s0=bytes(8))
    raw = path.read_bytes()
    at = raw.rindex(b"archive/data/0") - 46 + 20
    path.write_bytes(raw[:at] + struct.pack("<2L", 1 << 30, 1 << 30) + raw[at + 8 :])
    assert_refused(path, "beyond the archive|overlaps")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
        zipped.writestr("archive/data.pkl", b"N.")
        zipped.writestr("archive/data.pkl", b"cos\nsystem\n.")
    assert_refused(tmp_path / "x.pt", "twice")


def test_two_pickles_in_an_archive_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
        zipped.writestr("a/data.pkl", b"N.")
        zipped.writestr("b/data.pkl", b"N.")
    assert_refused(tmp_path / "x.pt", "2 members")


def test_an_archive_without_a_version_is_refused_as_by_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
        zipped.writestr("a/data.pkl", b"N.")
    assert_refused(tmp_path / "x.pt", "no member 'a/version'")
    with pytest.raises(RuntimeError, match="version"):
        torch.load(tmp_path / "x.pt", weights_only=True)


def test_an_archive_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
        zipped.writestr("a/constants.pkl", b"N.")
    assert_refused(tmp_path / "x.pt", "0 members")


def test_a_big_endian_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as zipped:
        zipped.writestr("a/data.pkl", b"N.")
        zipped.writestr("a/byteorder", b"big")
    assert_refused(tmp_path / "x.pt", "little-endian")


def test_overlapping_members_are_refused(archive: Write) -> None:
    path = archive(b"N.", s0=bytes(8), s1=bytes(8))
    raw = bytearray(path.read_bytes())
    first, second = (raw.rindex(b"archive/data/%d" % i) - 46 + 42 for i in (0, 1))
    raw[second : second + 4] = raw[first : first + 4]
    path.write_bytes(raw)
    assert_refused(path, "another name")


def test_a_local_header_with_another_name_is_refused(archive: Write) -> None:
    path = archive(b"N.")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"archive/data.pkl", b"archive/else.pkl", 1))
    assert_refused(path, "another name")


def test_encrypted_members_are_refused(archive: Write) -> None:
    path = archive(b"N.")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    assert_refused(path, "encrypted")


@pytest.mark.parametrize("where", ["before", "after", "comment", "cut", "hidden"])
def test_bytes_around_the_archive_are_refused(where: str, archive: Write) -> None:
    path = archive(b"N.", s0=bytes(8))
    raw = path.read_bytes()
    end = raw.index(b"PK\x01\x02")
    path.write_bytes(
        {
            "before": b"PK\x03\x04" + raw,
            "after": raw + b"x",
            "comment": raw[:-2] + b"\x01\0x",
            "cut": raw[:-1],
            "hidden": raw[:end] + b"x" + raw[end:],
        }[where]
    )
    assert_refused(path, "zip archive|zip directory")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "not a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x02\0\0\0\0\0\0\0{}", "name it .safetensors"),
        (b"7z\xbc\xaf\x27\x1c....", "7z"),
        (b"\x80\x02K\x01.", "not a torch checkpoint"),
        (b"PK\x03\x04", "too short"),
    ],
)
def test_files_that_are_not_pickles_are_refused(raw: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(MalformedError, match=what) as caught:
        open_shard(tmp_path / "x.bin")
    assert caught.value.file == str(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda raw: raw + b"x", "behind the last storage"),
        (lambda raw: raw[:-1], "not have the size|ends"),
        (lambda raw: raw[:-16] + struct.pack("<q", 3) + raw[-8:], "not have the size"),
        (lambda raw: raw[:-12], "not have the size|ends"),
        (lambda raw: raw.replace(b"little_endianq", b"little_indianq"), "little-endian"),
        (lambda raw: raw.replace(b"\x8a\x0al\xfc\x9cF", b"\x8a\x0al\xfc\x9cG"), "not a torch checkpoint"),
    ],
    ids=["longer", "shorter", "count", "cut", "endian", "magic"],
)
def test_damaged_legacy_files_are_refused(change: Callable[[bytes], bytes], what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    changed = change(raw)
    assert changed != raw
    path.write_bytes(changed)
    assert_refused(path, what)


def test_a_zip64_archive_is_read(tmp_path: Path) -> None:
    """Sizes and positions in the extra field, as in archives beyond 4 GB."""
    path = tmp_path / "x.pt"
    pickled = b"\x80\x02" + tensor() + b"."
    with zipfile.ZipFile(path, "w") as zipped:
        with zipped.open("archive/data.pkl", "w", force_zip64=True) as member:
            member.write(pickled)
        with zipped.open("archive/data/0", "w", force_zip64=True) as member:
            member.write(struct.pack("<2f", 3, 4))
        with zipped.open("archive/version", "w", force_zip64=True) as member:
            member.write(b"3\n")
    raw = bytearray(path.read_bytes())
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    directory, at = bytearray(), start
    while at < end:
        name_len, extra_len = struct.unpack_from("<2H", raw, at + 28)
        packed, size = struct.unpack_from("<2L", raw, at + 20)
        (local,) = struct.unpack_from("<L", raw, at + 42)
        fixed = bytearray(raw[at : at + 46])
        struct.pack_into("<2L", fixed, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<H", fixed, 30, 28)
        struct.pack_into("<L", fixed, 42, 0xFFFFFFFF)
        directory += fixed + raw[at + 46 : at + 46 + name_len] + struct.pack("<2H3Q", 1, 24, size, packed, local)
        at += 46 + name_len + extra_len
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(raw[:start] + directory + end64 + locator + tail)
    assert zipfile.ZipFile(path).read("archive/data.pkl") == pickled
    opened = open_torch(path)
    assert isinstance(opened, StoredTensor)
    assert opened.read().tolist() == [3, 4]
