# SPDX-License-Identifier: Apache-2.0
"""Weights as bitsandbytes encodes them are read to the bit, put back to the byte, and refused by name where they are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import surgery
from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import Storage, read_block, read_rows
from surgery_formats.storage.bitsandbytes import BITSANDBYTES
from surgery_formats.storage.bitsandbytes.four_bit import FourBit, levels_of
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
ENCODED = {name: tensor for name, tensor in STORED.items() if not name.startswith(("decoded.", "given."))}
WEIGHTS: dict[str, Storage] = {weight.name: weight for weight in BITSANDBYTES.claim(ENCODED, {})}
STATE = ".quant_state.bitsandbytes__"


def read_given(name: str) -> Array:
    """The values that bitsandbytes encoded, or others with the same codes."""
    return cast(STORED.get(f"given.{name}", DECODED[name]).read(), DType.F32)


def encoded(name: str) -> dict[str, Array]:
    """The stored tensors of a golden weight by the rest of their names behind the module's."""
    stem = name.removesuffix("weight")
    return {source.name.removeprefix(stem): source.read() for source in WEIGHTS[name].sources}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def claimed(tensors: Mapping[str, Array], folder: Path) -> Storage:
    (weight,) = BITSANDBYTES.claim(opened(tensors, folder), {})
    return weight


def test_every_golden_weight_is_claimed() -> None:
    assert set(WEIGHTS) == set(DECODED)
    assert {source.name for weight in WEIGHTS.values() for source in weight.sources} == set(ENCODED)
    assert WEIGHTS["nf4.nested.weight"].kind == "NF4"
    assert {name for name, weight in WEIGHTS.items() if getattr(weight, "nested", False)} == {
        name for name in WEIGHTS if f"{name}.nested_absmax" in ENCODED
    }
    assert "blocks of 64, nested scales" in str(surgery.inspect(GOLDEN).summary())
    assert WEIGHTS["fp4.weight"].kind == "FP4"
    assert WEIGHTS["int8.weight"].kind == "INT8"


@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_those_of_bitsandbytes_to_the_bit(name: str) -> None:
    weight, wanted = WEIGHTS[name], DECODED[name].read()
    assert weight.sizes == wanted.shape
    assert read_rows(weight).tobytes() == wanted.tobytes()
    rows = weight.shape[0]
    matrix = wanted.reshape(weight.shape)
    for start in range(0, rows, 3):
        for stop in {start + 1, (start + rows + 1) // 2, rows}:
            assert np.array_equal(read_block(weight, start, stop), matrix[start:stop]), (start, stop)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if not name.startswith("experts")])
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    parts = {rest: tensor for rest, tensor in encoded(name).items() if rest != "weight_format"}  # which may be missing

    def encode(wanted: str, values: Array) -> dict[str, Array]:
        return {wanted.removesuffix("weight") + rest: tensor for rest, tensor in parts.items()}

    check(StorageCase(BITSANDBYTES.claim, encode, read_given(name), tolerance=0.2), tmp_path)


def test_a_stack_of_experts_is_read_expert_by_expert() -> None:
    weight = WEIGHTS["experts.gate_up_proj"]
    assert (weight.sizes, weight.shape) == ((3, 8, 32), (24, 32))
    assert np.array_equal(read_rows(weight, 1, 2), DECODED[weight.name].read()[1:2])


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "nested" not in name and "experts" not in name])
def test_scales_and_codes_that_are_fitted_are_those_of_bitsandbytes(name: str, tmp_path: Path) -> None:
    weight = WEIGHTS[name]
    assert is_quantised(weight)
    values = read_given(name).reshape(weight.shape)
    grid = weight.fit(0, values)
    assert grid is not None
    for piece, source in zip(weight.pack(0, grid.nearest(values), grid), weight.sources, strict=True):
        assert bytes(piece.data) == source.read().tobytes(), source.name


@pytest.mark.parametrize("name", [name for name in WEIGHTS if ".nested" in name])
def test_nested_scales_are_fitted_on_the_second_level_that_is_stored(name: str) -> None:
    weight = WEIGHTS[name]
    assert isinstance(weight, FourBit)
    values = read_given(name).reshape(weight.shape)
    grid = weight.fit(0, values)
    assert grid.scales.stored.tobytes() == weight.absmax.tensor.read().tobytes()


def test_scales_that_bitsandbytes_saved_after_a_pass_in_bfloat16(tmp_path: Path) -> None:
    """Its CPU layers convert nested scales to the state's type and back: every step is then rounded to that."""
    stored = encoded("nf4.nested.weight")
    state = json.loads(stored[f"weight{STATE}nf4"].tobytes())
    raw = json.dumps({**state, "nested_dtype": "bfloat16"}).encode()
    weight = claimed({**stored, f"weight{STATE}nf4": np.frombuffer(raw, np.uint8)}, tmp_path)
    assert isinstance(weight, FourBit)
    table, second = stored["weight.nested_quant_map"], stored["weight.nested_absmax"]
    scaled = cast(cast(table[stored["weight.absmax"]] * second[0], DType.BF16), DType.F32)
    wanted = cast(cast(scaled + np.float32(state["nested_offset"]), DType.BF16), DType.F32)
    assert np.array_equal(weight.absmax.read(0, len(wanted)).values, wanted)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64]), st.integers(1, 9), st.integers(1, 90))
def test_what_is_read_is_the_nearest_number_to_what_was_put(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, size: int, rows: int, columns: int
) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    count = rows * columns
    scales = generator.random(-(-count // size), np.float32) * generator.choice([0, 1e-30, 1e-3, 1, 1e30])
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": [rows, columns]}
    stored = {
        "x.weight": generator.integers(0, 256, (-(-count // 2), 1), np.uint8),
        "x.weight.absmax": scales.astype(np.float32),
        "x.weight.quant_map": levels_of(kind).values,
        f"x.weight{STATE}{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    weight = claimed(stored, tmp_path_factory.mktemp("w"))
    assert is_quantised(weight)
    spread = np.repeat(scales, size)[:count].reshape(rows, columns)
    values = (spread * generator.normal(size=(rows, columns)) * 0.5).astype(np.float32)
    rounded = np.empty_like(values)
    weight.put(0, values, rounded)
    every = levels_of(kind).values.astype(np.float64) * spread[..., None]
    best = abs(every - values[..., None]).min(axis=-1)
    assert (abs(rounded - values.astype(np.float64)) <= best + 1e-6 * abs(values)).all()


FAULTS: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "codes are gone": (lambda t: t.pop("w.weight"), "no 'w.weight'"),
    "state is gone": (lambda t: t.pop(f"w.weight{STATE}nf4"), "no .*bitsandbytes__nf4"),
    "scales are gone": (lambda t: t.pop("w.weight.absmax"), r"no 'w.weight.absmax'"),
    "second level is gone": (lambda t: t.pop("w.weight.nested_absmax"), r"no 'w.weight.nested_absmax'"),
    "second table is gone": (lambda t: t.pop("w.weight.nested_quant_map"), r"no 'w.weight.nested_quant_map'"),
    "table is gone": (lambda t: t.pop("w.weight.quant_map"), r"no 'w.weight.quant_map'"),
    "codes are short": (lambda t: t.update({"w.weight": t["w.weight"][:-1]}), "511 bytes of codes"),
    "codes lie in a row": (lambda t: t.update({"w.weight": t["w.weight"].T}), "not a column of packed codes"),
    "codes are int64": (lambda t: t.update({"w.weight": t["w.weight"].astype(np.int64)}), "not a column"),
    "scales are short": (lambda t: t.update({"w.weight.absmax": t["w.weight.absmax"][1:]}), r"U8 \[15\]"),
    "scales are floats": (lambda t: t.update({"w.weight.absmax": np.ones(16, np.float32)}), r"F32 \[16\]"),
    "table is not NF4's": (lambda t: t["w.weight.quant_map"].__setitem__(3, 0.5), "not the table of NF4"),
    "table is NaN": (lambda t: t["w.weight.quant_map"].__setitem__(3, np.nan), "not the table of NF4"),
    "second table is NaN": (lambda t: t["w.weight.nested_quant_map"].__setitem__(3, np.nan), "NaN"),
    "second level is negative": (lambda t: t["w.weight.nested_absmax"].__setitem__(0, -1), "negative"),
    "second level is infinite": (lambda t: t["w.weight.nested_absmax"].__setitem__(0, np.inf), "infinite"),
}
STATES: dict[str, tuple[dict[str, object], str]] = {
    "other type": ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
    "no type": ({"quant_type": None}, "quant_type"),
    "odd block": ({"blocksize": 48}, "blocksize of '48'"),
    "block is true": ({"blocksize": True}, "blocksize"),
    "no shape": ({"shape": None}, "shape is 'None'"),
    "negative shape": ({"shape": [-16, -64]}, "shape"),
    "text in the shape": ({"shape": ["16", 64]}, "shape"),
    "huge shape": ({"shape": [1 << 39, 1 << 39]}, "bytes of codes"),
    "nested shape": ({"shape": [[16, 64]]}, "shape"),
    "other shape": ({"shape": [17, 64]}, "512 bytes of codes"),
    "dtype": ({"dtype": ["float32"]}, "dtype"),
    "dtype of integers": ({"dtype": "int8"}, "dtype of 'int8'"),
    "second block": ({"nested_blocksize": 0}, "nested_blocksize"),
    "second block is text": ({"nested_blocksize": "256"}, "nested_blocksize"),
    "second dtype": ({"nested_dtype": "float8"}, "nested_dtype"),
    "offset": ({"nested_offset": None}, "nested_offset"),
    "huge offset": ({"nested_offset": 1e300}, "nested_offset"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {f"w.{rest}": tensor.copy() for rest, tensor in encoded("nf4.nested.weight").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(claimed(tensors, tmp_path))
    assert refused.value.file
    assert refused.value.tensor


@pytest.mark.parametrize("fault", STATES)
def test_a_state_that_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = STATES[fault]
    tensors = {f"w.{rest}": tensor for rest, tensor in encoded("nf4.nested.weight").items()}
    state = json.loads(tensors[f"w.weight{STATE}nf4"].tobytes())
    tensors[f"w.weight{STATE}nf4"] = np.frombuffer(json.dumps({**state, **change}).encode(), np.uint8)
    with pytest.raises(MalformedError, match=words) as refused:
        claimed(tensors, tmp_path)
    assert refused.value.tensor


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_cannot_be_is_refused(value: float, tmp_path: Path) -> None:
    for name, scales in (("nf4.weight", "w.weight.absmax"), ("int8.weight", "w.SCB")):
        tensors = {f"w.{rest}": tensor.copy() for rest, tensor in encoded(name).items()}
        tensors[scales][2] = value
        weight = claimed(tensors, tmp_path)
        with pytest.raises(MalformedError, match="NaN, infinite or negative") as refused:
            read_rows(weight)
        assert refused.value.tensor == scales


def test_scales_that_bitsandbytes_saved_turned_round_are_refused(tmp_path: Path) -> None:
    import ml_dtypes

    tensors = {f"w.{rest}": tensor for rest, tensor in encoded("nf4.weight").items()}
    turned = tensors["w.weight.absmax"].reshape(3, 2).T.astype(ml_dtypes.bfloat16)
    with pytest.raises(FitError, match="turned round") as refused:
        claimed({**tensors, "w.weight.absmax": turned}, tmp_path)
    assert refused.value.tensor == "w.weight.absmax"


def test_int8_of_old_layouts_is_named_and_not_read(tmp_path: Path) -> None:
    tensors = {f"w.{rest}": tensor for rest, tensor in encoded("int8.weight").items()}
    opened({**tensors, "w.weight_format": np.array(2, np.uint8)}, tmp_path)
    (warning,) = surgery.inspect(tmp_path / "weights.safetensors").warnings
    assert "codes lie in tiles, col_turing: a bitsandbytes before 0.42 can save them in rows" in warning
    with pytest.raises(FitError, match="col_turing"):
        open_checkpoint(tmp_path / "weights.safetensors").main.check_read()
    with pytest.raises(MalformedError, match=r"is U8 \[1\] where bitsandbytes has U8 \[\]"):
        claimed({**tensors, "w.weight_format": np.array([0], np.uint8)}, tmp_path)
    old = {name: tensor for name, tensor in tensors.items() if name != "w.weight_format"}
    assert read_rows(claimed(old, tmp_path)).tobytes() == DECODED["int8.weight"].read().tobytes()
    with pytest.raises(MalformedError, match="not a matrix of int8"):
        claimed({**tensors, "w.weight": tensors["w.weight"].astype(np.float32)}, tmp_path)
    with pytest.raises(MalformedError, match=r"no 'w.SCB'"):
        list(
            BITSANDBYTES.claim(
                opened({"w.weight": tensors["w.weight"]}, tmp_path),
                {"quantization_config": {"quant_method": "bitsandbytes"}},
            )
        )


@pytest.mark.parametrize(
    "name", ["nf4.nested.odd.weight", "nf4.nested.held.f32.weight", "fp4.weight", "int8.odd.weight"]
)
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"w.{rest}": tensor for rest, tensor in encoded(name).items()}, path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in BITSANDBYTES.claim(tensors, {}):
            values = read_rows(weight).reshape(weight.shape)
            if np.isfinite(values).all():
                weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 800, read)
