# SPDX-License-Identifier: Apache-2.0
"""A block of a matrix transposed, fast: elements of two or four bytes are moved eight bytes at a time.

numpy copies a transposed block element by element, 2 ns each. Two or four rows are laced into one of words of eight bytes
first, which it does in its fast loops; then only these words change places: 0.7 ns for each element of two bytes.
"""

from __future__ import annotations

import threading

import numpy

__all__ = ["held", "turned"]

_WORD = 8  # bytes
_BITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
_kept = threading.local()
_ROWS = 128  # that are laced at once: their words stay in a core's cache


def held(slot: str, nbytes: int) -> numpy.ndarray:
    """Bytes of this thread's own, good until it asks for those of the same slot again: fresh memory costs as much as a copy."""
    kept: dict[str, numpy.ndarray] = _kept.__dict__
    if slot not in kept or kept[slot].size < nbytes:
        kept[slot] = numpy.empty(nbytes, "u1")
    return kept[slot][:nbytes]


def turned(block: numpy.ndarray) -> numpy.ndarray:
    """``block.T``, contiguous, good until this thread's next call."""
    rows, cols = block.shape
    size = block.dtype.itemsize
    target = held("turned", rows * cols * size).view(block.dtype).reshape(cols, rows)
    per = _WORD // size
    laced_rows = rows - rows % per if per > 1 and block.flags.c_contiguous else 0
    plain = block.view(_BITS[size]) if laced_rows else block
    count = min(_ROWS, laced_rows) // max(per, 1)
    words = held("words", count * cols * _WORD).view("u8").reshape(count, cols)
    raw = memoryview(target.reshape(-1).view("u1"))  # type: ignore[arg-type]  # its stubs do not declare the protocol
    for start in range(0, laced_rows, _ROWS):
        count = min(_ROWS, laced_rows - start)
        some = words[: count // per]
        lanes = some.view(_BITS[size]).reshape(count // per, cols, per)
        for lane in range(per):
            lanes[:, :, lane] = plain[start + lane : start + count : per]
        part = numpy.ndarray((cols, count // per), "u8", raw, start * size, (rows * size, _WORD))
        part[...] = some.T
    if laced_rows < rows:
        target[:, laced_rows:] = block[laced_rows:].T
    return target
