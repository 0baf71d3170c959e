# SPDX-License-Identifier: Apache-2.0
"""Layers as hqq saves them are read to the bit, put back to the byte, and refused by name where they are broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage.base import Storage, read_block, read_rows
from surgery_formats.storage.hqq import HQQ
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "hqq.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
ENCODED = {name: tensor for name, tensor in STORED.items() if not name.startswith(("decoded.", "half.", "given."))}
WEIGHTS: dict[str, Storage] = {weight.name: weight for weight in HQQ.claim(ENCODED, {})}
NEEDED = ("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing")


def encoded(name: str) -> dict[str, Array]:
    """The stored tensors of a golden weight by their names within the module."""
    stem = name.removesuffix("weight")
    return {source.name.removeprefix(stem): source.read() for source in WEIGHTS[name].sources}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def test_every_golden_weight_is_claimed_whole() -> None:
    assert set(WEIGHTS) == set(DECODED)
    assert {source.name for weight in WEIGHTS.values() for source in weight.sources} == set(ENCODED)
    assert WEIGHTS["bits3.axis0.weight"].kind == "HQQ3"


@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_those_of_hqq_in_float32_to_the_bit(name: str) -> None:
    weight, wanted = WEIGHTS[name], DECODED[name].read()
    assert weight.sizes == wanted.shape
    assert read_rows(weight).tobytes() == wanted.tobytes()
    rows = weight.shape[0]
    for start in range(rows):
        for stop in {start + 1, (start + rows + 1) // 2, rows}:
            assert np.array_equal(read_block(weight, start, stop), wanted[start:stop]), (start, stop)


@pytest.mark.parametrize("name", [name.removeprefix("half.") for name in STORED if name.startswith("half.")])
def test_what_hqq_computes_in_float16_is_rounded_after_each_step(name: str) -> None:
    weight = WEIGHTS[name]
    assert is_quantised(weight)
    grid = weight.grid(0, weight.shape[0])
    zero, scale = (grid._spread(stored, 0, weight.shape[1]) for stored in (grid.zero, grid.scale))  # type: ignore[attr-defined]
    steps = cast(cast(weight.codes(0, weight.shape[0]) - zero, DType.F16), DType.F32)
    assert cast(steps * scale, DType.F16).tobytes() == STORED[f"half.{name}"].read().tobytes()


# With one bit, HQQ's own search does worse than scales that were found for other values; how it searches is tested below.
CHECKS = [
    pytest.param(check, name, id=f"{check.__name__}-{name}")
    for check in QUANTISED_CHECKS
    for name in WEIGHTS
    if (check.__name__, name) != ("reads_back_a_fitted_grid", "bits1.axis0.weight")
]


@pytest.mark.parametrize(("check", "name"), CHECKS)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    parts = {key: tensor for key, tensor in encoded(name).items() if key in NEEDED}

    def encode(wanted: str, values: Array) -> dict[str, Array]:
        return {wanted.removesuffix("weight") + rest: tensor for rest, tensor in parts.items()}

    check(StorageCase(HQQ.claim, encode, DECODED[name].read()), tmp_path)


@pytest.mark.parametrize("name", [name.removeprefix("given.") for name in STORED if name.startswith("given.")])
def test_scales_and_zero_points_that_are_fitted_are_those_of_hqq(name: str) -> None:
    weight, values = WEIGHTS[name], cast(STORED[f"given.{name}"].read(), DType.F32)
    assert is_quantised(weight)
    grid = weight.fit(0, values)
    assert grid is not None
    stored = weight.grid(0, weight.shape[0])
    assert np.array_equal(grid.scale, stored.scale)  # type: ignore[attr-defined]
    # Sums are in another order, so that a zero point may be rounded to the neighbour.
    assert np.allclose(grid.zero.astype(np.float32), stored.zero.astype(np.float32), rtol=1e-3, atol=1e-3)  # type: ignore[attr-defined]
    assert (grid.nearest(values) == weight.codes(0, weight.shape[0])).mean() > 0.98


def test_a_weight_keeps_every_setting(tmp_path: Path) -> None:
    weight = WEIGHTS["bits4.axis1.weight"]
    values = read_block(weight, 0, weight.shape[0])
    written = weight.put(0, values, np.empty_like(values))
    assert [bytes(piece.data) for piece in written] == [source.read().tobytes() for source in weight.sources]
    assert len(written) == 19


FAULTS: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    **{f"{key} is gone": (lambda t, key=key: t.pop(f"w.{key}"), f"no 'w.{key}'") for key in NEEDED[1:]},
    "codes are short": (lambda t: t.update({"w.W_q": t["w.W_q"][1:]}), "bytes of codes"),
    "scales are short": (lambda t: t.update({"w.scale": t["w.scale"][1:]}), "32 groups"),
    "scales are integers": (lambda t: t.update({"w.scale": t["w.scale"].astype(np.int32)}), "I32"),
    "zero points are short": (lambda t: t.update({"w.zero": t["w.zero"][1:]}), "32 groups"),
    "zero point is NaN": (lambda t: t["w.zero"].__setitem__(5, np.nan), "NaN"),
    "scale is NaN": (lambda t: t["w.scale"].__setitem__(5, np.nan), "no positive number"),
    "scale is zero": (lambda t: t["w.scale"].__setitem__(5, 0), "no positive number"),
    "scale is negative": (lambda t: t["w.scale"].__setitem__(5, -1), "no positive number"),
    "axis 2": (lambda t: t.update({"w.axis": np.int32(2)}), "axis 2"),
    "group of 0": (lambda t: t.update({"w.group_size": np.int32(0)}), "groups of 0"),
    "group of 7": (lambda t: t.update({"w.group_size": np.int32(7)}), "groups of 7"),
    "other shape": (lambda t: t.update({"w.shape": np.array([24, 32])}), "groups|bytes of codes"),
    "three axes": (lambda t: t.update({"w.shape": np.array([2, 12, 64])}), "groups of"),
    "negative shape": (lambda t: t.update({"w.shape": np.array([-24, -64])}), "groups of"),
    "other bits": (lambda t: t.update({"w.nbits": np.int32(3)}), "no packing of 3 bits"),
    "other packing": (lambda t: t.update({"w.packing": np.frombuffer(b"5bit_u8", np.uint8)}), "no packing of 4 bits"),
    "long packing": (lambda t: t.update({"w.packing": np.zeros(1000, np.uint8)}), "not a setting"),
    "two bits": (lambda t: t.update({"w.nbits": np.array([4, 4], np.int32)}), "not one number"),
    "bits are infinite": (lambda t: t.update({"w.nbits": np.float32(np.inf)}), "not one number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {f"w.{key}": np.array(tensor) for key, tensor in encoded("bits4.axis1.weight").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        [read_rows(weight) for weight in HQQ.claim(opened(tensors, tmp_path), {})]
    assert refused.value.file
    assert refused.value.tensor


def test_scales_that_are_themselves_quantised_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {f"w.{key}": tensor for key, tensor in encoded("bits4.axis1.weight").items()}
    with pytest.raises(FitError, match="scales are themselves quantised"):
        list(HQQ.claim(opened({**tensors, "w.quant_scale": np.array(1, np.uint8)}, tmp_path), {}))


def test_a_code_beyond_the_range_is_refused(tmp_path: Path) -> None:
    tensors = {f"w.{key}": np.array(tensor) for key, tensor in encoded("bits6.weight").items()}
    tensors["w.W_q"][0, 3] = 64
    (weight,) = HQQ.claim(opened(tensors, tmp_path), {})
    with pytest.raises(MalformedError, match="the code 64, where 63 is the largest"):
        read_rows(weight)


@pytest.mark.parametrize("name", ["bits4.axis0.weight", "uneven3.weight", "held.weight", "bits1.58.weight"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"w.{rest}": tensor for rest, tensor in encoded(name).items()}, path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in HQQ.claim(tensors, {}):
            values = read_rows(weight).reshape(weight.shape)
            if np.isfinite(values).all():
                weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 800, read)
