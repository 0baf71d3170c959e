# SPDX-License-Identifier: Apache-2.0
"""What rounding lost of a block is found again, also by a processor that computes another last bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.engine.undo.coding import Packer, Unpacker, pack_bytes, unpack_bytes
from surgery.engine.undo.residue import LINE, MARGIN, decode, encode, nearest_bits
from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError

TYPES = (DType.F32, DType.BF16, DType.F16)


def random_bits(rng: np.random.Generator, dtype: DType, count: int) -> np.ndarray:
    """Finite values of every size, zeros of both signs and subnormal ones among them."""
    line = LINE(dtype)
    bits = rng.integers(0, 1 << 64, count, np.uint64).astype(line.unsigned)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(bits.view(dtype.numpy).astype(np.float64))
    bits = np.where(finite, bits, line.unsigned.type(0))
    bits[: count // 8] &= line.unsigned.type(line.sign | (line.sign >> 8) - 1 & 0xFFFF)
    return bits


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    before=st.sampled_from(TYPES),
    after=st.sampled_from(TYPES),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
    wild=st.booleans(),
)
def test_any_values_come_back(seed: int, before: DType, after: DType, size: float, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    if wild:
        bits = random_bits(rng, before, 999)
    else:
        bits = nearest_bits(rng.normal(size=999), before)
    values = bits.view(before.numpy).astype(np.float64)
    delta = rng.normal(size=999) * size
    with np.errstate(over="ignore"):
        merged = cast((values + delta).astype(np.float32), after)
    merged = np.where(np.isfinite(merged.astype(np.float64)), merged, 0).astype(after.numpy)
    estimate = merged.astype(np.float64) - delta
    margin = MARGIN * max(float(abs(estimate).max()), float(abs(merged.astype(np.float64)).max()))
    now = merged.view(LINE(after).unsigned)
    data = encode(bits, estimate, now, (before, after), margin)
    for shift in (0.0, 0.5, -0.5):  # of the margin: many times what another order of additions changes
        elsewhere = estimate + shift * margin * rng.random(999)
        assert (decode(data, elsewhere, now, (before, after)) == bits).all()


def test_a_rounded_addition_costs_little() -> None:
    rng = np.random.default_rng(0)
    bits = nearest_bits(rng.normal(size=1 << 18) * 0.02, DType.BF16)
    delta = rng.normal(size=1 << 18) * 0.0005
    values = bits.view(DType.BF16.numpy).astype(np.float64)
    merged = cast((values + delta).astype(np.float32), DType.BF16)
    now = merged.view(np.uint16)
    with_update = encode(bits, merged.astype(np.float64) - delta, now, (DType.BF16, DType.BF16), 1e-12)
    without = encode(bits, merged.astype(np.float64), now, (DType.BF16, DType.BF16), 0.0)
    assert len(with_update) < 0.03 * bits.nbytes
    assert len(with_update) < 0.2 * len(without)


@pytest.mark.parametrize("dtype", [*TYPES, DType.F64])
def test_the_line_is_in_order_and_back(dtype: DType) -> None:
    line, rng = LINE(dtype), np.random.default_rng(1)
    bits = random_bits(rng, dtype, 5000)
    order = line.order(bits)
    assert (line.bits(order) == bits).all()
    values = bits.view(dtype.numpy).astype(np.float64)
    by = np.argsort(order)
    assert (np.diff(values[by]) >= 0).all()
    assert line.order(line.unsigned.type([line.sign, 0])).tolist() == [-1, 0]  # minus zero is next to zero
    ones = np.array([1.0, 1.5, 2.0, 0.25], np.float64)
    shown = line.unit(nearest_bits(ones, dtype))
    assert (shown == np.array([0, 0, 1, -2]) - line.mantissa).all()


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=60), st.binary(max_size=300))
def test_numbers_and_bytes_come_back(numbers: list[int], data: bytes) -> None:
    packer = Packer()
    packer.add(np.array(numbers, np.uint64))
    packer.add_bytes(data)
    unpacker = Unpacker(packer.data())
    assert unpacker.take(60).tolist() == numbers
    assert unpacker.take_bytes(len(data)) == data
    unpacker.end()
    assert unpack_bytes(pack_bytes(data, repeats=True), len(data)) == data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 50))
def test_foreign_bytes_are_refused_or_read(data: bytes, most: int) -> None:
    with contextlib.suppress(MalformedError):
        unpacker = Unpacker(data)
        assert unpacker.take(most).size <= most
        assert len(unpacker.take_bytes(most)) == most
    with contextlib.suppress(MalformedError):
        bits = decode(data, np.zeros(most), np.zeros(most, np.uint16), (DType.BF16, DType.BF16))
        assert (bits.shape, bits.dtype) == ((most,), np.uint16)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 30), st.data())
def test_changed_bytes_are_refused_or_read(seed: int, drawn: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    bits, now = (nearest_bits(rng.normal(size=50), DType.BF16) for _ in range(2))
    estimate, types = bits.view(DType.BF16.numpy).astype(np.float64), (DType.BF16, DType.BF16)
    data = bytearray(encode(bits, estimate + rng.normal(size=50) / 100, now, types, 1e-3))
    data[drawn.draw(st.integers(0, len(data) - 1))] ^= drawn.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedError):
        read = decode(data, estimate, now, types)
        assert (read.shape, read.dtype) == (bits.shape, bits.dtype)
