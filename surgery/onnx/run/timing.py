# SPDX-License-Identifier: Apache-2.0
"""Timing several graphs in one process, in alternating blocks, to compare them to a fraction of a percent.

A device's clock drifts by more than graphs differ. So adjacent blocks are compared in pairs, and the figure is the
median of their ratios, never a ratio of medians taken minutes apart.
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
BLOCK = 5  # steps of one side before the next side's turn
_LEAD = 1  # uncounted first steps of a block: caches still hold data of the other sides
_WARM = 3  # uncounted first steps of every side: the first one records the CUDA graph


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one side.

    Attributes:
        prefills: Seconds of each prefill, up to the first token's logits; for an encoder, of each run.
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
        """Median seconds of a step; None if there are none."""
        return float(np.median(np.concatenate(self.blocks))) if self.blocks else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of one side's time to another's, from pairs of adjacent measurements.

    Attributes:
        median: Median of the ratios.
        low: Lower quartile.
        high: Upper quartile.
        pairs: Number of pairs.
    """

    median: float
    low: float
    high: float
    pairs: int


def compare(first: Timing, second: Timing) -> tuple[Ratio, Ratio | None]:
    """Ratios of prefills and of steps, `first` to `second`, from the same `measure`."""
    steps = None
    if first.blocks and second.blocks:
        steps = _ratio(*([float(np.median(block)) for block in side.blocks] for side in (first, second)))
    return _ratio(first.prefills, second.prefills), steps


def _ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    pairs = np.array(first) / np.array(second)
    low, median, high = np.percentile(pairs, (25, 50, 75))
    return Ratio(float(median), float(low), float(high), len(pairs))


def cache_length(prompt: int, new_tokens: int) -> int:
    """Number of tokens of a row at the end of `measure`."""
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
    """Measure sides in turns, each by its prefill (an encoder's whole run) and its decoder, None for an encoder.

    `new_tokens` steps are measured per side, in whole blocks, and `repeats` prefills.
    """
    firsts: list[list[float]] = [[] for _ in prefills]
    blocks: list[list[tuple[float, ...]]] = [[] for _ in prefills]
    advances = [_advance(decoder) for decoder in decoders]
    tokens = np.ones(batch, np.int64)  # their values do not affect the time
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
                times = [_seconds(advance, tokens) for _ in range(_LEAD + BLOCK)]
                blocks[side].append(tuple(times[_LEAD:]))
    return [Timing(tuple(first), tuple(side_blocks)) for first, side_blocks in zip(firsts, blocks, strict=True)]


def _turn(sides: int, number: int) -> list[int]:
    """Start each round with another side, so that no side always follows the same one."""
    return [(number + side) % sides for side in range(sides)]


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def _advance(decoder: Decoder | None) -> Callable[[Any], Any] | None:
    """A step that leaves its logits on the device, if possible."""
    if decoder is None:
        return None
    return decoder.advance if isinstance(decoder, SharedDecoder) else decoder.step
