# SPDX-License-Identifier: Apache-2.0
"""ONNX files byte by byte: what is damaged, hostile or means two things is refused."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx.wire import WireReader, varint, varints
from surgery_formats.errors import MalformedError, NotFoundError, SurgeryError
from surgery_formats.files.raw import open_file
from tests.support.onnx_files import FLOAT, WEIGHT, body, elsewhere, model, opened, saved


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"location": "/etc/passwd"}, "no path inside"), ({"location": "../model/a.data"}, "no path inside"),
        ({"location": "sub/../../a"}, "no path inside"), ({"location": "C:a.data"}, "no path inside"),
        ({"location": "..\\a.data"}, "no path inside"), ({"location": ""}, "no path inside"), ({}, "no path inside"),
        ({"location": "a\n.data"}, "no path inside"), ({"location": "link.data"}, "leads out"),
        ({"location": "linked/a.data"}, "leads out"),
        ({"location": "none.data"}, "No such file"), ({"location": "x" * 300}, "name too long"), ({"location": "."}, "leads out"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 1}, "No such file"),
        ({"location": "a.data", "offset": 4}, "ends at byte 4804"), ({"location": "a.data", "offset": "-1"}, "no offset"),
        ({"location": "a.data", "offset": "0x10"}, "no offset"), ({"location": "a.data", "offset": 1 << 63}, "no offset"),
        ({"location": "a.data", "length": 4796}, "4796 bytes in 'a.data'"), ({"location": "a.data", "length": "\u0664"}, "no length"),
    ],
)  # fmt: skip
def test_external_data_outside_the_folder_or_its_file_is_refused(
    entries: dict[str, object], what: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.data").write_bytes(WEIGHT.tobytes())
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    (folder / "link.data").symlink_to(tmp_path / "a.data")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises((MalformedError, NotFoundError), match=what):
        opened(folder, elsewhere("w", (40, 30), **entries))


def test_a_graph_that_is_larger_than_protocol_buffers_allow(tmp_path: Path) -> None:
    rows, path = 3 << 20, tmp_path / "huge.onnx"
    more, tail = rows * 256 * 4, tag(2, b"g")
    tensor = b"\x08" + varint(rows) + b"\x08" + varint(256) + FLOATS + tag(8, b"w") + b"\x4a" + varint(more)
    graph = b"\x2a" + varint(len(tensor) + more) + tensor
    head = b"\x08\x0a\x3a" + varint(len(graph) + more + len(tail)) + graph
    with open(path, "wb") as file:
        file.write(head)
        file.seek(more, os.SEEK_CUR)
        file.write(tail + tag(8, b"\x10\x15"))
    huge = open_graph(path)
    assert (huge.tensors["w"].nbytes, huge.tensors["w"].offset) == (3 << 30, len(head))
    assert not huge.proto.graph.initializer[0].raw_data


MADE = model(
    numpy_helper.from_array(WEIGHT, "w"), helper.make_tensor("t", FLOAT, (3,), [1, 2, 3]),
    helper.make_tensor("h", TensorProto.FLOAT16, (3,), [1, 2, 3]), elsewhere("e", (40, 30), location="a.data", offset=0),
    nodes=(helper.make_node("If", ["x"], ["chosen"], then_branch=body(WEIGHT, "t"), else_branch=body(WEIGHT, "e")),),
    producer_name="tests",
)  # fmt: skip
RAW = MADE.SerializeToString()


def test_a_file_that_is_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    open_graph(saved(tmp_path, RAW))
    end = RAW.index(MADE.graph.SerializeToString()) + MADE.graph.ByteSize()
    for size in {*range(0, end, 97), *range(60), end - 1, len(RAW) - 1}:
        with pytest.raises(MalformedError):
            open_graph(saved(tmp_path, RAW[:size]))


def test_a_damaged_file_is_opened_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    draw = random.Random(5)
    spots = [at for at in range(len(RAW)) if at < 400 or draw.random() < 0.05]
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(RAW)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.choice(spots)
            kind = draw.randrange(4)
            if kind == 0:
                damaged[at] = draw.randrange(256)
            elif kind == 1:
                damaged[at] ^= 1 << draw.randrange(8)
            elif kind == 2:
                del damaged[at : at + draw.randrange(1, 9)]
            else:
                damaged[at:at] = damaged[at : at + draw.randrange(1, 40)]
            spots = [spot for spot in spots if spot < len(damaged)]
        try:
            graph = open_graph(saved(tmp_path, bytes(damaged)))
        except SurgeryError as error:
            outcomes.add(type(error).__name__)
            continue
        outcomes.add("read")
        parsed = onnx.ModelProto()
        parsed.ParseFromString(bytes(damaged))  # what is read here is what others read
        dims = {tensor.name: tuple(tensor.dims) for tensor in parsed.graph.initializer}
        assert dims.items() <= dict(graph.shapes).items()
        for tensor in graph.tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= tensor.file.size
        for name in graph.small:
            with suppress(SurgeryError):
                graph.small[name]
        with suppress(SurgeryError):
            assert len(graph.proto.graph.initializer) <= 20
    assert {"read", "MalformedError"} <= outcomes


def tag(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def wrapped(graph: bytes) -> bytes:
    return b"\x08\x0a" + tag(7, graph)


DIMS, FLOATS = b"\x08\x02", b"\x10\x01"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it has no graph"), (b"\x08\x0a", "it has no graph"), (tag(7, b""), "it has no graph"),
        (wrapped(b"") + tag(7, b""), "stands twice"), (b"\x08\x0a" + b"\x3d1234", "byte 2"),
        (b"\x0a\x01a" + tag(7, b""), "byte 0"), (wrapped(b"\x0b\x0c"), "no field"), (wrapped(b"\x00\x00"), "no field"),
        (b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "no field"), (b"\x08" + b"\xff" * 11, "no field"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + tag(9, bytes(8)))), "stands twice"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + tag(4, bytes(8)))), "in two places"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + b"\x70\x01")), "in two places"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(9)))), "9 bytes for F32 .2., which takes 8"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + b"\x10\x63" + tag(9, bytes(8)))), "element type 99"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + tag(9, bytes(8)))), "element type 0"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08" + b"\xff" * 9 + b"\x01" + FLOATS)), "sizes"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08\x01" * 65 + FLOATS)), "at most 64 sizes"),
        (wrapped(tag(5, tag(8, b"w") + tag(1, b"\x01" * 65) + FLOATS)), "no field"),
        (wrapped(tag(5, tag(8, b"w") + tag(3, b"") + FLOATS)), "segment"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS)), "no values"), (wrapped(tag(5, FLOATS + tag(9, b""))), "no values"),
        (wrapped(tag(5, tag(8, b"\xff") + FLOATS)), "not UTF-8"), (wrapped(tag(5, tag(8, b"w" * 70000) + FLOATS)), "no field"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08\x00" + FLOATS) * 2), "appears twice"),
        (wrapped(b"\x2d1234"), "no field"), (wrapped(tag(1, b"\x2d1234")), "no field"),
        (wrapped(tag(1, tag(5, b"") * 4097)), "4097 attributes"),
    ],
)  # fmt: skip
def test_what_is_no_model_or_means_two_things_is_refused(content: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=what):
        open_graph(saved(tmp_path, content))


def test_bodies_are_not_followed_without_end(tmp_path: Path) -> None:
    graph = b""
    for _ in range(40):
        graph = tag(1, tag(2, b"o") + tag(5, tag(1, b"body") + tag(6, graph)))
    with pytest.raises(MalformedError, match="nested more than 30 deep"):
        open_graph(saved(tmp_path, wrapped(graph)))


def test_a_file_of_countless_fields_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.containers.onnx.wire._FIELDS", 1000)
    with pytest.raises(MalformedError, match="more than 1000 fields"):
        open_graph(saved(tmp_path, wrapped(b"\x10\x00" * 1001)))


def test_values_of_a_shape_that_they_do_not_fill_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    short = TensorProto(name="h", data_type=TensorProto.FLOAT16, dims=(1 << 40,), int32_data=[1, 2])
    graph = opened(tmp_path, short)
    with pytest.raises(MalformedError, match="values cannot be read"):
        graph.small["h"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_varints_are_read_as_they_are_written(numbers: list[int]) -> None:
    assert varints(b"".join(map(varint, numbers)), 20) == tuple(numbers)


def test_fields_are_those_of_the_parser(tmp_path: Path) -> None:
    reader = WireReader(open_file(saved(tmp_path, RAW)))
    fields = {field.number: field for field in reader.fields(0, len(RAW))}
    assert RAW[fields[7].begin : fields[7].end] == MADE.graph.SerializeToString()
    assert reader.text(fields[2]) == "tests"
    assert fields[1].value == MADE.ir_version
