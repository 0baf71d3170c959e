# SPDX-License-Identifier: Apache-2.0
"""The types of GGML, against llama.cpp's reference quantisers (llama-cpp-python 0.3.36) and gguf.quants (gguf 0.19.0)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, MissingPackageError
from surgery_formats.storage.base import Storage, is_housed, read_block
from surgery_formats.storage.gguf import GGUF_TENSORS
from surgery_formats.storage.gguf.affine import AffineGrid
from surgery_formats.storage.gguf.codebooks import CODEBOOKS
from surgery_formats.storage.gguf.k_quants import K_QUANTS
from surgery_formats.storage.gguf.legacy import LEGACY
from surgery_formats.storage.gguf.library import BY_LIBRARY
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.ggml import BY_NAME
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase

GOLDEN = load_file(Path(__file__).parent / "golden" / "gguf.safetensors")
VALUES = GOLDEN["values"]
CODECS = {codec.type.name: codec for codec in (*LEGACY, *K_QUANTS, *CODEBOOKS)}
PLAIN = {"general.architecture": "qwen2"}
HEADS = {"general.architecture": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
# How far the greatest value may be from what was encoded, relative to it: the step of the coarsest group.
COARSE = {
    "Q2_K": 0.5,
    "Q3_K": 0.3,
    "TQ1_0": 0.6,
    "TQ2_0": 0.6,
    "IQ4_NL": 0.2,
    "IQ4_XS": 0.2,
    "MXFP4": 0.3,
    "NVFP4": 0.3,
}
named = pytest.mark.parametrize("name", CODECS)


def case(name: str) -> StorageCase:
    """The storage of one type; the suite's files are safetensors, which cannot say what their bytes are."""

    def claim(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterable[Storage]:
        for tensor in tensors.values():
            if tensor.dtype is DType.U8:
                object.__setattr__(tensor, "packed_as", name)
        return GGUF_TENSORS.claim(tensors, config)

    def encode(weight: str, values: Array) -> Mapping[str, Array]:
        assert values is VALUES
        return {weight: GOLDEN[f"{name}.blocks"]}

    return StorageCase(claim, encode, VALUES, PLAIN, COARSE.get(name, 0.1))


@named
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_every_type_conforms(check: Any, name: str, tmp_path: Path) -> None:
    check(case(name), tmp_path)


def stored(path: Path, name: str, blocks: Array, tensor: str = "weight") -> StoredTensor:
    """A stored tensor of these bytes."""
    from surgery_formats.files.raw import open_file

    path.write_bytes(blocks.tobytes())
    return StoredTensor(tensor, DType.U8, blocks.shape, open_file(path), 0, blocks.nbytes, packed_as=name)


def claimed(tensor: StoredTensor, config: Mapping[str, Any] = PLAIN) -> Any:
    (weight,) = GGUF_TENSORS.claim({tensor.name: tensor}, config)
    return weight


@named
def test_values_are_those_of_the_library_to_the_bit(name: str, tmp_path: Path) -> None:
    weight = claimed(stored(tmp_path / "w", name, GOLDEN[f"{name}.blocks"]))
    assert weight.sizes == (4, 256)
    assert read_block(weight, 0, 4).tobytes() == GOLDEN[f"{name}.decoded"].tobytes()


@pytest.mark.parametrize("name", [codec.type.name for codec in (*LEGACY, *K_QUANTS)])
def test_scales_are_those_of_the_reference_quantiser_to_the_bit(name: str) -> None:
    codec = CODECS[name]
    shape = (4, -1, codec.type.nbytes)
    theirs = AffineGrid.of(codec, GOLDEN[f"{name}.blocks"].reshape(shape))
    ours = AffineGrid.of(codec, codec.fit(VALUES.reshape(4, -1, codec.type.block)))
    assert np.array_equal(ours.scale, theirs.scale)
    assert (ours.offset is None) == (theirs.offset is None)
    assert ours.offset is None or np.array_equal(ours.offset, theirs.offset)
    # Theirs rounds by the reciprocal of the scale before it was rounded to a half (the K-quants after).
    errors = [np.square(grid.values(codes) - VALUES).sum() for grid, codes in (
        (ours, ours.nearest(VALUES)),
        (theirs, codec.unpack(GOLDEN[f"{name}.blocks"].reshape(shape)).reshape(4, 256)),
    )]  # fmt: skip
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("name", [codec.type.name for codec in K_QUANTS])
def test_k_quants_are_quantised_as_llama_cpp_does(name: str) -> None:
    """Byte for byte, in blocks all groups of which have a scale: elsewhere codes mean nothing."""
    codec = CODECS[name]
    theirs = GOLDEN[f"{name}.blocks"].reshape(4, -1, codec.type.nbytes)
    blocks = codec.fit(VALUES.reshape(4, -1, codec.type.block))
    codec.pack(AffineGrid.of(codec, blocks).nearest(VALUES).reshape(4, -1, codec.type.block), blocks)
    meaningful = (codec.scales(theirs)[0] != 0).all(axis=-1)
    assert meaningful.sum() >= 3
    assert np.array_equal(blocks[meaningful], theirs[meaningful])


@named
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_put_is_the_nearest_code(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    grid = AffineGrid.of(codec, GOLDEN[f"{name}.blocks"].reshape(4, -1, codec.type.nbytes))
    wanted = data.draw(arrays(np.float32, (4, 32), elements=st.floats(-4, 4, width=32)))
    chosen = abs(grid.values(grid.nearest(wanted)).astype(np.float64) - wanted)
    for code in range(codec.low, codec.high + 1):
        other = abs(grid.values(np.full((4, 32), code, np.int8)).astype(np.float64) - wanted)
        assert (chosen <= other + 1e-6 * abs(wanted)).all()


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("MXFP4", "NVFP4")])  # all bytes are finite
def test_scales_that_are_no_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    blocks = GOLDEN[f"{name}.blocks"].copy().reshape(4, -1, codec.type.nbytes)
    scale = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
    blocks[2, 0, scale : scale + 2] = (0, 0x7C)  # Inf as a half
    if name == "Q8_K":
        blocks[2, 0, :4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    weight = claimed(stored(tmp_path / "w", name, blocks.reshape(4, -1)))
    read_block(weight, 0, 2)
    with pytest.raises(FitError, match=f"NaN or infinite in {name}") as caught:
        read_block(weight, 0, 4)
    assert caught.value.tensor == "weight"


def test_values_beyond_a_half_are_refused(tmp_path: Path) -> None:
    weight = claimed(stored(tmp_path / "w", "Q4_0", GOLDEN["Q4_0.blocks"]))
    with pytest.raises(FitError, match="too large for the scales of Q4_0"):
        weight.fit(0, VALUES * np.float32(1e8))


def test_queries_of_llama_are_read_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Rows of a head are interleaved: whole heads are put, any rows are read."""
    blocks = GOLDEN["Q8_0.blocks"]
    weight = claimed(stored(tmp_path / "w", "Q8_0", blocks, "blk.3.attn_k.weight"), HEADS)
    assert (weight.name, weight.group) == ("model.layers.3.self_attn.k_proj.weight", 4)
    order = [0, 2, 1, 3]  # halves of two rows each
    expected = GOLDEN["Q8_0.decoded"][order]
    for start in range(4):
        for stop in range(start, 5):
            assert np.array_equal(read_block(weight, start, stop), expected[start:stop])
    assert np.array_equal(weight.codes(1, 3), weight.codes(0, 4)[1:3])
    rounded = np.empty((4, 256), np.float32)
    (part,) = weight.put(0, expected.copy(), rounded)
    assert bytes(part.data) == blocks.tobytes()
    with pytest.raises(ValueError, match="whole groups of 4"):
        weight.put(1, expected[1:].copy(), rounded[1:])


@pytest.mark.parametrize("heads", [3, 0, None, True, [2, 2]])
def test_rows_that_are_no_heads_are_refused(heads: object, tmp_path: Path) -> None:
    tensor = stored(tmp_path / "w", "Q8_0", GOLDEN["Q8_0.blocks"], "blk.0.attn_q.weight")
    with pytest.raises(MalformedError, match="heads of an even number of rows"):
        claimed(tensor, {**HEADS, "num_attention_heads": heads})


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "w", "Q8_0", GOLDEN["Q8_0.blocks"])
    with pytest.raises(FitError, match="architecture 'mamba\\\\x1b' is not read; known are command-r, gemma, "):
        claimed(tensor, {"general.architecture": "mamba\x1b"})


def test_types_for_products_only_are_refused_by_name(tmp_path: Path) -> None:
    blocks = np.zeros((2, 36), np.uint8)
    with pytest.raises(FitError, match="values of type Q8_1 are not read"):
        claimed(stored(tmp_path / "w", "Q8_1", blocks))


@pytest.mark.parametrize("name", sorted(BY_LIBRARY))
def test_other_types_are_read_by_the_package_gguf(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's part is played by what it decoded: it is an extra, and make_gguf.py has asked the real one."""
    blocks, decoded = GOLDEN[f"{name}.blocks"], GOLDEN[f"{name}.decoded"]
    if importlib.util.find_spec("gguf") is None:
        module, quants = ModuleType("gguf"), ModuleType("gguf.quants")
        rows = {row.tobytes(): values for row, values in zip(blocks, decoded, strict=True)}
        quants.dequantize = lambda raw, type_: np.stack([rows[row.tobytes()] for row in raw])  # type: ignore[attr-defined]
        module.quants, module.GGMLQuantizationType = quants, SimpleNamespace(**{name: name})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gguf", module)
        monkeypatch.setitem(sys.modules, "gguf.quants", quants)
    weight = claimed(stored(tmp_path / "w", name, blocks))
    assert np.array_equal(read_block(weight, 0, 2), decoded)
    assert np.array_equal(read_block(weight, 1, 2), decoded[1:])
    assert not is_quantised(weight)
    assert is_housed(weight)
    with pytest.raises(FitError, match=f"{name} is read, but not written"):
        weight.check_written()


def test_without_the_package_its_name_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    weight = claimed(stored(tmp_path / "w", "IQ3_S", GOLDEN["IQ3_S.blocks"]))
    with pytest.raises(MissingPackageError, match=r"IQ3_S need the package gguf.*pip install 'model-surgery\[gguf\]'"):
        read_block(weight, 0, 1)


def test_norms_of_gemma_have_one_less(tmp_path: Path) -> None:
    """The file has ``1 + g``; a value that did not change keeps its bits, whatever rounding would make of them."""
    held = np.array([1.0, 1.25, 0.1, 1e-30, 3e7, -2.0], np.float32)
    (tmp_path / "w").write_bytes(held.tobytes())
    from surgery_formats.files.raw import open_file

    tensor = StoredTensor("blk.0.attn_norm.weight", DType.F32, (6,), open_file(tmp_path / "w"), 0, 24, packed_as="F32")
    weight = claimed(tensor, {"general.architecture": "gemma2"})
    values = read_block(weight, 0, 6)
    assert np.array_equal(values[:, 0], held - 1)
    rounded = np.empty_like(values)
    (part,) = weight.put(0, values.copy(), rounded)
    assert bytes(part.data) == held.tobytes()
    assert np.array_equal(rounded, values)
    (part,) = weight.put(0, values + np.float32(0.5), rounded)
    assert np.array_equal(np.frombuffer(part.data, np.float32), held - 1 + np.float32(0.5) + 1)
    assert weight.in_elements(DType.F16) is weight


def test_every_type_has_a_number_and_a_size() -> None:
    for name, type_ in BY_NAME.items():
        assert type_.sizes(type_.shape((3, type_.block * 2))) == (3, type_.block * 2), name
    assert {*CODECS, *BY_LIBRARY, "Q8_1"} == {name for name, type_ in BY_NAME.items() if type_.dtype is None}
    assert all(replace(codec).type.nbytes for codec in CODECS.values())
