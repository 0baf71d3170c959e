# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: Olive's do what PEFT does, and ours are taken by onnxruntime."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from surgery import convert, inspect
from surgery.onnx.run.adapter_file import adapter_bytes, read_adapter_file
from surgery_formats.adapters.onnx_adapter import ONNX_ADAPTER
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError, MalformedError, SurgeryError, UsageError
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

FOLDER = GOLDEN / "onnx_adapter"
CASES: list[str] = json.loads((FOLDER / "expected.json").read_text())["cases"]
Q = "model.layers.0.self_attn.q_proj"


def _peft(folder: Path, rank: int = 2, **config: object) -> Path:
    stem = f"base_model.model.{Q}"
    tensors = {f"{stem}.lora_A.weight": draw(1, rank, 8), f"{stem}.lora_B.weight": draw(2, 12, rank)}
    return write_peft(folder, tensors, r=rank, **config)


@pytest.mark.parametrize("name", CASES)
def test_olives_file_does_what_peft_does(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.onnx_adapter"
    adapter = read_adapter(file)
    assert (adapter.format, adapter.unconsumed()) == ("onnx-adapter", ())
    base, expected = FOLDER / name / "model.safetensors", FOLDER / name / "expected.safetensors"
    assert_expected(base, merged(FOLDER / name, file, tmp_path / "out"), expected)


@pytest.mark.parametrize("name", CASES)
def test_it_goes_to_peft_and_back_under_the_names_of_a_graph(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.onnx_adapter"
    convert(file, "peft", output=tmp_path / "peft")
    back = tmp_path / "back.onnx_adapter"
    convert(tmp_path / "peft", "onnx-adapter", output=back)
    before, after = read_adapter_file(file), read_adapter_file(back)
    before = {  # Olive passes PEFT's copy on, and leaves its prefix on names without model., which its graphs do not have
        key.removeprefix("base_model.model."): value for key, value in before.items() if "base_layer" not in key
    }
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[key], value) for key, value in before.items())
    assert inspect(back).kinds == inspect(tmp_path / "peft").kinds


def test_onnxruntime_adds_what_we_write(tmp_path: Path) -> None:
    """A graph with inputs for A and B of rank 0 by default, run with and without the file as its active adapter."""
    out = tmp_path / "lora.onnx_adapter"
    result = convert(_peft(tmp_path / "peft", lora_alpha=6), "onnx-adapter", output=out)
    assert [entry.outcome for entry in result.entries] == ["folded"]
    a, b = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    empty = [
        helper.make_tensor(a, TensorProto.FLOAT, (8, 0), []),
        helper.make_tensor(b, TensorProto.FLOAT, (0, 12), []),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3, 8))]
    inputs += [helper.make_tensor_value_info(a, TensorProto.FLOAT, (8, "r"))]
    inputs += [helper.make_tensor_value_info(b, TensorProto.FLOAT, ("r", 12))]
    nodes = [helper.make_node("MatMul", ["x", a], ["h"]), helper.make_node("MatMul", ["h", b], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 12))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, empty)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(out))
    options.add_active_adapter(adapter)
    x = draw(5, 3, 8)
    assert not session.run(["y"], {"x": x})[0].any()
    wanted = x @ (6 / 2 * draw(2, 12, 2) @ draw(1, 2, 8)).T
    assert np.allclose(session.run(["y"], {"x": x}, options)[0], wanted, rtol=1e-5, atol=1e-5)


_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("ab.é漢", min_size=1, max_size=11),
        st.tuples(st.sampled_from(sorted(_TYPES)), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=7,
    )
)
def test_the_bytes_are_those_of_onnxruntime(tmp_path: Path, given: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(7)
    arrays = {name: rng.integers(0, 2, shape).astype(kind) for name, (kind, shape) in sorted(given.items())}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _TYPES[array.dtype.name])
        for name, array in arrays.items()
    }
    theirs = onnxruntime.AdapterFormat()
    theirs.set_adapter_version(1)
    theirs.set_model_version(1)
    theirs.set_parameters(values)
    theirs.export_adapter(str(tmp_path / "x"))
    assert adapter_bytes(arrays) == (tmp_path / "x").read_bytes()
    assert {tensor.name for tensor in open_onnx_adapter(tmp_path / "x").tensors} == set(arrays)


def test_a_conversion_has_them_too(tmp_path: Path) -> None:
    out = tmp_path / "x.onnx_adapter"
    convert(_peft(tmp_path / "peft"), "onnx-adapter", output=out)
    assert out.read_bytes() == adapter_bytes(read_adapter_file(out))


def test_what_a_graph_cannot_take_is_named(tmp_path: Path) -> None:
    stem = f"base_model.model.{Q}"
    tensors = {f"{stem}.lora_A.weight": draw(1, 2, 8), f"{stem}.lora_B.weight": draw(2, 12, 2)}
    dora = write_peft(tmp_path / "dora", {**tensors, f"{stem}.lora_magnitude_vector": draw(3, 12)}, use_dora=True)
    with pytest.raises(FitError, match="no DoRA"):
        convert(dora, "onnx-adapter", output=tmp_path / "out.onnx_adapter")
    with pytest.raises(UsageError, match=r"must end in \.onnx_adapter"):
        convert(_peft(tmp_path / "lora"), "onnx-adapter", output=tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({f"{Q}.lora_A.weight": draw(1, 8, 2)}, "without its 'lora_B.weight'"),
        ({f"{Q}.lora_A.weight": draw(1, 8, 2), f"{Q}.lora_B.weight": draw(2, 3, 12)}, "its lora_B"),
        ({f"{Q}.lora_A.quant.weight": draw(1, 8, 2)}, "codes of 4 bits"),
        ({"past_key_values.0.key": draw(1, 1, 2, 3, 4)}, "keys and values of a prefix"),
        ({"something": draw(1, 2)}, "neither lora_A nor lora_B"),
    ],
)
def test_other_inputs_are_refused(arrays: dict[str, np.ndarray], fault: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx_adapter").write_bytes(adapter_bytes(arrays))
    with pytest.raises((FitError, MalformedError), match=fault):
        read_adapter(tmp_path / "x.onnx_adapter")


def test_arrays_that_share_bytes_and_endless_names_are_refused(tmp_path: Path) -> None:
    """So that a small file stands for no more values than it holds, however often it names them."""
    path = tmp_path / "x.onnx_adapter"
    whole = bytearray(adapter_bytes({"a": draw(1, 400), "b": draw(2, 400)}))
    path.write_bytes(whole)
    first = min(open_onnx_adapter(path).tensors, key=lambda tensor: tensor.offset)
    struct.pack_into("<I", whole, first.offset - 4, 3200)  # it now reaches into the other
    said = []
    for at in (at for at in range(0, len(whole) - 8, 4) if struct.unpack_from("<q", whole, at)[0] == 400):
        longer = bytearray(whole)
        struct.pack_into("<q", longer, at, 800)
        path.write_bytes(longer)
        with pytest.raises(MalformedError) as caught:
            open_onnx_adapter(path)
        said.append(caught.value.message)
    assert any("its arrays share bytes: they take 4800 of" in message for message in said)
    with pytest.raises(FitError, match="a name of 70000 bytes"):
        adapter_bytes({"a" * 70_000: draw(1, 4)})


def test_slots_of_rank_0_do_nothing(tmp_path: Path) -> None:
    arrays = {f"{Q}.lora_A.weight": draw(1, 8, 2), f"{Q}.lora_B.weight": draw(2, 2, 12)}
    arrays |= {
        f"{Q}2.lora_A.weight": np.zeros((8, 0), np.float32),
        f"{Q}2.lora_B.weight": np.zeros((0, 12), np.float32),
    }
    (tmp_path / "x.onnx_adapter").write_bytes(adapter_bytes(arrays))
    adapter = read_adapter(tmp_path / "x.onnx_adapter")
    assert (len(adapter.updates), len(adapter.ignored), adapter.unconsumed()) == (1, 2, ())


def test_a_damaged_file_is_refused_or_gives_the_same_values(tmp_path: Path) -> None:
    """Every word but those of the two arrays in turn: offsets, lengths, sizes, types, names, and gaps that nobody reads."""
    path = tmp_path / "x.onnx_adapter"
    convert(_peft(tmp_path / "peft"), "onnx-adapter", output=path)
    whole, arrays = path.read_bytes(), open_onnx_adapter(path).tensors
    sound = {tensor.name: tensor.read().tolist() for tensor in arrays}
    inside = {at for tensor in arrays for at in range(tensor.offset, tensor.offset + tensor.nbytes)}
    words = [at for at in range(0, len(whole), 4) if at not in inside]
    named: list[str | None] = []
    for at in words:
        damaged = bytearray(whole)
        struct.pack_into("<I", damaged, at, 0x7FFFFFF0)
        path.write_bytes(damaged)
        try:
            adapter = ONNX_ADAPTER.read(path)
        except SurgeryError as error:
            named.append(error.file)
            continue
        assert {tensor.name: tensor.read().tolist() for tensor in adapter.tensors} == sound, at
    assert set(named) == {str(path)}
    assert len(named) >= 2 * len(words) // 3
