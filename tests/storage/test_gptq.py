# SPDX-License-Identifier: Apache-2.0
"""Weights as gptqmodel, auto-gptq and auto-round encode them are read to the bit, put back to the byte, and refused by name."""

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
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.gptq import GPTQ
from surgery_formats.storage.grouped_rows import GroupedRows
from surgery_formats.storage.packing import pack
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "gptq.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
NAMES = [name.removesuffix(".weight") for name in DECODED]
METHODS = {
    "v1": {"quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
    "v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "old": {"quant_method": "gptq"},
    "round.v1": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    "round.v2": {"quant_method": "auto-round", "packing_format": "auto_round"},
}
BITS = {name: next(int(part) for part in name.split(".") if part.isdigit()) for name in NAMES}
SIZES = {"v2.4": 64, "v2.4.short": 64, "v2.4.128": 128, "v1.4.all": -1, "v2.8": -1, "v2.2": 16, "v2.3": 64, "old.8": 64}
ACTS = ("v1.4.act", "v1.4.static", "v2.2", "v2.3")
SYMMETRIC = ("v1.4", "v1.4.static", "v2.4.128", "v2.2", "v2.3", "v1.8", "old.2", "old.3")


def config(name: str, **more: Any) -> dict[str, Any]:
    method = next(METHODS[key] for key in sorted(METHODS, reverse=True) if name.startswith(key))
    said = {"bits": BITS[name], "group_size": SIZES.get(name, 32), "desc_act": name in ACTS, "sym": name in SYMMETRIC}
    return {"quantization_config": {**method, **said, **more}}


def encoded(name: str, to: str = "") -> dict[str, Array]:
    """The stored tensors of a golden weight, of another name if one is given; without a g_idx that says nothing."""
    parts = {key.removeprefix(name): tensor.read() for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    if ".g_idx" in parts and not config(name)["quantization_config"]["desc_act"]:
        del parts[".g_idx"]
    return {(to.removesuffix(".weight") or name) + ending: tensor for ending, tensor in parts.items()}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def claimed(tensors: Mapping[str, Array], folder: Path, name: str, **more: Any) -> GroupedRows:
    (weight,) = GPTQ.claim(opened(tensors, folder), config(name, **more))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_program_that_encoded_them(name: str, tmp_path: Path) -> None:
    own = {key: tensor for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    (weight,) = GPTQ.claim(own, config(name))
    wanted = DECODED[f"{name}.weight"].read()
    assert weight.kind == f"GPTQ{BITS[name]}"
    assert weight.sizes == wanted.shape[::-1]
    assert [source.name for source in weight.sources] == [
        f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{part}" in own
    ]
    values = cast(read_rows(weight), DType.of(wanted.dtype)).T
    assert np.array_equal(values, wanted)
    if wanted.dtype == np.float32:  # others are a layer's outputs, sums in which -0 becomes 0
        assert values.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    (weight,) = GPTQ.claim({key: STORED[key] for key in STORED if key.rpartition(".")[0] == name}, config(name))
    check(StorageCase(GPTQ.claim, lambda to, values: encoded(name, to), read_rows(weight), config(name)), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    weight = claimed(encoded(name), tmp_path, name)
    whole, flipped = read_rows(weight), turned(weight)
    for start, stop in ((0, len(whole)), (0, 1), (3, 8), (len(whole) - 5, len(whole))):
        assert np.array_equal(read_block(flipped, start, stop), whole[start:stop])
    release()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_values_become_the_nearest_codes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of all codes on the stored grid none is nearer, in any rows that can be put, and what is read back is that."""
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


@pytest.mark.parametrize("inputs", [45, 100, 8])
@pytest.mark.parametrize("scattered", [False, True])
def test_odd_sizes_are_read_in_both_directions(inputs: int, scattered: bool, tmp_path: Path) -> None:
    """Words that are not full, and a last group that is short."""
    rng = np.random.default_rng(0)
    groups = np.arange(inputs, dtype=np.int32) // 32
    groups = rng.permutation(groups) if scattered else groups
    codes = rng.integers(0, 16, (inputs, 12))
    scales, zeros = rng.random((groups.max() + 1, 12)).astype(np.float16), rng.integers(0, 16, (groups.max() + 1, 12))
    own = {"w.qweight": pack(codes, 4, 0).view(np.int32), "w.qzeros": pack(zeros, 4).view(np.int32)}
    weight = claimed({**own, "w.scales": scales, "w.g_idx": groups}, tmp_path, "v2.4.short", group_size=32)
    wanted = (codes - zeros[groups]) * scales.astype(np.float32)[groups]
    assert np.array_equal(read_block(weight, 0, inputs), wanted)
    assert np.array_equal(read_block(turned(weight), 5, 11), wanted[:, 5:11].T)
    rounded = np.empty_like(wanted, np.float32)
    written = weight.put(0, wanted.astype(np.float32), rounded)
    assert [bytes(piece.data) for piece in written] == [
        source.file.read(source.offset, source.nbytes) for source in weight.sources
    ]
    release()


@pytest.mark.parametrize("name", ["v1.4", "v2.8", "v2.4.short"])
def test_a_fitted_grid_is_that_of_the_program(name: str, tmp_path: Path) -> None:
    weight = claimed(encoded(name), tmp_path, name)
    given = cast(STORED[f"given.{name}.weight"].read(), DType.F32)
    fitted, stored = weight.fit(0, given), weight.grid(0, weight.shape[0])
    assert fitted is not None
    assert np.array_equal(fitted.scales, stored.scales)
    assert np.array_equal(fitted.zeros, stored.zeros)
    # the program divides by a scale that it has not rounded yet
    assert (fitted.nearest(given) != weight.codes(0, weight.shape[0])).mean() < 0.01


def test_scattered_groups_keep_their_scales_and_others_are_fitted(tmp_path: Path) -> None:
    act, plain = (claimed(encoded(name), tmp_path, name) for name in ("v1.4.act", "v1.4"))
    values = np.random.default_rng(0).normal(0, 0.02, (32, 24)).astype(np.float32)
    assert act.fit(0, values) is None
    assert plain.fit(0, values[:, :1].repeat(40, 1)) is not None
    assert plain.fit(0, values[:8, :1].repeat(40, 1)) is None  # a part of a group


def test_no_zero_point_is_chosen_that_the_first_version_cannot_store(tmp_path: Path) -> None:
    """Programs differ on what a stored 15 means."""
    for name, least in (("v1.4.zero", 1), ("v2.4.short", 0)):
        weight = claimed(encoded(name), tmp_path, name)
        values = np.random.default_rng(0).uniform(0.1, 1, weight.shape).astype(np.float32)
        grid = weight.fit(0, values)
        assert grid is not None
        assert grid.zeros is not None
        assert grid.zeros.min() == least
        assert abs(grid.values(grid.nearest(values)) - values).max() <= 0.6 * grid.scales.max()


def test_a_zero_point_of_none_is_read_as_its_writer_stored_it(tmp_path: Path) -> None:
    """gptqmodel subtracted one from a whole word; others from each zero point."""
    tensors = encoded("v1.4.zero")
    one, other = claimed(tensors, tmp_path, "v1.4.zero"), claimed(tensors, tmp_path, "v1.4.zero", meta={})
    zeros = [weight.grid(0, 32).zeros for weight in (one, other)]
    assert np.array_equal(zeros[0][0, 4:8], [0, 0, 0, zeros[0][0, 7]])
    assert (zeros[1] != zeros[0]).any()


def test_layers_of_several_widths_are_told_by_their_shapes(tmp_path: Path) -> None:
    tensors = {**encoded("v2.4", "a"), **encoded("v2.8", "b"), **encoded("v2.3", "c")}
    said = {
        **METHODS["v2"],
        "bits": 4,
        "group_size": 64,
        "dynamic": {"+:b": {"bits": 8, "group_size": -1}, "+:(c+)+$": {"bits": 3}},
    }
    weights = list(GPTQ.claim(opened(tensors, tmp_path), {"quantization_config": said}))
    assert [(weight.kind, weight.size) for weight in weights] == [("GPTQ4", 64), ("GPTQ8", 40), ("GPTQ3", 64)]


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "is_marlin_format": True},
        {"quant_method": "gptq", "checkpoint_format": "gptq_p"},
        {"quant_method": "gptq", "rotation": "quarot"},
        {"quant_method": "auto-round", "rotation_config": {"block_size": 32}},
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
        {"quant_method": "awq"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        {"quant_method": "vptq"},
        {},
    ],
)
def test_other_formats_are_left_alone(said: dict[str, Any], tmp_path: Path) -> None:
    assert list(GPTQ.claim(opened(encoded("v1.4"), tmp_path), {"quantization_config": said})) == []


def test_a_conv1d_and_an_embedding_lie_as_the_model_has_them(tmp_path: Path) -> None:
    tensors = {
        **encoded("v2.4", "h.0.attn.c_attn"),
        **encoded("v2.4", "lm_head"),
        **encoded("v2.4", "model.embed_tokens"),
    }
    weights = GPTQ.claim(opened(tensors, tmp_path), {"model_type": "gpt2", **config("v2.4")})
    sizes = {weight.name: (weight.sizes, weight.transposed) for weight in weights}
    assert sizes["h.0.attn.c_attn.weight"] == sizes["model.embed_tokens.weight"] == ((128, 16), False)
    assert sizes["lm_head.weight"] == ((16, 128), True)


@pytest.mark.parametrize(
    ("label", "shift"),
    [
        ("auto_round", 0),
        ("auto_round:exllamav2", 0),
        ("auto_round:gptqmodel", 0),
        ("auto_round:auto_gptq", 1),
        ("auto_round:auto_gptq:exllamav2", 1),
        (None, 1),
    ],
)
def test_zero_points_of_auto_round_are_as_its_format_says(label: str | None, shift: int, tmp_path: Path) -> None:
    """Asymmetric weights are stored as they are unless GPTQ's name is in it (auto-round 0.16.1, inference/backend.py)."""
    assert claimed(encoded("round.v2.4"), tmp_path, "round.v2.4", packing_format=label).packing.shift == shift


Tensors = dict[str, Array]
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "codes are gone": (lambda t: t.pop("w.qweight"), r"no 'w\.qweight'"),
    "zero points are gone": (lambda t: t.pop("w.qzeros"), r"no 'w\.qzeros'"),
    "scales are gone": (lambda t: t.pop("w.scales"), r"no 'w\.scales'"),
    "order is gone": (lambda t: t.pop("w.g_idx"), r"no 'w\.g_idx', which desc_act needs"),
    "codes are short": (lambda t: t.update({"w.qweight": t["w.qweight"][1:]}), "has no 4 bits for each of 96 inputs"),
    "codes are narrow": (lambda t: t.update({"w.qweight": t["w.qweight"][:, 1:]}), "does not fit scales"),
    "codes are floats": (lambda t: t.update({"w.qweight": t["w.qweight"].astype(np.float32)}), "F32 .* not I32"),
    "zero points are short": (lambda t: t.update({"w.qzeros": t["w.qzeros"][1:]}), "does not fit scales"),
    "zero points are narrow": (lambda t: t.update({"w.qzeros": t["w.qzeros"][:, 1:]}), "has codes of 2 bits, where .* says 4"),
    "scales are integers": (lambda t: t.update({"w.scales": t["w.scales"].astype(np.int16)}), "not F16 or BF16 or F32"),
    "scales are a vector": (lambda t: t.update({"w.scales": t["w.scales"][0]}), "of 2 axes"),
    "scales are NaN": (lambda t: t["w.scales"].__setitem__((1, 2), np.nan), "NaN or infinite"),
    "scales are infinite": (lambda t: t["w.scales"].__setitem__((1, 2), -np.inf), "NaN or infinite"),
    "groups are other": (lambda t: t.update({k: t[k][:1].repeat(5, 0) for k in ("w.scales", "w.qzeros")}), "in 5 groups"),
    "a group is negative": (lambda t: t["w.g_idx"].__setitem__(3, -1), "names a group"),
    "a group is none": (lambda t: t["w.g_idx"].__setitem__(3, 3), "names a group"),
    "order is a matrix": (lambda t: t.update({"w.g_idx": t["w.g_idx"][None]}), "of 1 axes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {key: tensor.copy() for key, tensor in encoded("v1.4.act", "w").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(claimed(tensors, tmp_path, "v1.4.act"))
    assert refused.value.file
    assert refused.value.tensor


def test_a_width_in_doubt_is_refused_naming_both(tmp_path: Path) -> None:
    tensors = {key: tensor.copy() for key, tensor in encoded("v1.8", "w").items()}
    narrow = {**tensors, **{f"w.{part}": tensors[f"w.{part}"][:, :4] for part in ("qweight", "scales")}}
    narrow["w.qzeros"] = tensors["w.qzeros"][:, :1]
    with pytest.raises(MalformedError, match="2 or 4 or 8 bits fit 4 zero points in 1 words"):
        claimed(narrow, tmp_path, "v1.8", bits=None)
    assert claimed(narrow, tmp_path, "v1.8").bits == 8


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("v2.4", {"group_size": 32}, "has groups of 64 inputs, where its configuration says 32"),
        ("v2.4", {"group_size": -1}, "has groups of 64 inputs, where its configuration says 128"),
        ("v1.4.all", {"group_size": 16}, "has groups of .* inputs, where its configuration says 16"),
        ("v2.4", {"group_size": 32, "dynamic": {"+:a": {"group_size": 128}}}, "of 64 inputs, .* says 32 or 128"),
        ("v2.8", {"bits": 4}, "has codes of 8 bits, where its configuration says 4"),
    ],
)
def test_a_configuration_that_the_shapes_contradict_is_refused_naming_both(
    name: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """gptqmodel makes room by the configuration, and cannot load other shapes."""
    with pytest.raises(MalformedError, match=words) as refused:
        claimed(encoded(name), tmp_path, name, **said)
    assert refused.value.tensor
    absent = dict.fromkeys(said)
    assert claimed(encoded(name), tmp_path, name, **absent).block == claimed(encoded(name), tmp_path, name).block


@pytest.mark.parametrize("name", ["v1.4.act", "v2.3", "v1.4.all", "round.v2.5"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(encoded(name, "w"), path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in GPTQ.claim(tensors, config(name)):
            values = read_block(weight, 0, weight.shape[0])
            weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 600, read)
