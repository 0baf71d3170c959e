# SPDX-License-Identifier: Apache-2.0
"""Packed codes are the bits that a slow definition says, and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery_formats.storage.packing import pack, unit, unpack, words_of

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def slowly(codes: list[int], bits: int, order: tuple[int, ...], padded: bool) -> list[int]:
    """Words by one great number: code i begins at bit ``i * bits``, or in a word of its own."""
    size = unit(bits, padded)
    codes = codes + [0] * (-len(codes) % size)
    codes = [codes[start + k] for start in range(0, len(codes), size) for k in (order or range(size))]
    per = 32 // bits
    places = [(i // per * 32 + i % per * bits if padded else i * bits) for i in range(len(codes))]
    stream = sum(code << place for code, place in zip(codes, places, strict=True))
    count = -(-(places[-1] + bits) // 32) if codes else 0
    return [stream >> (32 * i) & 0xFFFFFFFF for i in range(count)]


@given(st.data())
def test_codes_are_a_stream_of_bits_and_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    padded = data.draw(st.booleans())
    size = unit(bits, padded)
    order = tuple(data.draw(st.permutations(range(size)))) if data.draw(st.booleans()) else ()
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=2))
    axis = data.draw(st.integers(0, len(shape)))
    count = data.draw(st.integers(1, 70)) if not order else size * data.draw(st.integers(1, 3))
    shape.insert(axis, count)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = rng.integers(0, 1 << bits, shape).astype(data.draw(st.sampled_from([np.uint8, np.int32, np.int64])))

    words = pack(codes, bits, axis, order, padded)

    assert words.dtype == np.uint32
    assert words.shape[axis] == words_of(count, bits, padded)
    lines = np.moveaxis(codes, axis, -1).reshape(-1, count)
    packed = np.moveaxis(words, axis, -1).reshape(len(lines), -1)
    for line, own in zip(lines.tolist(), packed.tolist(), strict=True):
        assert own == slowly(line, bits, order, padded)[: len(own)]
        assert not any(slowly(line, bits, order, padded)[len(own) :])
    again = unpack(words.view(np.int32), bits, count, axis, order, padded)
    assert again.dtype == np.uint8
    assert again.flags.c_contiguous
    assert again.flags.writeable
    assert np.array_equal(again, codes)


def test_eight_nibbles_of_awq_are_a_word() -> None:
    codes = np.arange(8)
    assert [hex(word) for word in pack(codes, 4)] == ["0x76543210"]
    assert [hex(word) for word in pack(codes, 4, order=AWQ)] == ["0x75316420"]


def test_a_code_of_three_bits_spans_two_words_unless_it_is_padded() -> None:
    codes = np.full(32, 7)
    assert pack(codes, 3).tolist() == [0xFFFFFFFF] * 3
    assert pack(codes, 3, padded=True).tolist() == [0x3FFFFFFF] * 3 + [0b111111]


def test_no_codes_are_no_words() -> None:
    for bits in range(1, 9):
        assert pack(np.zeros((3, 0), np.uint8), bits).shape == (3, 0)
        assert unpack(np.zeros((0, 4), np.int32), bits, 0, axis=0).shape == (0, 4)


def test_words_behind_the_last_code_are_ignored() -> None:
    words = np.array([[0x76543210, 0xFFFFFFFF, 0xFFFFFFFF]], np.uint32)
    assert unpack(words, 4, 9).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 15]]


def test_what_is_no_order_and_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="no order of 8 codes, 8 in a word"):
        unpack(np.zeros(1, np.uint32), 4, 8, order=(0, 1))
    with pytest.raises(ValueError, match="no order of 7"):
        pack(np.zeros(7, np.uint32), 4, order=AWQ)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(np.zeros(8, np.uint8), 9)
