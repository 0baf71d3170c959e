"""``.onnx_adapter``: what is written is what is read, by us and by onnxruntime, and nothing else is read."""

from __future__ import annotations

import struct
import weakref

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import surgery
from surgery.onnx.insert import contents
from surgery.onnx.insert.contents import factors_for
from surgery.onnx.run.adapter_file import AdapterFile, read_adapter_file
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError
from tests.oracles import recipes
from tests.support.graphs import HEAD_DIM, KV_HEADS, LAYERS, decoder, factors, plain_logits, prefix
from tests.support.onnx_files import write_adapter_file


def arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.normal(size=(3, 0, 2)).astype(np.float32),
        "a": rng.normal(size=(3, 5)).astype(np.float16),
        "c": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "past_key_values.0.key": rng.normal(size=(1, 2, 3, 4)).astype(np.float32),
        "ids": np.arange(7),
    }


def test_arrays_of_every_type_come_back_bit_by_bit(tmp_path):
    path = tmp_path / "x.onnx_adapter"
    write_adapter_file(path, arrays())
    found = read_adapter_file(path)
    assert list(found) == sorted(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_arrays_are_made_one_at_a_time_and_compared_with_the_file(tmp_path):
    made, kept = [], {name: array for name, array in arrays().items() if name != "b"}

    def make(name):
        made.append(name)
        return kept[name]

    file = AdapterFile.of({name: (array.dtype, array.shape) for name, array in kept.items()}, make)
    assert not made
    path = tmp_path / "x"
    with open(path, "wb") as out:
        for number, piece in enumerate(file.pieces()):
            assert len(made) <= number  # none ahead of its turn
            out.write(piece)
    assert made == sorted(kept, reverse=True)
    file.prove(path)
    raw = bytearray(path.read_bytes())
    for tensor in open_onnx_adapter(path).tensors:
        damaged = bytearray(raw)
        damaged[tensor.offset + tensor.nbytes - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ProofError, match="differs from what was written") as caught:
            file.prove(path)
        assert caught.value.tensor == tensor.name
    write_adapter_file(path, {**kept, "another": kept["a"]})
    with pytest.raises(ProofError, match="other names"):
        file.prove(path)


def test_arrays_that_do_not_lie_in_one_piece_are_written(tmp_path):
    made = {f"{n}": np.random.default_rng(n).normal(size=(64, 32)).astype(np.float32).T for n in range(8)}
    write_adapter_file(tmp_path / "x", made)
    back = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "x")).get_parameters()
    for name, array in made.items():
        assert np.array_equal(back[name].numpy(), array)


def test_the_same_arrays_in_any_order_give_the_same_bytes(tmp_path):
    write_adapter_file(tmp_path / "1", arrays())
    write_adapter_file(tmp_path / "2", dict(reversed(arrays().items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_onnxruntime_applies_a_written_adapter(tmp_path):
    """LoRA factors and a soft prompt, each an active adapter of one call, two of them at once."""
    path = decoder(tmp_path, "plain", slots=True, optional_past=True)
    write_adapter_file(tmp_path / "lora", factors(3, 2))
    write_adapter_file(tmp_path / "prompt", prefix(1, 4))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    row, kept = [3, 17, 9, 4, 30], []

    def run(tokens, *files):
        options = onnxruntime.RunOptions()
        for file in files:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(tmp_path / file))
            options.add_active_adapter(adapter)
            kept.append(adapter)
        feeds = {"input_ids": np.array([row]), "attention_mask": np.ones((1, tokens + len(row)), np.int64)}
        return session.run(["logits"], feeds, options)[0][0]

    assert np.abs(run(0) - plain_logits(path, row)).max() < 1e-5
    assert np.abs(run(0, "lora") - plain_logits(path, row, **factors(3, 2))).max() < 1e-5
    assert np.abs(run(4, "prompt") - plain_logits(path, row, prefix(1, 4))).max() < 1e-5
    both = plain_logits(path, row, prefix(1, 4), **factors(3, 2))
    assert np.abs(run(4, "lora", "prompt") - both).max() < 1e-5
    assert (LAYERS, KV_HEADS, HEAD_DIM) == (2, 2, 16)


def test_empty_and_unsupported_arrays_are_refused(tmp_path):
    with pytest.raises(FitError, match="has no arrays"):
        write_adapter_file(tmp_path / "x", {})
    with pytest.raises(FitError, match="complex64"):
        write_adapter_file(tmp_path / "x", {"a": np.zeros(2, np.complex64)})


def test_files_that_are_not_adapters_are_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(NotFoundError):
        read_adapter_file(path)
    for raw in (b"", b"TORT", b"\0" * 100, b"\xff\xff\xff\x7fTORT" + b"\xff" * 50, b"\x08\0\0\0TORT" + b"\0" * 40):
        path.write_bytes(raw)
        with pytest.raises(MalformedError):
            read_adapter_file(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path, data):
    path = tmp_path / "whole"
    if not path.exists():
        write_adapter_file(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((2, 2), np.float32)})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 4))
    value = data.draw(st.sampled_from([0, 1, 4, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]) | st.integers(0, 2**32 - 1))
    struct.pack_into("<I", raw, at, value)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        found = read_adapter_file(damaged)
    except MalformedError:
        return
    assert sum(array.nbytes for array in found.values()) <= 2 * len(raw)


def test_factors_are_made_weight_by_weight(tmp_path, monkeypatch):
    """What an adapter puts into the slots of another's graph: never more than those of two weights are held."""
    base = recipes.build("llama", tmp_path / "base", num_hidden_layers=4)
    surgery.export_onnx(base, output=tmp_path / "graph")
    surgery.insert(base, new="lora", targets="all", output=tmp_path / "lora")
    held, most, calls = [], 0, 0

    def watched(*arguments):
        nonlocal held, most, calls
        made = factors_for(*arguments)
        held = [each for each in held if each() is not None] + [weakref.ref(array) for array in made]
        most, calls = max(most, len(held)), calls + 1
        return made

    monkeypatch.setattr(contents, "factors_for", watched)
    surgery.insert(tmp_path / "graph" / "model.onnx", tmp_path / "lora", base=base, output=tmp_path / "out")
    assert calls >= 2 * 4 * 7  # for its hash, and to be written
    assert most <= 4
