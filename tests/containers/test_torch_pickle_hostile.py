# SPDX-License-Identifier: Apache-2.0
"""Pickles of torch checkpoints that try to run, crash or exhaust something."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery_formats.containers.torch.pickle_file import nested_names, state_dict
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from tests.support.torch_pickles import TENSOR, Write, long, open_torch, tensor

BOTH = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Runs:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@BOTH
@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_a_payload_does_not_run(new: bool, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tree = {"a": torch.ones(1), "b": Runs(f"touch {marker}")}
    torch.save(tree, tmp_path / "x.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    with pytest.raises(MalformedError, match=r"posix\.system|nt\.system"):
        open_torch(tmp_path / "x.bin")
    assert not marker.exists()
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert marker.exists(), "the payload is no payload"


def test_a_payload_in_a_bare_pickle_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Runs("exit 1")))
    with pytest.raises(MalformedError, match="system"):
        open_torch(tmp_path / "x.bin")


def test_the_hand_made_pickle_is_valid_before_it_is_spoiled(archive: Write) -> None:
    found = open_torch(archive(b"\x80\x02" + tensor() + b".", s0=struct.pack("<2f", 1, 2)))
    assert isinstance(found, StoredTensor)
    assert found.read().tolist() == [1, 2]


BIG = (1 << 62) + 1


PROGRAMS: dict[str, tuple[bytes, str]] = {
    # calls
    "GLOBAL eval": (b"cbuiltins\neval\n.", "builtins.eval"),
    "GLOBAL of Python 2": (b"c__builtin__\neval\n.", "__builtin__.eval"),
    "GLOBAL with dots": (b"ctorch\nnn.Module.apply\n.", "torch.nn.Module.apply"),
    "GLOBAL torch.load": (b"ctorch\nload\n.", "torch.load"),
    "GLOBAL runstring": (b"cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
    "GLOBAL of a private helper": (b"ctorch._utils\n_rebuild_qtensor\n.", "_rebuild_qtensor"),
    "STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "STACK_GLOBAL of a split name": (b"\x8c\x05torch\x8c\x0d_utils.system\x93.", "torch._utils.system"),
    "STACK_GLOBAL without text": (b"K\x01K\x02\x93.", "not text"),
    "INST": (b"(S'echo'\nios\nsystem\n.", "os system"),
    "OBJ": (b"(ccollections\nOrderedDict\no.", "OBJ"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
    "EXT1": (b"\x82\x01.", "EXT1"),
    "EXT2": (b"\x83\x01\0.", "EXT2"),
    "EXT4": (b"\x84\x01\0\0\0.", "EXT4"),
    "REDUCE of a string": (b"\x8c\x02os)R.", "str"),
    "REDUCE of a storage class": (b"ctorch\nFloatStorage\n)R.", "torch.FloatStorage"),
    "REDUCE of a dtype": (b"ctorch\nfloat32\n)R.", "DType"),
    "REDUCE without a tuple": (b"ccollections\nOrderedDict\n]R.", "not a tuple"),
    "BUILD on a list": (b"]}b.", "dict that is not there"),
    "BUILD on a tensor": (tensor() + b"}b.", "dict that is not there"),
    "BUILD with a list": (b"}]b.", "not a dict"),
    "BUILD on a global": (b"ccollections\nOrderedDict\n}b.", "dict that is not there"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "BYTES": (b"C\x01x.", "SHORT_BINBYTES"),
    "FROZENSET": (b"(\x91.", "FROZENSET"),
    "NEXT_BUFFER": (b"\x97.", "NEXT_BUFFER"),
    # stack and memo
    "empty": (b"", "not a pickle|no end"),
    "no STOP": (b"N", "not a pickle|no end"),
    "only STOP": (b".", "empty stack"),
    "leftovers on the stack": (b"NN.", "left on the stack"),
    "underflow of TUPLE2": (b"N\x86.", "empty stack"),
    "underflow of REDUCE": (b")R.", "empty stack"),
    "TUPLE without MARK": (b"Nt.", "mark is missing"),
    "a MARK taken as a value": (b"(0N.", "empty stack"),
    "a MARK in a tuple": (b"(\x85.", "empty stack"),
    "a MARK memoized": (b"(q\0.", "not there"),
    "a MARK duplicated": (b"(2.", "not there"),
    "a MARK as result": (b"(.", "empty stack"),
    "GET of nothing": (b"h\x07.", "not stored"),
    "APPEND to a dict": (b"}Na.", "list that is not there"),
    "SETITEM on a list": (b"]NNs.", "dict that is not there"),
    "SETITEMS odd": (b"}(Nu.", "without a value"),
    "unhashable key": (b"}]Ns.", "list as key"),
    "tuple key": (b"})Ns.", "tuple as key"),
    "unknown opcode": (b"\xff.", "not a pickle"),
    "truncated argument": (b"X\xff\xff\xff\x7fabc", "not a pickle"),
    "8 exabytes of text": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "not a pickle"),
    "giant integer": (b"\x8b\x20\0\0\0" + b"\x7f" * 32 + b".", "128 bits"),
    "payload first, then broken": (b"cposix\nsystem\n(S'true'\ntRI", "posix.system"),
    "more behind STOP": (b"N.cos\nsystem\n.", "behind the end"),
    # storages and tensors
    "storage as text": (tensor(pid=b"\x8c\x01xQ") + b".", "not a storage"),
    "storage with a view": (
        tensor(pid=b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02)tQ") + b".",
        "not a storage",
    ),
    "storage of an unknown class": (tensor(kind=b"ctorch\nSize\n") + b".", "unknown type"),
    "storage of a quantized class": (tensor(kind=b"ctorch\nQInt8Storage\n") + b".", "torch.QInt8Storage"),
    "storage that is missing": (
        tensor().replace(b"X\x01\0\0\x000", b"X\x01\0\0\x009") + b".",
        "'9' is missing",
    ),
    "storage outside by name": (
        tensor().replace(b"X\x01\0\0\x000", b"X\x05\0\0\x00../v1") + b".",
        "is missing",
    ),
    "storage smaller than said": (tensor(numel=3) + b".", "has 8 bytes, its description says 12"),
    "storage larger than said": (tensor(numel=1) + b".", "has 8 bytes, its description says 4"),
    "storage of negative size": (tensor(numel=-2) + b".", "without a key or a size"),
    "storage of a huge size": (tensor(numel=BIG) + b".", "its description says"),
    "storage in two types": (
        b"(" + tensor() + tensor(kind=b"ctorch\nIntStorage\n") + b"t.",
        "described in two ways",
    ),
    "tensor beyond its storage": (tensor(offset=1) + b".", "beyond its storage"),
    "tensor at a negative offset": (tensor(offset=-1) + b".", "invalid offset, size or stride"),
    "tensor of negative stride": (tensor(stride=long(-1) + b"\x85") + b".", "invalid offset, size or stride"),
    "tensor of negative size": (tensor(size=long(-2) + b"\x85") + b".", "invalid offset, size or stride"),
    "tensor of a bool size": (tensor(size=b"\x88\x85") + b".", "invalid offset, size or stride"),
    "tensor of a list size": (tensor(size=b"]K\x02a") + b".", "invalid offset, size or stride"),
    "tensor with fewer strides": (tensor(stride=b")") + b".", "invalid offset, size or stride"),
    "tensor of 65 axes": (
        tensor(size=b"(" + b"K\x01" * 65 + b"t", stride=b"(" + b"K\x01" * 65 + b"t") + b".",
        "invalid offset, size or stride",
    ),
    "tensor with a far stride": (tensor(stride=long(BIG) + b"\x85") + b".", "beyond its storage"),
    "tensor whose size overflows": (
        tensor(size=long(BIG) + long(BIG) + b"\x86", stride=b"K\0K\0\x86") + b".",
        "overflows",
    ),
    "tensor expanded to a petabyte": (
        tensor(size=long(1 << 48) + b"\x85", stride=b"K\0\x85") + b".",
        "elements in a storage",
    ),
    "tensor of no storage": (TENSOR + b"(NK\0))\x89)tR.", "without a storage"),
    "tensor of three arguments": (TENSOR + b"NNN\x87R.", "without a storage"),
    "tensor to be conjugated": (tensor(tail=b"\x89)}\x8c\x04conj\x88s") + b".", "conjugation"),
    "v3 of a typed storage": (
        tensor(tail=b"\x89)ctorch\nint32\n").replace(b"tensor_v2", b"tensor_v3") + b".",
        "without an element type",
    ),
    "v2 of an untyped storage": (
        tensor(kind=b"ctorch.storage\nUntypedStorage\n", numel=8) + b".",
        "without an element type",
    ),
    "parameter without a tensor": (b"ctorch._utils\n_rebuild_parameter\nN\x88)\x87R.", "without a tensor"),
    "torch.Size of text": (b"ctorch\nSize\n\x8c\x01x\x85\x85R.", "something other than sizes"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_hostile_pickle_is_refused(case: str, archive: Write) -> None:
    program, what = PROGRAMS[case]
    path = archive(b"\x80\x02" + program, s0=bytes(8))
    with pytest.raises(MalformedError, match=what) as caught:
        open_torch(path)
    assert caught.value.file == str(path)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "program",
    [
        b"]q\0" + b"(h\0h\0e" * 50_000 + b".",  # a list that holds itself 100,000 times
        b"N\x85q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(50_000)) + b"0" * 50_000 + b".",  # 2 ** 50,000 leaves
        b"]" * 200_000 + b"a" * 199_999 + b".",  # 200,000 deep
        b"N" + b"2" * 300_000 + b"0" * 300_000 + b".",
    ],
    ids=["cycle", "exponential", "deep", "dup"],
)
def test_memo_bombs_cost_no_more_than_their_size(program: bytes, archive: Write) -> None:
    begin = time.process_time()
    opened = open_torch(archive(b"\x80\x02" + program))
    with pytest.raises(MalformedError):
        state_dict(opened)
    del opened
    assert time.process_time() - begin < 10


def test_quadratic_ordered_dicts_are_cut_off(archive: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.containers.torch.pickle_interpreter._STEP_LIMIT", 100_000)
    pairs = b"](" + b"K\x01K\x01\x86" * 5_000 + b"eq\0"
    again = b"ccollections\nOrderedDict\nh\0\x85R0" * 1_000
    with pytest.raises(MalformedError, match="steps"):
        open_torch(archive(b"\x80\x02" + pairs + again + b"."))


def test_too_many_opcodes_are_refused(archive: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.containers.torch.pickle_interpreter._STEP_LIMIT", 99)
    with pytest.raises(MalformedError, match="steps"):
        open_torch(archive(b"N0" * 50 + b"N."))


def test_an_ordered_dict_of_python_2_is_read(archive: Write) -> None:
    pairs = b"](](K\x01K\x02e](K\x03K\x04ee"  # [[1, 2], [3, 4]]
    assert open_torch(archive(b"ccollections\nOrderedDict\n" + pairs + b"\x85R.")) == {1: 2, 3: 4}


@cache
def saved(new: bool) -> bytes:
    """A small checkpoint; made once, as the older format holds addresses, and its length changes with them."""
    buffer = io.BytesIO()
    tree = {"a": torch.ones(2, 3).t(), "b": torch.nn.Parameter(torch.ones(2))}
    torch.save(tree, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_mutated_checkpoints_open_or_are_refused(tmp_path: Path, data: st.DataObject, new: bool) -> None:
    raw = bytearray(saved(new))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    (tmp_path / "m.pt").write_bytes(raw)
    try:
        found = state_dict(open_torch(tmp_path / "m.pt"))
    except MalformedError:
        return
    for stored in found.values():
        assert stored.offset + stored.nbytes <= len(raw)
        stored.read()


def test_what_is_shared_is_walked_once(tmp_path: Path) -> None:
    """Dicts of 40 keys, all of which are the same dict of 40 keys, and so on: 3 KB, and as a tree 40**9 nodes."""
    start = time.process_time()
    for leaf in (torch.ones(1), 7):
        shared: Any = leaf
        for _ in range(9):
            shared = {f"k{number}": shared for number in range(40)}
        torch.save({"state_dict": {"x": torch.ones(2)}, "other": shared}, tmp_path / "x.pt")
        tree = open_torch(tmp_path / "x.pt")
        assert nested_names(tree) == ["state_dict.x"]
        if isinstance(leaf, int):
            assert state_dict(tree).keys() == {"x"}
            continue
        with pytest.raises(MalformedError, match="tensors under other"):
            state_dict(tree)
    assert time.process_time() - start < 5


def test_a_long_key_is_not_repeated_for_every_tensor(tmp_path: Path) -> None:
    torch.save({"k" * 10**6: dict.fromkeys(map(str, range(5000)), torch.ones(1))}, tmp_path / "x.pt")
    assert sum(map(len, nested_names(open_torch(tmp_path / "x.pt")))) < 5000 * 300
