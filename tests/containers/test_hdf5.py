# SPDX-License-Identifier: Apache-2.0
"""HDF5 without its library: what h5py wrote is found, and a damaged or hostile file ends in an error, never in a wrong read."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.arrays import cast
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.hdf5 import SIGNATURE, datasets
from surgery_formats.containers.hdf5_layout import lay_out_hdf5
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import open_file
from tests.support.adapter_files import GOLDEN

FILE = GOLDEN / "keras/llama/lora/adapter.lora.h5"
WHOLE = FILE.read_bytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_every_dataset_is_found() -> None:
    found = {tensor.name: tensor for tensor in datasets(open_file(FILE))}
    assert found["lora/vars/rank"].dtype is DType.I64
    assert int(found["lora/vars/rank"].read()) == 2
    assert found["lora/11/vars/lora_kernel_a"].shape == (16, 4, 2)
    assert len(found) == 9
    (halves,) = datasets(open_file(GOLDEN / "keras/bfloat16.h5"))
    assert (halves.name, halves.dtype, halves.shape) == ("x", DType.BF16, (2, 3))
    assert cast(halves.read(), DType.F32).ravel().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [0, 8, 40, 95, 96, 200, 800, 2000, len(WHOLE) // 2])
def test_a_file_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(MalformedError):
        datasets(open_file(written(tmp_path / "a.h5", WHOLE[:size])))


def replaced(old: bytes, new: bytes, nth: int = 0) -> bytes:
    at = -1
    for _ in range(nth + 1):
        at = WHOLE.index(old, at + 1)
    return WHOLE[:at] + new + WHOLE[at + len(old) :]


ROOT = struct.unpack_from("<Q", WHOLE, 64)[0]
LAYOUT = struct.pack("<HHB3xBB", 8, 24, 0, 3, 1)
"""A message of a dataset's layout: 24 bytes, version 3, in one piece."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89HDF" + bytes(200), "not an HDF5 file"),
        (WHOLE[:8] + b"\x02" + WHOLE[9:], "a newer layout"),
        (WHOLE[:24] + b"\x01" + WHOLE[25:], "a newer layout"),
        (WHOLE[:ROOT] + b"\x02" + WHOLE[ROOT + 1 :], "an object header of a newer layout"),
        (replaced(b"TREE", b"EERT"), "the tree of a group is damaged"),
        (replaced(b"HEAP", b"PEAH"), "the names of a group are damaged"),
        (replaced(b"SNOD", b"DONS"), "the table of a group is damaged"),
        (WHOLE[:64] + struct.pack("<Q", 1 << 60) + WHOLE[72:], "beyond its end"),
    ],
)
def test_damaged_structures_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=said):
        datasets(open_file(written(tmp_path / "a.h5", content)))


def first_dataset() -> tuple[int, bytes]:
    at = WHOLE.index(LAYOUT)
    return at, WHOLE[at + 8 : at + 32]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"\x03\x02" + bytes(22), "in a layout that is not read"),
        (b"\x04\x01" + bytes(22), "in a layout that is not read"),
        (b"\x03\x01" + b"\xff" * 8 + struct.pack("<Q", 8) + bytes(6), "has no"),
        (b"\x03\x01" + struct.pack("<2Q", 8, 7) + bytes(6), "has no"),
        (b"\x03\x01" + struct.pack("<2Q", 1 << 50, 8) + bytes(6), "has no"),
        (b"\x03\x00\xff\xff" + bytes(20), "has no"),
    ],
)
def test_values_that_are_not_inside_are_refused(message: bytes, said: str, tmp_path: Path) -> None:
    at, _ = first_dataset()
    with pytest.raises(MalformedError, match=said):
        datasets(open_file(written(tmp_path / "a.h5", WHOLE[: at + 8] + message + WHOLE[at + 32 :])))


@pytest.mark.parametrize(("kind", "said"), [(0x0B, "is compressed"), (0x07, "lies in another file")])
def test_filters_and_other_files_are_refused(kind: int, said: str, tmp_path: Path) -> None:
    """The message of the value of what was never written becomes another."""
    at = WHOLE.index(struct.pack("<HHB3x", 0x05, 8, 1))
    with pytest.raises(MalformedError, match=said):
        datasets(open_file(written(tmp_path / "a.h5", WHOLE[:at] + struct.pack("<H", kind) + WHOLE[at + 2 :])))


def test_links_are_not_followed_and_cycles_end(tmp_path: Path) -> None:
    at = WHOLE.index(b"SNOD") + 8
    soft = WHOLE[: at + 16] + struct.pack("<I", 2) + WHOLE[at + 20 :]
    with pytest.raises(MalformedError, match="is not followed"):
        datasets(open_file(written(tmp_path / "a.h5", soft)))
    cycle = WHOLE[: at + 8] + struct.pack("<Q", ROOT) + WHOLE[at + 16 :]
    with pytest.raises(MalformedError, match="linked twice"):
        datasets(open_file(written(tmp_path / "a.h5", cycle)))


def test_a_heap_as_large_as_the_file_is_not_read_again_and_again(tmp_path: Path) -> None:
    at = WHOLE.index(b"HEAP")
    bomb = WHOLE[: at + 8] + struct.pack("<Q", 65 << 20) + WHOLE[at + 16 :] + bytes(66 << 20)
    with pytest.raises(MalformedError, match="too much in it is no array"):
        datasets(open_file(written(tmp_path / "a.h5", bomb)))


def test_a_long_name_is_not_taken_again_for_each_of_many_groups(tmp_path: Path) -> None:
    """Names that begin at every byte of one long text: 2 MB would be names of 400 MB."""
    layout = lay_out_hdf5([(f"n{number:06d}", DType.F32, (1,)) for number in range(200)])
    content = bytearray(layout.header.ljust(layout.nbytes, b"\0"))
    heap, names = content.index(b"HEAP"), len(content)
    struct.pack_into("<Q", content, heap + 8, (2 << 20) + 8)
    struct.pack_into("<Q", content, heap + 24, names)
    at, number = content.find(b"SNOD"), 0
    while at >= 0:
        for place in range(struct.unpack_from("<H", content, at + 6)[0]):
            struct.pack_into("<Q", content, at + 8 + 40 * place, number)
            number += 1
        at = content.find(b"SNOD", at + 8)
    with pytest.raises(MalformedError, match="the names of a group are damaged"):
        datasets(open_file(written(tmp_path / "a.h5", bytes(content) + b"x" * (2 << 20) + bytes(8))))
    deep = "/".join(["g" * 250] * 5)
    layout = lay_out_hdf5([(deep, DType.F32, (1,))])
    with pytest.raises(MalformedError, match="longer than any"):
        datasets(open_file(written(tmp_path / "a.h5", layout.header.ljust(layout.nbytes, b"\0"))))


FLOAT = bytes.fromhex("11201f000400000000002000170800177f00000000000000")
"""A message of the element type float32."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (replaced(FLOAT, FLOAT[:2] + b"\x1e" + FLOAT[3:]), "a type that is not read"),  # the sign one bit lower
        (replaced(FLOAT, FLOAT[:1] + b"\x00" + FLOAT[2:]), "a type that is not read"),  # no hidden bit
        (replaced(FLOAT, FLOAT[:1] + b"\x21" + FLOAT[2:]), "a type that is not read"),  # of the other endianness
        (replaced(struct.pack("<HHB3x", 3, 24, 1), struct.pack("<HHB3x", 3, 24, 3)), "that lie elsewhere"),
        (replaced(struct.pack("<HHB3x", 5, 8, 1), struct.pack("<HHB3x", 1, 8, 1)), "is described twice"),
        (replaced(LAYOUT, struct.pack("<HHB3xBB", 0, 24, 0, 3, 1)), "neither a group nor a dataset"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=said):
        datasets(open_file(written(tmp_path / "a.h5", content)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, min(len(WHOLE), 3000) - 1), st.integers(1, 255))
def test_any_byte_may_be_wrong(at: int, flip: int) -> None:
    content = bytearray(WHOLE)
    content[at] ^= flip
    with tempfile.TemporaryDirectory() as place:
        path = written(Path(place) / "a.h5", bytes(content))
        try:
            found = datasets(open_file(path))
        except MalformedError:
            return
        for tensor in found:
            assert tensor.offset + tensor.nbytes <= len(content)
            np.asarray(tensor.read())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 700), st.integers(1, 4), st.randoms(use_true_random=False))
def test_what_is_laid_out_is_found_again(count: int, deep: int, random: Random) -> None:
    """Tables of 8 names and nodes of 32 tables: 700 groups need three levels. h5py reads such files too."""
    specs: list[TensorSpec] = [("a/x", DType.I64, ())]
    for number in range(count):
        path = "/".join(f"g{random.randrange(10**6)}" for _ in range(deep))
        specs.append((f"{path}/t{number}", random.choice([DType.F16, DType.F32, DType.F64]), (random.randrange(4), 3)))
    layout = lay_out_hdf5(specs)
    with tempfile.TemporaryDirectory() as place:
        path_ = Path(place) / "a.h5"
        path_.write_bytes(layout.header + bytes(layout.nbytes - len(layout.header)))
        found = datasets(open_file(path_))
    assert {(t.name, t.dtype, t.shape) for t in found} == set(specs)
    assert {t.name: (t.offset, t.nbytes) for t in found} == dict(layout.ranges)
    covered = sorted([*layout.ranges.values(), *layout.padding])
    assert len(layout.header) + sum(size for _, size in covered) == layout.nbytes


def test_what_cannot_be_laid_out() -> None:
    for specs, said in (
        ([("a", DType.BF16, (1,))], "no arrays of BF16"),
        ([("a", DType.F32, (1,)), ("a", DType.F32, (1,))], "appears twice"),
        ([("a", DType.F32, (1,)), ("a/b", DType.F32, (1,))], "where a group is needed"),
    ):
        with pytest.raises(FitError, match=said):
            lay_out_hdf5(specs)


def test_the_signature_is_hdf5s() -> None:
    assert WHOLE.startswith(SIGNATURE)
