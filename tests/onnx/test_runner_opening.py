"""A graph is opened with the weights it was made for, wherever they lie, or not at all."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import xxhash

from surgery.onnx.graph.contract import Contract, from_metadata
from surgery.onnx.graph.read_metadata import initializer_shapes, read_metadata
from surgery.onnx.graph.weight_files import WeightFile
from surgery.onnx.run import cudart
from surgery.onnx.run.opening import find_graph, open_graph
from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError
from tests.support.graphs import CONTRACT, decoder, prefix


def outside(folder, contract=CONTRACT):
    """The tiny decoder with its embedding in ``model.safetensors``, as byte range."""
    path = decoder(folder)
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if one.name == "embedding")
    header, ranges = layout([("embedding", DType.F32, tuple(tensor.dims))], {})
    weights = folder / "model.safetensors"
    weights.write_bytes(header + tensor.raw_data)
    offset, nbytes = ranges["embedding"]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", weights.name), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    file = WeightFile(weights.name, weights.stat().st_size, xxhash.xxh3_128(header).hexdigest())
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, replace(contract, weights=(file,)).as_metadata())
    path.write_bytes(model.SerializeToString())
    return path


def logits(opened):
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {name: empty for name in opened.inputs if name.startswith("past")}
    return opened.session.run(["logits"], {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], **feeds})[0]


def test_the_only_graph_of_a_folder_needs_no_name_of_its_own(tmp_path):
    path = decoder(tmp_path)
    path = path.rename(tmp_path / "foreign.onnx")
    assert find_graph(tmp_path) == path
    (tmp_path / "second.onnx").write_bytes(path.read_bytes())
    with pytest.raises(NotFoundError, match=r"several graphs: foreign\.onnx, second\.onnx; name one"):
        find_graph(tmp_path)


def test_the_contract_is_read_without_the_graph(tmp_path):
    path = decoder(tmp_path)
    props = read_metadata(path)
    assert props == {one.key: one.value for one in onnx.load(path).metadata_props}
    assert from_metadata(props) == CONTRACT
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-3])
    for name, raw in (("text", b"hello, this is not onnx"), ("zeros", b"\x80" * 40), ("empty field", b"\x72\xff\xff")):
        (tmp_path / "bad.onnx").write_bytes(raw)
        with pytest.raises(MalformedError):
            read_metadata(tmp_path / "bad.onnx")
        assert name
    with pytest.raises(MalformedError):
        read_metadata(tmp_path / "cut.onnx")


def test_shapes_of_initializers_are_read_without_onnx(tmp_path):
    path = decoder(tmp_path, prefix=prefix(1, 4), slots=True)
    wanted = {one.name: tuple(one.dims) for one in onnx.load(path).graph.initializer}
    assert initializer_shapes(path) == wanted
    assert wanted["past_key_values.0.key"] == (1, 2, 4, 16)
    entry = b"\x0a\x02\x03\xac\x0a\x01\x05\x42\x01w"  # packed sizes, as proto3 has them: 3, then a number cut short
    for raw in (entry, b"\x08\x01" * 65, b"\x42\x01\xff"):
        graph = b"\x2a" + bytes([len(raw)]) + raw if len(raw) < 128 else b"\x2a\x82\x01" + raw
        size = bytes([len(graph)]) if len(graph) < 128 else bytes([len(graph) & 127 | 128, 1])
        (tmp_path / "bad.onnx").write_bytes(b"\x3a" + size + graph)
        with pytest.raises(MalformedError):
            initializer_shapes(tmp_path / "bad.onnx")


def test_metadata_of_a_large_graph_is_read_fast(tmp_path):
    path = decoder(tmp_path)
    size = 1 << 33
    with open(tmp_path / "large.onnx", "wb") as file:  # ModelProto.graph of 8 GB, sparse
        file.write(b"\x3a" + b"\x80\x80\x80\x80\x20")
        file.truncate(6 + size)
        file.seek(6 + size)
        file.write(onnx.ModelProto(metadata_props=onnx.load(path).metadata_props).SerializeToString())
    began = time.process_time()
    assert from_metadata(read_metadata(tmp_path / "large.onnx")) == CONTRACT
    assert time.process_time() - began < 0.1


def test_a_folder_or_a_file_is_opened(tmp_path):
    path = decoder(tmp_path / "out")
    assert find_graph(tmp_path / "out") == find_graph(path) == path
    assert open_graph(tmp_path / "out", device="cpu").contract == CONTRACT
    with pytest.raises(NotFoundError, match=r"no model\.onnx"):
        find_graph(tmp_path)
    with pytest.raises(NotFoundError):
        find_graph(tmp_path / "nothing")


def test_weights_other_than_the_exported_ones_are_refused(tmp_path):
    path = outside(tmp_path)
    weights = tmp_path / "model.safetensors"
    good = weights.read_bytes()
    wanted = logits(open_graph(path, device="cpu"))
    weights.write_bytes(good + b"\0")
    with pytest.raises(ProofError, match="bytes instead of"):
        open_graph(path, device="cpu")
    weights.write_bytes(good[:10] + b"X" + good[11:])
    with pytest.raises(ProofError, match="header"):
        open_graph(path, device="cpu")
    weights.write_bytes(b"\xff" * len(good))
    with pytest.raises(ProofError, match="not a safetensors file"):
        open_graph(path, device="cpu")
    weights.unlink()
    with pytest.raises(NotFoundError):
        open_graph(path, device="cpu")
    weights.write_bytes(good)
    assert np.array_equal(logits(open_graph(path, device="cpu")), wanted)


def test_weights_in_another_folder_or_behind_a_link_are_found(tmp_path):
    path = outside(tmp_path / "base")
    wanted = logits(open_graph(path, device="cpu"))
    away = tmp_path / "away"
    away.mkdir()
    (away / "model.onnx").write_bytes(path.read_bytes())
    assert np.array_equal(logits(open_graph(away, device="cpu", weights=tmp_path / "base")), wanted)
    blobs = tmp_path / "blobs"  # as the hub's cache keeps them
    blobs.mkdir()
    os.rename(tmp_path / "base" / "model.safetensors", blobs / "0123")
    os.symlink(blobs / "0123", away / "model.safetensors")
    assert np.array_equal(logits(open_graph(away, device="cpu")), wanted)


def test_a_contract_cannot_lead_out_of_the_folder(tmp_path):
    file = WeightFile("../secret", 1, "0")
    with pytest.raises(MalformedError, match="secret"):
        open_graph(decoder(tmp_path, contract=replace(CONTRACT, weights=(file,))), device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**9}, {"layers": 3}, {"kv_heads": -1}, {"kv_heads": "2"}, {"kv_heads": 10**12}, {"head_dim": 1.5},
        {"vocabulary": 10**9}, {"vocabulary": True}, {"max_length": 1 << 60}, {"padding": "up"}, {"cache": "none"},
        {"kind": "model"}, {"dtype": "int8"}, {"prefill": 5}, {"prefill_batch": 1}, {"adapters": [5]}, {"slots": [[]]},
        {"vocabulary_rows": [-5, 10**9]}, {"vocabulary_rows": [40, 1 << 40]}, {"vocabulary_rows": [1]}, {"schema": 2},
        {"weights": [{"name": "model.safetensors", "size": "x", "header": "0"}]}, {"more": 1},
        {"adapters": [{"strength": []}]}, {"adapters": [{"name": 5}]}, {"adapters": [{"encoder_file": ["a"]}]},
        {"sized_late": 1}, {"encoder": []}, {"embedder": {}}, {"convolutions": [0]}, {"convolutions": [[0]]}, {"state": [1]},
        {"quantised": [{}]}, {"quantised": [{"bits": [], "block": 32, "symmetric": True, "weights": []}]},
        {"slots": [{"weight": "w", "A": "a", "B": "b", "parts": [["w"]]}]},
        {"slots": [{"weight": "w", "A": "a", "B": "b", "parts": [["w", "5"]]}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_contract_with_invalid_fields_is_refused(tmp_path, change):
    """Buffers are made by it: what it says must be numbers, and the graph's."""
    path = decoder(tmp_path)
    model = onnx.load(path)
    said = json.loads(model.metadata_props[0].value) | change
    model.metadata_props[0].value = json.dumps(said)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MalformedError):
        open_graph(path, device="cpu")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"schema": 1, "kind": ' + "[" * 100_000 + "]" * 100_000 + "}", "5", ""]
)
def test_a_contract_that_is_not_json_is_refused(text):
    with pytest.raises(MalformedError):
        from_metadata({"surgery.contract": text})


@pytest.mark.parametrize(
    "text",
    ['{"model": [5]}', '{"model": {"decoder": 7, "context_length": "x"}}', '{"model": {"decoder": {"head_size": []}}}'],
)
def test_invalid_files_beside_foreign_graphs_are_refused(tmp_path, text):
    path = decoder(tmp_path, "grouped")
    model = onnx.load(path)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(FitError, match="greatest sequence length"):
        open_graph(path, device="cpu")


def test_an_unavailable_device_is_named(tmp_path):
    path = decoder(tmp_path / "bf16", contract=replace(CONTRACT, dtype="bf16", target="cuda"))
    with pytest.raises(FitError, match="bf16 graph does not run on the cpu"):
        open_graph(path, device="cpu")
    with pytest.raises(FitError, match="'cuda:99' is not available"):
        open_graph(path, device="cuda:99")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(FitError, match="cannot load"):
        open_graph(tmp_path / "empty.onnx", device="cpu")


def test_a_gpu_beside_an_onnxruntime_of_the_cpu_gets_the_cure(tmp_path, monkeypatch):
    path = decoder(tmp_path / "cuda", contract=replace(CONTRACT, target="cuda"))
    monkeypatch.setattr(cudart, "device_count", lambda: 1)
    monkeypatch.setattr(cudart, "CudaMemory", lambda index: SimpleNamespace(device="cuda", index=index, stream=0))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(FitError, match=r"installed without CUDA.*onnxruntime-gpu"):
        open_graph(path, device="cuda")


@pytest.mark.parametrize(
    ("attention", "cache", "padding"), [("grouped", "shared", "right"), ("plain", "growing", "left")]
)
def test_graphs_of_other_exporters_are_understood_by_their_inputs(tmp_path, attention, cache, padding):
    path = decoder(tmp_path, attention)
    model = onnx.load(path)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    if cache == "shared":
        with pytest.raises(FitError, match="greatest sequence length"):
            open_graph(path, device="cpu")
    else:  # nothing in the graph ends it
        assert open_graph(path, device="cpu").contract.max_length == 2**31 - 1
    (tmp_path / "genai_config.json").write_text('{"model": {"context_length": 64}}')
    opened = open_graph(path, device="cpu")
    assert opened.foreign
    wanted = Contract(
        "decoder",
        "text-generation",
        "cpu",
        "fp32",
        padding,
        cache,
        2,
        2,
        16,
        40,
        64,
        prefill_batch=attention == "plain",
    )
    assert opened.contract == wanted


def test_a_symbolic_head_size_is_read_from_genai_config(tmp_path):
    path = decoder(tmp_path)
    model = onnx.load(path)
    del model.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[3].dim_param = "size"
    path.write_bytes(model.SerializeToString())
    config = tmp_path / "genai_config.json"
    config.write_text('{"model": {"context_length": 64}}')
    with pytest.raises(FitError, match="size of a head"):
        open_graph(path, device="cpu")
    config.write_text('{"model": {"context_length": 64, "decoder": {"head_size": 16}}}')
    assert open_graph(path, device="cpu").contract.head_dim == 16
