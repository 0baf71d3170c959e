# SPDX-License-Identifier: Apache-2.0
"""Torch checkpoints read as byte ranges: parity with torch.save."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery_formats.containers.torch.pickle_file import state_dict
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from tests.support.torch_pickles import open_torch

BOTH = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any, bool], Path]:
    def save(tree: Any, new: bool = True) -> Path:
        path = tmp_path / "x.pt"
        torch.save(tree, path, _use_new_zipfile_serialization=new)
        return path

    return save


def same(stored: StoredTensor, tensor: torch.Tensor) -> bool:
    read = stored.read()
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return (
        DType.of(read.dtype) is DType.of(tensor.dtype)
        and read.shape == tensor.shape
        and list(read.tobytes()) == flat.view(torch.uint8).tolist()
    )


# -------------------------------------------------------------------------------------------------- parity

SAVED_DTYPES = [d for d in DType if d.torch_name is not None]


@BOTH
@pytest.mark.parametrize("dtype", SAVED_DTYPES, ids=lambda d: d.label)
def test_tensors_of_every_dtype_are_read(dtype: DType, new: bool, save: Callable[[Any, bool], Path]) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is DType.BOOL else raw.view(dtype.torch)
    found = state_dict(open_torch(save({"a": tensor.reshape(2, -1), "empty": tensor[:0]}, new)))
    assert list(found) == ["a", "empty"]
    assert (found["a"].name, found["a"].dtype, found["a"].strides) == ("a", dtype, None)
    assert same(found["a"], tensor.reshape(2, -1))
    assert found["empty"].nbytes == 0
    assert same(found["empty"], tensor[:0])


@BOTH
def test_views_keep_their_strides(new: bool, save: Callable[[Any, bool], Path]) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    tree = {
        "transposed": base.t(),
        "columns": base[:, 2:7],
        "rows": base[1:3],
        "every other": base[::2, ::3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 7),
        "scalar": torch.tensor(3.0),
        "one column": base[:, 4:5],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "odd stride of an axis of size 1": base[:1],
    }
    found = state_dict(open_torch(save(tree, new)))
    for name, tensor in tree.items():
        assert same(found[name], tensor), name
        assert (found[name].strides is None) == tensor.is_contiguous(), name
    assert found["transposed"].read(3, 5).tolist() == base.t()[3:5].tolist()
    assert found["rows"].nbytes == 2 * 12 * 4
    assert found["columns"].nbytes == (4 * 12 + 5) * 4  # the span, not the whole storage


@BOTH
def test_tied_tensors_share_a_location(new: bool, save: Callable[[Any, bool], Path]) -> None:
    weight = torch.randn(4, 3)
    found = state_dict(open_torch(save({"a": weight, "b": weight, "c": weight.clone(), "d": weight[:2]}, new)))
    assert found["a"].place == found["b"].place
    assert len({found[k].place for k in "acd"}) == 3
    assert found["d"].offset == found["a"].offset


@BOTH
def test_a_module_state_dict_with_metadata_is_read(new: bool, save: Callable[[Any, bool], Path]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    whole = {
        "model": module.state_dict(),
        "epoch": 3,
        "optimizer": {"lr": [0.1]},
    }
    found = state_dict(open_torch(save(whole, new)))
    assert list(found) == list(module.state_dict())
    assert all(same(found[name], tensor) for name, tensor in module.state_dict().items())
    whole["optimizer"]["state"] = {0: torch.ones(1)}
    with pytest.raises(MalformedError, match="optimizer"):  # nothing is dropped without a word
        state_dict(open_torch(save(whole, new)))
    parameters = collections.OrderedDict(module.named_parameters())
    found = state_dict(open_torch(save(parameters, new)))
    assert all(same(found[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    tree = {
        "a": torch.arange(6.0).reshape(2, 3),
        "é": torch.ones(300),
        "n": -(1 << 40),
        "f": 0.5,
        "s": "x",
        "none": None,
    }
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol)
    opened = open_torch(tmp_path / "x.pt")
    assert isinstance(opened, dict)
    assert {key: opened[key] for key in "nfs"} | {"none": opened["none"]} == {
        "n": -(1 << 40),
        "f": 0.5,
        "s": "x",
        "none": None,
    }
    assert same(state_dict(opened)["a"], tree["a"])  # type: ignore[arg-type]


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(st.text(max_size=3) | st.integers(), x, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain, st.booleans(), st.sampled_from([2, 4, 5]))
def test_plain_values_round_trip(tmp_path: Path, tree: Any, new: bool, protocol: int) -> None:
    torch.save(tree, tmp_path / "p.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    opened = open_torch(tmp_path / "p.pt")
    assert opened == tree
    assert type(opened) is type(tree)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_views_of_one_storage_are_read(tmp_path: Path, data: st.DataObject) -> None:
    base = torch.arange(64, dtype=torch.int32)
    tree = {}
    for name in "abc":
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        strides = (
            [1] * len(shape)
            if 0 in shape
            else data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        )
        tree[name] = base.as_strided(shape, strides, data.draw(st.integers(0, 9)))
    torch.save(tree, tmp_path / "v.pt")
    found = state_dict(open_torch(tmp_path / "v.pt"))
    assert all(same(found[name], tensor) for name, tensor in tree.items())
    inside = [t for t in found.values() if t.nbytes]
    assert all(t.offset + t.nbytes <= t.file.size for t in inside)


def test_sizes_and_dtypes_become_plain_values(save: Callable[..., Path]) -> None:
    assert open_torch(save({"shape": torch.Size([2, 3]), "dtype": torch.bfloat16})) == {
        "shape": (2, 3),
        "dtype": DType.BF16,
    }


def test_reading_a_pickle_does_not_import_torch(save: Callable[..., Path]) -> None:
    path = save({"a": torch.ones(2)})
    code = (
        "import sys; from surgery_formats.containers.torch.pickle_file import *; from surgery_formats.files.raw import open_file\n"
        f"assert list(state_dict(read_torch(open_file({str(path)!r})))) == ['a']\n"
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], env) == 0


# --------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_wrapped_state_dict_is_found(wrapper: str, save: Callable[..., Path]) -> None:
    opened = open_torch(save({wrapper: {"a": torch.ones(1), "step": 7}, "epoch": 1}))
    assert list(state_dict(opened)) == ["a"]


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ([torch.ones(1)], "a list where a dict"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "'b'.*a dict where a tensor"),
        ({"a": torch.ones(1), "b": torch.ones(1).untyped_storage()}, "'b'.*a storage where a tensor"),
        ({"model": {}, "state_dict": {}}, "several dicts"),
        ({"a": torch.ones(1), 3: torch.ones(1)}, "'3' is not a string"),
        ({"a": torch.ones(1), "\ud800": torch.ones(1)}, "surrogate"),
    ],
)
def test_a_pickle_without_a_state_dict_is_refused(tree: Any, what: str, save: Callable[..., Path]) -> None:
    with pytest.raises(MalformedError, match=what):
        state_dict(open_torch(save(tree, False)))
