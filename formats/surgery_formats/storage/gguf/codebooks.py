# SPDX-License-Identifier: Apache-2.0
"""Types whose codes are places in a short list of numbers, or ternary: IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0.

Source: ggml, ``ggml-common.h`` and ``ggml-quants.c``. llama.cpp chooses the scales of the IQ4 types by a search of its own
and those of NVFP4 by a rule for whole tensors; a fit of such is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.tensors.ggml import BY_NAME, GgmlType

__all__ = ["CODEBOOKS"]

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of FP4; scales are halved


@dataclass(frozen=True, slots=True)
class _Iq4Nl:
    """A half, 16 bytes of codes."""

    type: GgmlType = BY_NAME["IQ4_NL"]
    group: int = 32
    low: int = 0
    high: int = 15
    bits: int = 4
    levels: tuple[int, ...] = _IQ4

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _nibbles(blocks[..., 2:], 16)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., 2:] = _join_nibbles(codes, 16)

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """See `AffineCodec.scales`."""
        return _half(blocks[..., :2]), None

    def fit(self, values: Array) -> None:
        """None is offered."""


@dataclass(frozen=True, slots=True)
class _Iq4Xs:
    """A half, 2 bytes with the upper bits of eight scales of 6 bits, 4 bytes with the lower, 128 bytes of codes."""

    type: GgmlType = BY_NAME["IQ4_XS"]
    group: int = 32
    low: int = 0
    high: int = 15
    bits: int = 4
    levels: tuple[int, ...] = _IQ4

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _nibbles(blocks[..., 8:], 16)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., 8:] = _join_nibbles(codes, 16)

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """See `AffineCodec.scales`."""
        import numpy as np

        lower = (blocks[..., 4:8, None] >> np.array([0, 4], np.uint8)) & 15
        upper = (blocks[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        lead = blocks.shape[:-1]
        codes = lower.reshape(*lead, 8) | (upper.reshape(*lead, 8) << 4)
        return _half(blocks[..., :2]) * (codes.view(np.int8) - np.int8(32)), None

    def fit(self, values: Array) -> None:
        """None is offered."""


@dataclass(frozen=True, slots=True)
class _Mxfp4:
    """An exponent, 16 bytes of codes."""

    type: GgmlType = BY_NAME["MXFP4"]
    group: int = 32
    low: int = 0
    high: int = 15
    bits: int = 4
    levels: tuple[int, ...] = _E2M1

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _nibbles(blocks[..., 1:], 16)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., 1:] = _join_nibbles(codes, 16)

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """Half a power of two; the two least are subnormal."""
        import numpy as np

        exponent = blocks[..., :1].astype(np.uint32)
        bits = np.where(exponent < 2, np.uint32(0x200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
        return bits.view(np.float32), None

    def fit(self, values: Array) -> Array:
        """The power of two below the greatest value, as ``quantize_row_mxfp4_ref`` chooses it."""
        import numpy as np

        blocks = np.zeros((*values.shape[:-1], 17), np.uint8)
        _, exponent = np.frexp(abs(values).max(axis=-1, keepdims=True))
        exponent = np.where(exponent - 1 - 2 + 127 > 0, exponent - 1 - 2 + 127, 0)
        blocks[..., :1] = np.where(abs(values).max(axis=-1, keepdims=True) > 0, exponent, 0)
        return blocks


@dataclass(frozen=True, slots=True)
class _Nvfp4:
    """4 bytes of scales, unsigned E4M3, 32 bytes of codes."""

    type: GgmlType = BY_NAME["NVFP4"]
    group: int = 16
    low: int = 0
    high: int = 15
    bits: int = 4
    levels: tuple[int, ...] = _E2M1

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _nibbles(blocks[..., 4:], 8)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., 4:] = _join_nibbles(codes, 8)

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """Half of each; 0x7F, which is NaN elsewhere, is 0 for llama.cpp, and the sign is ignored."""
        import numpy as np

        code = blocks[..., :4].astype(np.int32)
        exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float32)
        subnormal = exponent == 0
        number = np.ldexp(np.where(subnormal, mantissa, mantissa + 8), np.where(subnormal, -10, exponent - 11))
        return np.where((code == 0) | (code == 0x7F), np.float32(0), number.astype(np.float32)), None

    def fit(self, values: Array) -> None:
        """None is offered."""


@dataclass(frozen=True, slots=True)
class _Ternary:
    """Codes of -1, 0 and 1, four in a byte (TQ2_0) or five (TQ1_0), and a half."""

    type: GgmlType
    group: int = 256
    low: int = -1
    high: int = 1
    bits: int = 2
    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        import numpy as np

        lead = blocks.shape[:-1]
        if self.type.name == "TQ2_0":
            packed = blocks[..., :64].reshape(*lead, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
            return ((packed & 3).view(np.int8) - np.int8(1)).reshape(*lead, 256)
        runs = []
        for begin, end, digits in _RUNS:
            powers = np.array([3**digit for digit in range(digits)], np.uint8)[:, None]
            packed = blocks[..., None, begin:end] * powers  # wraps around: the digits in front are gone
            runs.append(((packed.astype(np.uint16) * np.uint16(3)) >> 8).reshape(*lead, -1))
        return np.concatenate(runs, axis=-1).astype(np.int8) - np.int8(1)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        import numpy as np

        lead = codes.shape[:-1]
        digits = (codes + np.int8(1)).view(np.uint8)
        if self.type.name == "TQ2_0":
            planes = digits.reshape(*lead, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
            blocks[..., :64] = np.bitwise_or.reduce(planes, axis=-2).reshape(*lead, 64)
            return
        at = 0
        for begin, end, count in _RUNS:
            run = digits[..., at : at + (end - begin) * count].reshape(*lead, count, end - begin).astype(np.uint16)
            powers = np.array([3 ** (4 - digit) for digit in range(count)], np.uint16)[:, None]
            number = (run * powers).sum(axis=-2, dtype=np.uint16)
            blocks[..., begin:end] = (number * np.uint16(256) + np.uint16(242)) // np.uint16(243)
            at += (end - begin) * count

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """See `AffineCodec.scales`."""
        return _half(blocks[..., -2:]), None

    def fit(self, values: Array) -> Array:
        """The greatest value (``quantize_row_tq2_0_ref``)."""
        import numpy as np

        blocks = np.zeros((*values.shape[:-1], self.type.nbytes), np.uint8)
        with np.errstate(over="ignore"):
            blocks[..., -2:] = abs(values).max(axis=-1, keepdims=True).astype("<f2").view(np.uint8)
        return blocks


_RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
"""Of TQ1_0: bytes, and the ternary digits that each of them holds."""

CODEBOOKS = (
    _Iq4Nl(),
    _Iq4Xs(),
    _Mxfp4(),
    _Nvfp4(),
    _Ternary(BY_NAME["TQ1_0"]),
    _Ternary(BY_NAME["TQ2_0"]),
)


def _half(raw: Array) -> Array:
    import numpy as np

    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Array, run: int) -> Array:
    """Codes of 4 bits: of each `run` bytes first the lower ones, then the upper ones."""
    import numpy as np

    lead = packed.shape[:-1]
    packed = packed.reshape(*lead, -1, run)
    codes = np.empty((*packed.shape[:-1], 2, run), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return codes.reshape(*lead, -1).view(np.int8)


def _join_nibbles(codes: Array, run: int) -> Array:
    import numpy as np

    lead = codes.shape[:-1]
    pairs = codes.view(np.uint8).reshape(*lead, -1, 2, run)
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).reshape(*lead, -1)
