# SPDX-License-Identifier: Apache-2.0
"""Time of several graphs in one process, in turns of a few steps, so that they can be compared to a fraction of a percent.

A device's clock wanders by more than graphs differ. So what is compared are pairs of blocks that follow each other at once, and the
figure is the median of their ratios, never a ratio of two medians taken minutes apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.onnx.run.decoder import Decoder
from surgery.onnx.run.shared import SharedDecoder

__all__ = ["BLOCK", "PREFILLS", "Ratio", "Timing", "cache_length", "compare", "measure"]

PREFILLS = 5
BLOCK = 5  # steps of one side before it is the next one's turn
_LEAD = 1  # steps of a block that are not counted: caches hold the data of the other sides
_WARM = 3  # steps of every side before anything is counted: the first one records the CUDA graph


@dataclass(frozen=True, slots=True)
class Timing:
    """One side.

    Attributes:
        prefills: Seconds of each prefill, up to the first token's logits; of an encoder, of each run.
        blocks: Seconds of the steps of each block.
    """

    prefills: tuple[float, ...]
    blocks: tuple[tuple[float, ...], ...]

    @property
    def prefill(self) -> float:
        """Median seconds of a prefill."""
        return float(np.median(self.prefills))

    @property
    def token(self) -> float | None:
        """Median seconds of a step; None where there are none."""
        return float(np.median(np.concatenate(self.blocks))) if self.blocks else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much longer one side takes than another, from pairs measured one after the other.

    Attributes:
        median: Of the pairs' ratios.
        low: A quarter of the pairs is below.
        high: A quarter of the pairs is above.
        pairs: How many there are.
    """

    median: float
    low: float
    high: float
    pairs: int


def compare(one: Timing, other: Timing) -> tuple[Ratio, Ratio | None]:
    """Ratios of prefill and of step, `one` to `other`, of the same `measure`."""
    steps = None
    if one.blocks and other.blocks:
        steps = _ratio(*([float(np.median(block)) for block in side.blocks] for side in (one, other)))
    return _ratio(one.prefills, other.prefills), steps


def _ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    pairs = np.array(one) / np.array(other)
    low, median, high = np.percentile(pairs, (25, 50, 75))
    return Ratio(float(median), float(low), float(high), len(pairs))


def cache_length(prompt: int, new_tokens: int) -> int:
    """Tokens that a row has at the end of `measure`."""
    return prompt + _WARM + _rounds(new_tokens) * (_LEAD + BLOCK)


def _rounds(new_tokens: int) -> int:
    return -(-new_tokens // BLOCK)


def measure(
    prefills: Sequence[Callable[[], Any]],
    decoders: Sequence[Decoder | None],
    new_tokens: int,
    batch: int = 1,
    repeats: int = PREFILLS,
) -> list[Timing]:
    """Measure sides in turns.

    Args:
        prefills: What begins a side's sequence anew, or all that an encoder does.
        decoders: Of each side, None for an encoder.
        new_tokens: Steps to measure of each, in whole blocks.
        batch: Rows.
        repeats: Prefills to measure of each.
    """
    firsts: list[list[float]] = [[] for _ in prefills]
    blocks: list[list[tuple[float, ...]]] = [[] for _ in prefills]
    advances = [_advance(decoder) for decoder in decoders]
    tokens = np.ones(batch, np.int64)  # what they are costs nothing
    for number in range(-1, repeats):  # the first round warms up
        for side in _turn(len(prefills), number):
            seconds = _seconds(prefills[side])
            if number >= 0:
                firsts[side].append(seconds)
    for advance in advances:
        for _ in range(_WARM if new_tokens else 0):
            if advance:
                advance(tokens)
    for number in range(_rounds(new_tokens)):
        for side in _turn(len(prefills), number):
            if advance := advances[side]:
                taken = [_seconds(advance, tokens) for _ in range(_LEAD + BLOCK)]
                blocks[side].append(tuple(taken[_LEAD:]))
    return [Timing(tuple(first), tuple(each)) for first, each in zip(firsts, blocks, strict=True)]


def _turn(sides: int, number: int) -> list[int]:
    """Each round begins with another side, so that none always follows the same one."""
    return [(number + side) % sides for side in range(sides)]


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def _advance(decoder: Decoder | None) -> Callable[[Any], Any] | None:
    """A step without fetching its logits, where they can be left on the device."""
    if decoder is None:
        return None
    return decoder.advance if isinstance(decoder, SharedDecoder) else decoder.step
