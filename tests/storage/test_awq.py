# SPDX-License-Identifier: Apache-2.0
"""Weights as autoawq and auto-round encode them are read to the bit, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.aligned import release, turned
from surgery_formats.storage.awq import AWQ
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.grouped_columns import GroupedColumns
from surgery_formats.storage.grouped_rows import GroupedRows
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "awq.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
NAMES = [name.removesuffix(".weight") for name in DECODED]
SIZES = {"gemm.64": 64, "gemm.128": 128, "gemm.all": -1, "gemv.64": 64, "gemv.128": 128, "round.6": 64}


def config(name: str, **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"bits": 4, "group_size": SIZES.get(name, 32)}
    if name.startswith("round"):
        said |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": int(name[-1])}
    else:
        said |= {"quant_method": "awq", "version": name.split(".")[0], "zero_point": True}
    return {"quantization_config": {**said, **more}}


def encoded(name: str, to: str = "") -> dict[str, Array]:
    """The stored tensors of a golden weight, of another name if one is given."""
    stem = to.removesuffix(".weight") or name
    own = {key: tensor.read() for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    return {stem + key.removeprefix(name): tensor for key, tensor in own.items()}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def claimed(tensors: Mapping[str, Array], folder: Path, name: str, **more: Any) -> GroupedRows | GroupedColumns:
    (weight,) = AWQ.claim(opened(tensors, folder), config(name, **more))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_program_that_encoded_them(name: str, tmp_path: Path) -> None:
    weight, wanted = claimed(encoded(name), tmp_path, name), DECODED[f"{name}.weight"].read()
    assert weight.transposed is not name.startswith("gemv")
    assert [source.name.rpartition(".")[2] for source in weight.sources] == ["qweight", "qzeros", "scales"]
    values = read_rows(weight).T if weight.transposed else read_rows(weight)
    assert np.array_equal(cast(values, DType.F16), wanted)  # which is rounded once
    assert values.shape == wanted.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    values = read_rows(claimed(encoded(name), tmp_path, name))
    check(StorageCase(AWQ.claim, lambda to, _: encoded(name, to), values, config(name)), tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gemv")])
def test_columns_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    weight = claimed(encoded(name), tmp_path, name)
    whole, flipped = read_rows(weight), turned(weight)
    for start, stop in ((0, len(whole)), (0, 1), (3, 20), (len(whole) - 5, len(whole))):
        assert np.array_equal(read_block(flipped, start, stop), whole[start:stop])
    release()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_become_the_nearest_codes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(NAMES))
    weight = claimed(encoded(name), tmp_path_factory.mktemp("w"), name)
    start = data.draw(st.integers(0, (weight.shape[0] - 1) // weight.group)) * weight.group
    stop = min(start + data.draw(st.integers(1, 2)) * weight.group, weight.shape[0])
    seed, spread = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1e-6, 0.02, 1, 1e30]))
    values = np.random.default_rng(seed).normal(0, spread, (stop - start, weight.shape[1])).astype(np.float32)
    rounded = np.empty_like(values)
    weight.put(start, values, rounded)
    grid = weight.grid(start, stop)
    every = [grid.values(np.full(values.shape, code, np.uint8)) for code in range(1 << weight.bits)]
    best = np.min([abs(each.astype(np.float64) - values) for each in every], axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= best + 1e-6 * abs(values)).all()


@pytest.mark.parametrize("name", ["gemm", "gemm.all", "gemv.64"])
def test_a_fitted_grid_is_that_of_autoawq(name: str, tmp_path: Path) -> None:
    weight, given = claimed(encoded(name), tmp_path, name), STORED[f"given.{name}.weight"].read()
    fitted, stored = weight.fit(0, given), weight.grid(0, weight.shape[0])
    assert fitted is not None
    assert np.array_equal(fitted.scales, stored.scales)
    assert np.array_equal(fitted.zeros, stored.zeros)
    # autoawq divides by a scale that it has not rounded yet
    assert (fitted.nearest(given) != weight.codes(0, weight.shape[0])).mean() < 0.01


def test_what_a_kernel_reads_beyond_the_last_group_is_kept(tmp_path: Path) -> None:
    tensors = encoded("gemv.many")  # 33 groups in 64 places
    tensors["gemv.many.scales"][:, 40] = 7
    tensors["gemv.many.qzeros"][:, 7] = 7
    weight = claimed(tensors, tmp_path, "gemv.many")
    values = read_rows(weight) * np.float32(0.5)
    grid = weight.fit(0, values)
    assert grid is not None
    scales, zeros = (
        np.frombuffer(piece.data, tensor.dtype).reshape(tensor.shape)
        for tensor, piece in ((tensors["gemv.many.scales"], weight.pack(0, grid.nearest(values), grid)[2]),
                              (tensors["gemv.many.qzeros"], weight.pack(0, grid.nearest(values), grid)[1]))
    )  # fmt: skip
    assert (scales[:, 40] == 7).all()
    assert (zeros[:, 7] == 7).all()
    assert np.array_equal(scales[:, :33].astype(np.float32), grid.scales)


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "awq", "version": "gemv_fast"},
        {"quant_method": "awq", "version": "marlin"},
        {"quant_method": "awq", "backend": "llm-awq"},
        {"quant_method": "awq", "rotation": "hadamard"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {},
    ],
)
def test_other_formats_are_left_alone(said: dict[str, Any], tmp_path: Path) -> None:
    assert list(AWQ.claim(opened(encoded("gemm"), tmp_path), {"quantization_config": said})) == []


def test_modules_that_are_not_converted_are_left_alone(tmp_path: Path) -> None:
    tensors = {**encoded("gemm", "model.q_proj"), "model.lm_head.weight": np.zeros((8, 64), np.float16)}
    (weight,) = AWQ.claim(opened(tensors, tmp_path), config("gemm", modules_to_not_convert=["lm_head"]))
    assert weight.name == "model.q_proj.weight"


Tensors = dict[str, Array]
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "codes are gone": (lambda t: t.pop("w.qweight"), r"no 'w\.qweight'"),
    "zero points are gone": (lambda t: t.pop("w.qzeros"), r"no 'w\.qzeros'"),
    "scales are gone": (lambda t: t.pop("w.scales"), r"no 'w\.scales'"),
    "codes are floats": (lambda t: t.update({"w.qweight": t["w.qweight"].astype(np.float32)}), "F32 .* not I32"),
    "codes are int16": (lambda t: t.update({"w.qweight": t["w.qweight"].astype(np.int16)}), "I16 .* not I32"),
    "codes are narrow": (lambda t: t.update({"w.qweight": t["w.qweight"][:, 1:]}), "neither AWQ's gemm nor its gemv"),
    "all is narrow": (lambda t: t.update({k: t[k][:, 1:] for k in ("w.qweight", "w.qzeros")}), "64 zero points are not"),
    "scales are short": (lambda t: t.update({"w.scales": t["w.scales"][1:]}), "neither AWQ's gemm nor its gemv"),
    "scales are integers": (lambda t: t.update({"w.scales": t["w.scales"].astype(np.int16)}), "not F16 or BF16 or F32"),
    "scales are NaN": (lambda t: t["w.scales"].__setitem__((1, 2), np.nan), "NaN or infinite"),
    "groups are other": (lambda t: t.update({k: t[k][:1].repeat(5, 0) for k in ("w.scales", "w.qzeros")}), "in 5 groups"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {key: tensor.copy() for key, tensor in encoded("gemm", "w").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(claimed(tensors, tmp_path, "gemm"))
    assert refused.value.file
    assert refused.value.tensor


def test_groups_of_gemv_are_told_by_their_width(tmp_path: Path) -> None:
    tensors = encoded("gemv", "w")
    assert claimed(tensors, tmp_path, "gemv", group_size=None).block == (1, 32)
    narrow = {"w.qzeros": tensors["w.qzeros"][:, :3], "w.scales": tensors["w.scales"][:, :24]}
    with pytest.raises(MalformedError, match="no clear groups in 3 words"):
        claimed({**tensors, **narrow}, tmp_path, "gemv")


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("gemm.64", {"group_size": 32}, "has groups of 64 inputs, where its configuration says 32"),
        ("gemm.all", {"group_size": 32}, "has groups of 72 inputs, where its configuration says 32"),
        ("gemv.64", {"group_size": 32}, "has groups of 64 inputs, where its configuration says 32"),
        ("round.5", {"bits": 6}, "has codes of 5 bits, where its configuration says 6"),
    ],
)
def test_a_configuration_that_the_shapes_contradict_is_refused_naming_both(
    name: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """autoawq makes room by the configuration, and cannot load other shapes."""
    with pytest.raises(MalformedError, match=words) as refused:
        claimed(encoded(name), tmp_path, name, **said)
    assert refused.value.tensor
    absent = dict.fromkeys(said)
    assert claimed(encoded(name), tmp_path, name, **absent).block == claimed(encoded(name), tmp_path, name).block


@pytest.mark.parametrize("name", ["gemm", "gemv", "round.5"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(encoded(name, "w"), path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in AWQ.claim(tensors, config(name)):
            values = read_block(weight, 0, weight.shape[0])
            weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 600, read)
