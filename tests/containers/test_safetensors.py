# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: golden bytes, round trips, and agreement with the reference implementation."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.safetensors import layout, open_safetensors, reference_order
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, NotFoundError

# The reference's own types are missing for this function.
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

SMALL = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(raw: bytes) -> Path:
        path = tmp_path / "t.safetensors"
        path.write_bytes(raw)
        return path

    return write


# ------------------------------------------------------------------------------------------------ writing


def test_the_layout_matches_golden_bytes() -> None:
    head, ranges = layout([("b", DType.F32, (2, 1)), ("ä", DType.BF16, ())], {"z": "1", "a": "é"})
    body = (
        b'{"__metadata__":{"a":"\\u00e9","z":"1"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        b'"\\u00e4":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}'
    )
    body += b" " * (-len(body) % 8)
    assert head == len(body).to_bytes(8, "little") + body
    assert ranges == {"b": (len(head), 8), "ä": (len(head) + 8, 2)}


def test_the_layout_of_no_tensors_is_an_empty_header() -> None:
    assert layout([], {}) == (b"\x08\0\0\0\0\0\0\0{}      ", {})


def test_the_layout_equals_the_header_of_the_reference() -> None:
    tensors = {
        f"t{i:02}": torch.zeros(8, dtype=dtype.torch)
        for i, dtype in enumerate(d for d in DType if d.torch_name is not None)
    }
    tensors |= {f"s.{n}.weight": torch.zeros(n, 3) for n in range(5)} | {"Z": torch.zeros(())}
    ours = reference_order([(n, DType.of(t.dtype), tuple(t.shape)) for n, t in tensors.items()])
    theirs = safetensors.torch.save(tensors, {"format": "pt"})
    head, ranges = layout(ours, {"format": "pt"})
    assert theirs.startswith(head)
    assert max(offset + nbytes for offset, nbytes in ranges.values()) == len(theirs)


@pytest.mark.parametrize(
    ("entries", "metadata"),
    [
        ([("a", DType.U8, (1,)), ("a", DType.U8, (1,))], {}),
        ([("__metadata__", DType.U8, (1,))], {}),
        ([("__metadata__", DType.U8, (1,))], {"a": "b"}),
        ([("a", DType.F4, (3,))], {}),
        ([("a", DType.U8, (1 << 33, 1 << 33))], {}),
        ([("a", DType.U8, (1,) * 65)], {}),
        ([("\ud800", DType.U8, (1,))], {}),
        ([("a", DType.U8, (1,))], {"k": "\udfff"}),
        ([("a", DType.U8, (1,))], {"\udfff": "v"}),
    ],
)
def test_invalid_layouts_are_refused(entries: list[TensorSpec], metadata: dict[str, str]) -> None:
    with pytest.raises(FitError):
        layout(entries, metadata)


# ----------------------------------------------------------------------------------------------- round trip

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
storable = [d for d in DType if d.torch_name is not None]


@SMALL
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(storable), st.lists(st.integers(0, 4), max_size=4)), max_size=6),
    st.dictionaries(names, names, max_size=3),
    st.randoms(use_true_random=False),
)
def test_files_round_trip_and_the_reference_reads_them(
    tmp_path: Path, wanted: dict[str, tuple[DType, list[int]]], metadata: dict[str, str], rng: random.Random
) -> None:
    entries = [(name, dtype, tuple(shape)) for name, (dtype, shape) in wanted.items()]
    head, ranges = layout(entries, metadata)
    raw = head + b"".join(bytes(rng.choices((0, 1), k=ranges[name][1])) for name in wanted)
    path = tmp_path / "r.safetensors"
    path.write_bytes(raw)

    header = open_safetensors(path)
    assert header.metadata == metadata
    assert header.header_nbytes == len(head)
    assert header.header_nbytes == len(head)
    assert sorted((t.name, t.dtype, t.shape) for t in header.tensors if t.nbytes) == sorted(
        e for e in entries if ranges[e[0]][1]
    )
    assert [t.offset for t in header.tensors] == sorted(t.offset for t in header.tensors)
    assert {t.name: (t.offset, t.nbytes) for t in header.tensors} == ranges
    theirs = dict(deserialize(raw))
    assert theirs.keys() == wanted.keys()
    for tensor in header.tensors:
        other = theirs[tensor.name]
        assert (list(tensor.shape), tensor.dtype.label) == (other["shape"], other["dtype"])
        read = tensor.read()
        assert (read.dtype, tuple(read.shape)) == (tensor.dtype.numpy, tensor.shape)
        assert read.tobytes() == bytes(other["data"])


def test_rows_are_read_and_tensors_keep_file_order(write: Callable[[bytes], Path]) -> None:
    data = np.arange(12, dtype=np.int16).reshape(4, 3)
    raw = pack({"z": entry("I16", [4, 3], 2, 26), "a": entry("I16", [1], 0, 2)}, b"\x07\0" + data.tobytes())
    header = open_safetensors(write(raw))
    assert [t.name for t in header.tensors] == ["a", "z"]
    assert np.array_equal(header.tensors[1].read(1, 3), data[1:3])
    assert header.tensors[0].read().tolist() == [7]


# ------------------------------------------------------------------------------------------------- hostile

ENTRY = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
DUPLICATE = b"{" + ENTRY + b"," + ENTRY + b"}"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "empty header": (pack(b""), "begin with"),
    "length beyond the file": ((1 << 62).to_bytes(8, "little") + b"{}", "of which 2 are there"),
    "length 100 MB + 1": ((100_000_001).to_bytes(8, "little") + b"{", "of which"),
    "not JSON": (pack(b"{nope}"), "not JSON"),
    "space first": (pack(b" {}"), "begin with"),
    "BOM first": (pack(b"\xef\xbb\xbf{}"), "begin with"),
    "NUL padding": (pack(b"{}\0\0"), "not JSON"),
    "not UTF-8": (pack(b'{"\xff":1}'), "not JSON"),
    "a list": (pack(b"[]"), "begin with"),
    "deep": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not JSON"),
    "duplicate tensor": (pack(DUPLICATE, b"x"), "'a' appears twice"),
    "duplicate metadata": (pack(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' appears twice"),
    "metadata twice": (pack(b'{"__metadata__":{},"__metadata__":{}}'), "appears twice"),
    "metadata no object": (pack({"__metadata__": ["a"]}), "not an object"),
    "metadata number": (pack({"__metadata__": {"k": 1}}), "'k' is not a string"),
    "metadata surrogate": (pack(b'{"__metadata__":{"k":"\\ud800"}}'), "surrogate"),
    "name surrogate": (pack({"\ud800": entry("U8", [0], 0, 0)}), "surrogate"),
    "entry null": (pack({"a": None}), "not an object"),
    "entry list": (pack({"a": ["U8", [0], [0, 0]]}), "not an object"),
    "unknown key": (pack({"a": entry("U8", [0], 0, 0, extra=1)}), "unknown key 'extra'"),
    "missing key": (pack({"a": {"dtype": "U8", "shape": [0]}}), "lacks 'data_offsets'"),
    "unknown dtype": (pack({"a": entry("F128", [0], 0, 0)}), "unknown dtype 'F128'"),
    "dtype list": (pack({"a": entry(["U8"], [0], 0, 0)}), "unknown dtype a list"),  # type: ignore[arg-type]
    "float shape": (pack({"a": entry("U8", [1.0], 0, 1)}, b"x"), "not a size"),  # type: ignore[list-item]
    "bool shape": (pack({"a": entry("U8", [True], 0, 1)}, b"x"), "not a size"),
    "negative shape": (pack({"a": entry("U8", [-1, -1], 0, 1)}, b"x"), "negative|not a size"),
    "minus zero": (pack(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "negative"),
    "65 axes": (pack({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "at most 64"),
    "size beyond int64": (pack({"a": entry("U8", [0, 1 << 63], 0, 0)}), "not a size"),
    "5000 digits": (
        pack(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
        "digits",
    ),
    "elements overflow": (pack({"a": entry("U8", [1 << 32, 1 << 32, 1 << 32, 0], 0, 0)}), "overflow"),
    "bytes overflow": (pack({"a": entry("F64", [1 << 31, 1 << 30], 0, 0)}), "overflow"),
    "three offsets": (pack({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}), "two integers"),
    "offset float": (pack({"a": entry("U8", [1], 0, 1.0)}, b"x"), "two integers"),  # type: ignore[arg-type]
    "offset negative": (pack({"a": entry("U8", [1], -1, 0)}, b"x"), "not a range"),
    "offset backwards": (pack({"a": entry("U8", [1], 1, 0)}, b"x"), "not a range"),
    "wrong length": (pack({"a": entry("F32", [2], 0, 4)}, b"xxxx"), "takes 8"),
    "half a byte": (pack({"a": entry("F4", [3], 0, 1)}, b"x"), "whole bytes"),
    "hole": (pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"), "hole of 1"),
    "hole at the start": (pack({"a": entry("U8", [1], 1, 2)}, b"xy"), "hole of 1"),
    "overlap": (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"), "overlaps"),
    "shared range": (pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 0, 1)}, b"x"), "overlaps"),
    "trailing bytes": (pack({"a": entry("U8", [1], 0, 1)}, b"xPK"), "2 bytes after"),
    "truncated": (pack({"a": entry("U8", [9], 0, 9)}, b"x"), "8 bytes early"),
    "NaN": (pack(b'{"a":NaN}'), "NaN"),
    "1e400": (pack(b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,0]}}'), "double"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case: str, write: Callable[[bytes], Path]) -> None:
    raw, what = HOSTILE[case]
    path = write(raw)
    with pytest.raises(MalformedError, match=what) as caught:
        open_safetensors(path)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_the_error_names_the_tensor(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(MalformedError) as caught:
        open_safetensors(write(pack({"ok": entry("U8", [1], 0, 1), "bad\x1b[31m": entry("F32", [1], 1, 2)}, b"xy")))
    assert caught.value.tensor == "bad\x1b[31m"
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        pack(b"{}"),
        pack(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"abcd"),  # a scalar, unaligned
        pack({"a": entry("F16", [0, 1 << 62], 0, 0)}),
        pack({"a": entry("F4", [4], 0, 2)}, b"xy"),
        pack({"": entry("U8", [1], 0, 1)}, b"x"),
        pack({"e": entry("U8", [0], 1, 1), "b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"xy"),
        pack(b'{"__metadata__":{"a":"-0"}}   \n\t'),
        pack({"a-0": entry("U8", [0], 0, 0)}),
    ],
)
def test_odd_but_valid_headers_are_read(raw: bytes, write: Callable[[bytes], Path]) -> None:
    header = open_safetensors(write(raw))
    assert (
        header.file.read(0, header.header_nbytes) + b"".join(t.file.read(t.offset, t.nbytes) for t in header.tensors)
        == raw
    )
    assert dict(deserialize(raw)).keys() == {t.name for t in header.tensors}


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs pull"),
        (b"PK\x03\x04" + b"x" * 60, "torch.save"),
    ],
)
def test_disguised_files_get_a_hint(head: bytes, hint: str, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(MalformedError, match=hint):
        open_shard(write(head))


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="regular"):
        open_safetensors(tmp_path)
    with pytest.raises(NotFoundError):
        open_safetensors(tmp_path / "none")


# ------------------------------------------------------------------------------------ differential oracle


def reference_reads(raw: bytes) -> dict[str, dict[str, Any]] | None:
    try:
        return dict(deserialize(raw))
    except (safetensors.SafetensorError, TypeError, OverflowError):
        return None


SEED = safetensors.torch.save(
    {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.uint8),
        "c": torch.zeros(0, 2),
    },
    {"format": "pt"},
)
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"0",
        b"1",
        b"-0",
        b"-1",
        b"24",
        b"1e1",
        b".5",
        b" ",
        b"\0",
        b"null",
    ),
    *(
        b"true",
        b"\\ud800",
        b"\\u0061",
        b"F32",
        b"U8",
        b"F4",
        b"18446744073709551616",
        b"a.weight",
        b"dtype",
        b"\n",
        b"\xc3",
    ),
]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_reader_accepts_no_more_than_the_reference(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(raw)))
        drop = data.draw(st.integers(0, 4))
        raw[at : at + drop] = data.draw(st.sampled_from([b"", *TOKENS]))
    if data.draw(st.booleans()):  # let the length fit the header again, so that mutations reach the deeper rules
        end = raw.rfind(b"}") + 1
        raw[:8] = max(end - 8, 0).to_bytes(8, "little")
        raw[end:] = raw[end:].lstrip(b" ")
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    theirs = reference_reads(bytes(raw))
    try:
        ours = open_safetensors(path)
    except MalformedError:
        return
    assert theirs is not None, "accepted what the reference rejects"
    assert {t.name for t in ours.tensors} == theirs.keys()
    for tensor in ours.tensors:
        assert list(tensor.shape) == list(theirs[tensor.name]["shape"])
        assert bytes(tensor.file.read(tensor.offset, tensor.nbytes)) == bytes(theirs[tensor.name]["data"])


def test_the_reference_accepts_some_mutants(write: Callable[[bytes], Path]) -> None:
    """Guards the test above against passing because everything is rejected."""
    renamed = SEED.replace(b"a.weight", b"A.weight")
    assert reference_reads(renamed) is not None
    assert {t.name for t in open_safetensors(write(renamed)).tensors} == {"A.weight", "b", "c"}


# --------------------------------------------------------------------------------------------------- speed


def test_a_header_of_100_000_tensors_is_fast(write: Callable[[bytes], Path]) -> None:
    entries: list[TensorSpec] = [(f"model.layers.{i}.mlp.experts.weight", DType.U8, (1, 1)) for i in range(100_000)]
    head, _ = layout(entries, {})
    path = write(head + bytes(100_000))
    took = []
    for _ in range(3):
        begin = time.process_time()
        header = open_safetensors(path)
        took.append(time.process_time() - begin)
    assert len(header.tensors) == 100_000
    assert min(took) < 1.5
