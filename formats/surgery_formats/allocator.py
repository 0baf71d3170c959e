# SPDX-License-Identifier: Apache-2.0
"""What glibc's allocator keeps for itself beside what is in use; with another C library nothing here does anything.

- Each thread has an arena of its own, and what is freed into one is not used by another: a merge from bucket to bucket on 16
  cores takes 940 MB with the arenas of 40 threads, and 700 MB with two.
- Once a block of up to 32 MB was freed, others of its size come from an arena, and what is free between them stays resident: of a
  merge into NF4 with two threads 65 MB of 280. A block that is mapped by itself is gone when it is freed; that takes a fifth more
  processor time there, and no more where blocks are small.
- Blocks of some MB on their way from a store to a store would be such, and the kernel clears the pages of each: of the 11.4 s of
  cores that 4 GB take that is 0.5.

The last two were measured with glibc 2.36, 2026-11-30: `benchmarks/memory.py --sizes 0.2 --limits` and `benchmarks/object_storage.py --gb 4
--targets all`; what follows for a user is in docs/guarantees.md, section 4, and docs/object-storage.md.
"""

from __future__ import annotations

import ctypes
import functools

__all__ = ["keep_large_blocks", "limit_arenas", "return_large_blocks"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt(3)
_ARENAS = 2
_LARGEST = 32 << 20  # that glibc takes for the threshold
_MOST_KEPT = 256 << 20  # no arena but the first is larger than 64 MB
_LARGE = 4 << 20
_KEPT = 16 << 20  # at the end of an arena: less would have small blocks fetch the same pages again and again


@functools.cache
def limit_arenas() -> None:
    """Let threads that begin from now on share arenas."""
    _set(_ARENA_MAX, _ARENAS)


def keep_large_blocks() -> None:
    """Have no block of up to 32 MB given back to the kernel when it is freed, from now on."""
    _set(_MMAP_THRESHOLD, _LARGEST)
    _set(_TRIM_THRESHOLD, _MOST_KEPT)


def return_large_blocks() -> None:
    """Have every block of 4 MB or more given back to the kernel when it is freed, from now on."""
    _set(_MMAP_THRESHOLD, _LARGE)
    _set(_TRIM_THRESHOLD, _KEPT)


def _set(parameter: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, OSError):
        return
