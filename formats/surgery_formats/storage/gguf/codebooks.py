# SPDX-License-Identifier: Apache-2.0
"""Types whose codes are places in a short list of numbers, or ternary: IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0.

Source: ggml, ``ggml-common.h`` and ``ggml-quants.c``. llama.cpp chooses the scales of the IQ4 types by a search of its own
and those of NVFP4 by a rule for whole tensors; a fit of such is not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.tensors.ggml import BY_NAME, GgmlType

__all__ = ["CODEBOOKS"]

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers of FP4; scales are halved


@dataclass(frozen=True, slots=True)
class _Listed:
    """Scales, then codes of 4 bits that are places in a list.

    Attributes:
        type: Its name and sizes.
        levels: The list.
        begin: Bytes in front of the codes.
        scale_of: From blocks to the scales of their groups, float32.
        choose: From float32 ``(rows, blocks, codes)`` to blocks with scales, as llama.cpp's reference chooses them; None
            where that is not offered.
        group: Codes that share a scale; the lower halves of so many bytes, and then the upper, follow each other.
    """

    type: GgmlType
    levels: tuple[int, ...]
    begin: int
    scale_of: Callable[[Array], Array]
    choose: Callable[[Array], Array] | None = None
    group: int = 32
    low: ClassVar[int] = 0
    high: ClassVar[int] = 15
    bits: ClassVar[int] = 4

    def unpack(self, blocks: Array) -> Array:
        """See `AffineCodec.unpack`."""
        return _nibbles(blocks[..., self.begin :], self.group // 2)

    def pack(self, codes: Array, blocks: Array) -> None:
        """See `AffineCodec.pack`."""
        blocks[..., self.begin :] = _join_nibbles(codes, self.group // 2)

    def scales(self, blocks: Array) -> tuple[Array, None]:
        """See `AffineCodec.scales`."""
        return self.scale_of(blocks), None

    def fit(self, values: Array) -> Array | None:
        """See `AffineCodec.fit`."""
        return None if self.choose is None else self.choose(values)


def _iq4_nl_scales(blocks: Array) -> Array:
    """A half."""
    return _half(blocks[..., :2])


def _iq4_xs_scales(blocks: Array) -> Array:
    """A half, 2 bytes with the upper bits of eight scales of 6 bits, 4 bytes with the lower."""
    import numpy as np

    lower = (blocks[..., 4:8, None] >> np.array([0, 4], np.uint8)) & 15
    upper = (blocks[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    lead = blocks.shape[:-1]
    codes = lower.reshape(*lead, 8) | (upper.reshape(*lead, 8) << 4)
    return _half(blocks[..., :2]) * (codes.view(np.int8) - np.int8(32))


def _mxfp4_scales(blocks: Array) -> Array:
    """Half a power of two, by its exponent; the two least are subnormal."""
    import numpy as np

    exponent = blocks[..., :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    return bits.view(np.float32)


def _mxfp4_fit(values: Array) -> Array:
    """The power of two below the greatest value, as ``quantize_row_mxfp4_ref`` chooses it."""
    import numpy as np

    blocks = np.zeros((*values.shape[:-1], 17), np.uint8)
    _, exponent = np.frexp(abs(values).max(axis=-1, keepdims=True))
    exponent = np.where(exponent - 1 - 2 + 127 > 0, exponent - 1 - 2 + 127, 0)
    blocks[..., :1] = np.where(abs(values).max(axis=-1, keepdims=True) > 0, exponent, 0)
    return blocks


def _nvfp4_scales(blocks: Array) -> Array:
    """Half of each E4M3; 0x7F, which is NaN elsewhere, is 0 for llama.cpp, and the sign is ignored."""
    import numpy as np

    code = blocks[..., :4].astype(np.int32)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float32)
    subnormal = exponent == 0
    number = np.ldexp(np.where(subnormal, mantissa, mantissa + 8), np.where(subnormal, -10, exponent - 11))
    return np.where((code == 0) | (code == 0x7F), np.float32(0), number.astype(np.float32))


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
    _Listed(BY_NAME["IQ4_NL"], _IQ4, 2, _iq4_nl_scales),
    _Listed(BY_NAME["IQ4_XS"], _IQ4, 8, _iq4_xs_scales),
    _Listed(BY_NAME["MXFP4"], _E2M1, 1, _mxfp4_scales, _mxfp4_fit),
    _Listed(BY_NAME["NVFP4"], _E2M1, 4, _nvfp4_scales, group=16),
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
