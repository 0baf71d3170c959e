# SPDX-License-Identifier: Apache-2.0
"""The K-quants: blocks of 256 codes in groups of 16 or 32 whose scales are codes themselves (ggml, ``ggml-common.h``).

Q2_K, Q4_K and Q5_K have a minimum for each group, Q3_K and Q6_K none. Q8_K, of one scale, is made for products only,
but llama.cpp can store it.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.storage.gguf.scale_search import scale_and_min, signed_scale, stepwise_scale
from surgery_formats.tensors.ggml import BY_NAME, GgmlType

__all__ = ["K_QUANTS"]


@dataclass(frozen=True, slots=True)
class _Q2K:
    """16 bytes of a scale and a minimum of 4 bits each, 64 bytes of codes, two halves."""

    type: GgmlType = BY_NAME["Q2_K"]
    group: int = 16
    low: int = 0
    high: int = 3
    bits: int = 2
    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _planes(blocks[..., 16:80], 2)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., 16:80] = _join_planes(codes, 2)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        d, low = _halves(blocks[..., 80:84])
        return d * (blocks[..., :16] & 15), -(low * (blocks[..., :16] >> 4))

    def fit(self, values: Array) -> Array:
        """``quantize_row_q2_K_ref``."""
        import numpy as np

        groups = _groups(values, 16)
        scale, low = (
            _ungrouped(each, values, 16) for each in scale_and_min(groups, abs(groups), 3, -0.5, 15, absolute=True)
        )
        blocks = np.zeros((*values.shape[:-1], 84), np.uint8)
        (d, scale_codes), (dmin, low_codes) = _coded(scale, 15), _coded(low, 15)
        blocks[..., :16] = (scale_codes & 15) | (low_codes << 4)
        blocks[..., 80:84] = np.concatenate([d, dmin], axis=-1)
        return blocks


@dataclass(frozen=True, slots=True)
class _Q3K:
    """32 bytes of third bits, 64 bytes of the other two, 12 bytes of scales of 6 bits, a half."""

    type: GgmlType = BY_NAME["Q3_K"]
    group: int = 16
    low: int = -4
    high: int = 3
    bits: int = 3
    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        codes = _planes(blocks[..., 32:96], 2).view(np.uint8)
        codes |= _bit_planes(blocks[..., :32]) << 2
        codes -= 4
        return codes.view(np.int8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        unsigned = codes.view(np.uint8) + np.uint8(4)
        blocks[..., :32] = _join_bits(unsigned >> 2)
        blocks[..., 32:96] = _join_planes(unsigned & 3, 2)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        packed = blocks[..., 96:108]
        codes = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
        for quarter in range(4):
            codes[..., 4 * quarter : 4 * quarter + 4] |= ((packed[..., 8:] >> 2 * quarter) & 3) << 4
        (d,) = _halves(blocks[..., 108:110])
        return d * (codes.view(np.int8) - np.int8(32)), None

    def fit(self, values: Array) -> Array:
        """``quantize_row_q3_K_ref``."""
        import numpy as np

        scale = _ungrouped(stepwise_scale(_groups(values, 16), 4), values, 16)
        blocks = np.zeros((*values.shape[:-1], 110), np.uint8)
        d, codes = _signed_codes(scale, 32, 31)
        unsigned = (codes + 32).astype(np.uint8)
        blocks[..., 96:104] = (unsigned[..., :8] & 15) | ((unsigned[..., 8:] & 15) << 4)
        for quarter in range(4):
            blocks[..., 104:108] |= (unsigned[..., 4 * quarter : 4 * quarter + 4] >> 4) << 2 * quarter
        blocks[..., 108:110] = d
        return blocks


@dataclass(frozen=True, slots=True)
class _Q45K:
    """Two halves, 12 bytes of scales and minima of 6 bits, with 5 bits 32 bytes of fifth bits, 128 bytes of codes."""

    type: GgmlType
    bits: int
    first: float
    steps: int
    group: int = 32
    low: int = 0
    levels: tuple[int, ...] = ()

    @property
    def high(self) -> int:
        """15, or 31."""
        return (1 << self.bits) - 1

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        packed = blocks[..., -128:].reshape(*blocks.shape[:-1], 4, 1, 32)
        codes = np.empty((*blocks.shape[:-1], 4, 2, 32), np.uint8)
        np.bitwise_and(packed[..., 0, :], 15, out=codes[..., 0, :])
        np.right_shift(packed[..., 0, :], 4, out=codes[..., 1, :])
        codes = codes.reshape(*blocks.shape[:-1], 256)
        if self.bits == 5:
            codes |= _bit_planes(blocks[..., 16:48]) << 4
        return codes.view(np.int8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        unsigned = codes.view(np.uint8)
        if self.bits == 5:
            blocks[..., 16:48] = _join_bits(unsigned >> 4)
            unsigned = unsigned & 15
        pairs = unsigned.reshape(*blocks.shape[:-1], 4, 2, 32)
        blocks[..., -128:] = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).reshape(*blocks.shape[:-1], 128)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        d, dmin = _halves(blocks[..., :4])
        first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
        scale = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
        low = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
        return d * scale, -(dmin * low)

    def fit(self, values: Array) -> Array:
        """``quantize_row_q4_K_ref`` and ``quantize_row_q5_K_ref``."""
        import numpy as np

        groups = _groups(values, 32)
        weights = np.sqrt(np.add.reduce(groups * groups, axis=0) / np.float32(32)) + abs(groups)
        found = scale_and_min(groups, weights, self.high, self.first, self.steps, absolute=False)
        scale, low = (_ungrouped(each, values, 32) for each in found)
        blocks = np.zeros((*values.shape[:-1], self.type.nbytes), np.uint8)
        (d, scale_codes), (dmin, low_codes) = _coded(scale, 63), _coded(low, 63)
        blocks[..., :4] = np.concatenate([d, dmin], axis=-1)
        blocks[..., 4:8] = scale_codes[..., :4] | (scale_codes[..., 4:] >> 4) << 6
        blocks[..., 8:12] = low_codes[..., :4] | (low_codes[..., 4:] >> 4) << 6
        blocks[..., 12:16] = (scale_codes[..., 4:] & 15) | (low_codes[..., 4:] & 15) << 4
        return blocks


@dataclass(frozen=True, slots=True)
class _Q6K:
    """128 bytes of the lower four bits, 64 bytes of the upper two, 16 signed bytes of scales, a half."""

    type: GgmlType = BY_NAME["Q6_K"]
    group: int = 16
    low: int = -32
    high: int = 31
    bits: int = 6
    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        lower = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 64)
        codes = np.empty((*blocks.shape[:-1], 2, 2, 64), np.uint8)
        np.bitwise_and(lower, 15, out=codes[..., 0, :])
        np.right_shift(lower, 4, out=codes[..., 1, :])
        codes = codes.reshape(*blocks.shape[:-1], 256)
        codes |= _planes(blocks[..., 128:192], 2).view(np.uint8) << 4
        codes -= 32
        return codes.view(np.int8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        unsigned = codes.view(np.uint8) + np.uint8(32)
        lower = (unsigned & 15).reshape(*blocks.shape[:-1], 2, 2, 64)
        blocks[..., :128] = (lower[..., 0, :] | lower[..., 1, :] << 4).reshape(*blocks.shape[:-1], 128)
        blocks[..., 128:192] = _join_planes(unsigned >> 4, 2)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        (d,) = _halves(blocks[..., 208:210])
        return d * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), None

    def fit(self, values: Array) -> Array:
        """``quantize_row_q6_K_ref``."""
        import numpy as np

        scale = _ungrouped(signed_scale(_groups(values, 16), 32), values, 16)
        blocks = np.zeros((*values.shape[:-1], 210), np.uint8)
        d, codes = _signed_codes(scale, 128, 127)
        blocks[..., 192:208] = codes.astype(np.int8).view(np.uint8)
        blocks[..., 208:210] = d
        return blocks


@dataclass(frozen=True, slots=True)
class _Q8K:
    """A float, 256 signed bytes, and their sums by 16 as 16-bit integers."""

    type: GgmlType = BY_NAME["Q8_K"]
    group: int = 256
    low: int = -127
    high: int = 127
    bits: int = 8
    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        return np.ascontiguousarray(blocks[..., 4:260]).view(np.int8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        blocks[..., 4:260] = codes.view(np.uint8)
        sums = codes.reshape(*codes.shape[:-1], 16, 16).sum(axis=-1, dtype=np.int16)
        blocks[..., 260:] = sums.astype("<i2").view(np.uint8)

    def scales(self, blocks: Array) -> tuple[Array, Array | None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        return np.ascontiguousarray(blocks[..., :4]).view("<f4").astype(np.float32), None

    def fit(self, values: Array) -> Array:
        """``quantize_row_q8_K_ref``."""
        import numpy as np

        greatest = np.take_along_axis(values, abs(values).argmax(axis=-1)[..., None], axis=-1)
        blocks = np.zeros((*values.shape[:-1], 292), np.uint8)
        inverse = np.divide(np.float32(-127), greatest, out=np.zeros_like(greatest), where=greatest != 0)
        d = np.divide(np.float32(1), inverse, out=np.zeros_like(greatest), where=greatest != 0)
        blocks[..., :4] = d.astype("<f4").view(np.uint8)
        return blocks


K_QUANTS = (
    _Q2K(),
    _Q3K(),
    _Q45K(BY_NAME["Q4_K"], 4, -1.0, 20),
    _Q45K(BY_NAME["Q5_K"], 5, -0.5, 15),
    _Q6K(),
    _Q8K(),
)


def _halves(raw: Array) -> tuple[Array, ...]:
    """Every half of each block as float32 ``(..., 1)``."""
    import numpy as np

    halves = np.ascontiguousarray(raw).view("<f2").astype(np.float32)
    return tuple(halves[..., i : i + 1] for i in range(halves.shape[-1]))


def _planes(packed: Array, bits: int) -> Array:
    """256 codes of two bits: of each 32 bytes first the lowest bits, then the next."""
    import numpy as np

    lead = packed.shape[:-1]
    packed = packed.reshape(*lead, 2, 32)
    codes = np.empty((*lead, 2, 4, 32), np.uint8)
    for plane in range(4):
        np.right_shift(packed, bits * plane, out=codes[..., plane, :])
    codes &= 3
    return codes.reshape(*lead, 256).view(np.int8)


def _join_planes(codes: Array, bits: int) -> Array:
    import numpy as np

    lead = codes.shape[:-1]
    planes = codes.view(np.uint8).reshape(*lead, 2, 4, 32)
    joined = planes[..., 0, :].copy()
    for plane in range(1, 4):
        joined |= planes[..., plane, :] << np.uint8(bits * plane)
    return joined.reshape(*lead, 64)


def _bit_planes(packed: Array) -> Array:
    """256 single bits of 32 bytes: the lowest of all bytes first."""
    import numpy as np

    lead = packed.shape[:-1]
    bits = np.empty((*lead, 8, 32), np.uint8)
    for plane in range(8):
        np.right_shift(packed, plane, out=bits[..., plane, :])
    bits &= 1
    return bits.reshape(*lead, 256)


def _join_bits(bits: Array) -> Array:
    import numpy as np

    planes = bits.reshape(*bits.shape[:-1], 8, 32)
    joined = planes[..., 0, :].copy()
    for plane in range(1, 8):
        joined |= planes[..., plane, :] << np.uint8(plane)
    return joined


def _groups(values: Array, group: int) -> Array:
    """``(rows, blocks, 256)`` as ``(group, all groups)``, as `scale_search` takes them."""
    import numpy as np

    return np.ascontiguousarray(values.reshape(-1, group).T)


def _ungrouped(found: Array, values: Array, group: int) -> Array:
    return found.reshape(*values.shape[:-1], values.shape[-1] // group)


def _coded(found: Array, greatest: int) -> tuple[Array, Array]:
    """The half of a block, as bytes, and the codes of its groups' scales, none of which is negative."""
    import numpy as np

    most = np.maximum(found.max(axis=-1, keepdims=True), np.float32(0))
    inverse = np.divide(np.float32(greatest), most, out=np.zeros_like(most), where=most > 0)
    codes = np.minimum(np.rint(inverse * found).astype(np.int32) & 255, greatest).astype(np.uint8)
    return _half(most / np.float32(greatest)), codes


def _signed_codes(scale: Array, half: int, greatest: int) -> tuple[Array, Array]:
    """The same of signed scales: the one farthest from 0 becomes the least code."""
    import numpy as np

    most = np.take_along_axis(scale, abs(scale).argmax(axis=-1)[..., None], axis=-1)
    usable = abs(most) > 0
    inverse = np.divide(np.float32(-half), most, out=np.zeros_like(most), where=usable)
    codes = np.clip(np.rint(inverse * scale), -half, greatest).astype(np.int32)
    return _half(np.divide(np.float32(1), inverse, out=np.zeros_like(most), where=usable)), codes


def _half(values: Array) -> Array:
    import numpy as np

    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)
