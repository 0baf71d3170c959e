# SPDX-License-Identifier: Apache-2.0
"""``surgery bench``: load, prefill, milliseconds per token and memory of a graph, or of two in turns.

Two graphs are measured in turns in one process, so that what disturbs the machine disturbs both. On CUDA the floor is
measured beside them: no step of one row can be faster than reading its weights once, at the speed at which the device
copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgery.engine.inputs import StrPath, as_list, check_counts, local_path
from surgery.onnx.graph.contract import from_metadata
from surgery.onnx.graph.read_metadata import read_metadata
from surgery.onnx.run.encoder import vocabulary
from surgery.onnx.run.foreign import longest_of
from surgery.onnx.run.opening import GraphSession, find_graph
from surgery.onnx.run.timed_graph import floor_seconds, measure_all, open_timed, peak_nbytes, step_nbytes
from surgery.onnx.run.timing import Ratio, cache_length, compare
from surgery.onnx.run.token_tables import token_tables
from surgery.reports.drawings import Bars
from surgery.reports.result import elapsed, summarised, timed
from surgery.reports.sections import Chart, Column, Note, Table
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.errors import FitError

__all__ = ["BenchResult", "BenchSide", "bench"]

_PROMPT = 512
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class BenchSide:
    """One graph.

    Attributes:
        model: As given.
        load_seconds: Until the session stands.
        prefill_seconds: Median; up to the first token's logits. Of an encoder: the whole run.
        token_seconds: Median of a decoding step of the whole batch; None for an encoder.
        memory_nbytes: Taken by session and buffers: of the device on CUDA, else private memory of the process (mapped
            weights are not).
        peak_nbytes: Most that was taken at any moment of loading, a prefill and a step: of the device on CUDA, else resident
            memory of the process, mapped weights included.
        step_nbytes: Weights that a step reads.
        virtual_tokens: Of the soft prompt that every row begins with.
    """

    model: str
    load_seconds: float
    prefill_seconds: float
    token_seconds: float | None
    memory_nbytes: int
    peak_nbytes: int
    step_nbytes: int
    virtual_tokens: int


@summarised
@dataclass(frozen=True, slots=True)
class BenchResult:
    """Both graphs, and what they were measured at.

    Attributes:
        sides: The graph, and the one it was measured against.
        device: ``cpu`` or ``cuda``.
        prompt_length: Tokens of a row.
        new_tokens: Steps that were measured.
        batch: Rows.
        bandwidth: Bytes per second of a copy on the device, reading and writing counted; None on the cpu.
        floors: Seconds to read the weights of a step once, per side; empty on the cpu.
        prefill_ratio: Of two graphs, first to second.
        token_ratio: Of two graphs, first to second; None for encoders.
        seconds: How long it took.
    """

    sides: tuple[BenchSide, ...]
    device: str
    prompt_length: int
    new_tokens: int
    batch: int
    bandwidth: float | None
    floors: tuple[float, ...]
    prefill_ratio: Ratio | None = None
    token_ratio: Ratio | None = None
    seconds: float = elapsed()

    warnings: ClassVar[tuple[str, ...]] = ()
    nbytes: ClassVar[int] = 0  # not counted for this verb; step_nbytes of a side is what one token reads

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        record: dict[str, Any] = plain(self)
        return record

    def summary(self, *, verbose: bool = False) -> Summary:
        """A row per graph, then at what they were measured."""
        floors: tuple[float | None, ...] = self.floors or (None,) * len(self.sides)
        rows = (
            (
                side.model,
                side.load_seconds,
                side.prefill_seconds * 1e3,
                (token := side.token_seconds) and token * 1e3,
                token and self.batch / token,
                floor and token and token / floor,
                side.memory_nbytes,
                side.peak_nbytes,
                side.step_nbytes,
            )
            for side, floor in zip(self.sides, floors, strict=True)
        )
        drawings = Bars(0, (3,)), Bars(0, (2,)), Bars(0, (7,))
        chart = Chart("Time per token, prefill, and most memory", Table(_COLUMNS, tuple(rows)), drawings)
        return Summary("Speed", (chart, *(Note(text) for text in self._conditions())))

    def _conditions(self) -> Iterator[Phrase]:
        yield f"{self.device}, {self.batch} x {self.prompt_length} tokens, median of {self.new_tokens} steps"
        if self.bandwidth is not None:
            times = ", ".join(f"{floor * 1e3:.3f} ms" for floor in self.floors)
            speed = Value(self.bandwidth, "rate")
            yield f"floor: {times} per step to read the weights once, at ", speed, " copied on this device"
        if self.device == "cpu" and len(self.sides) == 2:
            first, second = (Name(side.model, 200) for side in self.sides)
            yield "memory of ", second, " is what it took beside ", first, ": what both use is counted once"
        ratio, what = (self.token_ratio, "token") if self.token_ratio else (self.prefill_ratio, "run")
        if ratio is not None:
            spread = f"half of {ratio.pairs} pairs within {ratio.low:.3f} to {ratio.high:.3f}"
            mine, other = (Name(side.model, 200) for side in self.sides)
            yield mine, f" takes {ratio.median:.3f} times the time of ", other, f" per {what} ({spread})"


_COLUMNS = (
    Column("model", "name"), Column("load s", "fixed", 2), Column("prefill ms", "fixed", 2),
    Column("ms/token", "fixed", 3),
    Column("tokens/s", "fixed", 1), Column("x floor", "fixed", 2), Column("memory", "bytes"),
    Column("peak", "bytes"),
    Column("weights", "bytes"),
)  # fmt: skip


@timed
def bench(
    model: StrPath,
    against: StrPath | None = None,
    *,
    prompt_length: int | None = None,
    new_tokens: int = 100,
    batch: int = 1,
    adapters: StrPath | Sequence[StrPath] = (),
    cache: int | None = None,
    device: str = "auto",
    cuda_graph: bool = True,
    threads: int | None = None,
) -> BenchResult:
    """Measure a graph, or two in turns.

    Args:
        model: The graph, or its folder.
        against: Another one.
        prompt_length: Tokens of each row, the same random ones for both; by default 512, or what a smaller graph has room for.
        new_tokens: Steps that are measured, in turns of a few.
        batch: Rows.
        adapters: ``.onnx_adapter`` files for the slots of `model`, or names of those it came with, at strengths (``FILE=0.5``); not
            for `against`, so that one and the same graph given as both shows what they take.
        cache: Size of a shared cache; by default just what is needed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        cuda_graph: On CUDA, whether steps are recorded and replayed.
        threads: Of one operation on the cpu.

    Raises:
        InputError: something cannot be read.
        FitError: longer than a graph takes, or a device that is not here.
        ProofError: weights that a graph was not made for.
    """
    check_counts(least=0, new_tokens=new_tokens)
    check_counts(prompt_length=prompt_length, batch=batch, cache=cache, threads=threads)
    models = [local_path(model, "model")]
    models += [] if against is None else [local_path(against, "against")]
    prompt_length = _fitting(models, prompt_length, new_tokens)
    if batch * prompt_length > _MOST_TOKENS:
        text = f"{batch} rows of {prompt_length} tokens are more than the {_MOST_TOKENS:,} that are drawn at once"
        raise FitError(text, hint="fewer: `batch=`, `prompt_length=`")
    length = cache or cache_length(prompt_length, new_tokens)
    sides = [
        open_timed(
            path,
            batch=batch,
            max_length=length,
            device=device,
            cuda_graph=cuda_graph,
            threads=threads,
            adapters=() if number else as_list(adapters),
        )
        for number, path in enumerate(models)
    ]
    if len({side.opened.memory.device for side in sides}) > 1:
        raise FitError("one graph runs on the cpu, the other on CUDA", hint='name the device: `device="cpu"`')
    width = min(_vocabulary(side.opened) for side in sides)
    rows = np.random.default_rng(0).integers(0, width, (batch, prompt_length)).tolist()
    bandwidth, floors = None, list[float]()
    if sides[0].opened.memory.device == "cuda":
        floors = [floor_seconds(side) for side in sides]
        bandwidth = step_nbytes(sides[0].opened.path) / floors[0]
    peaks = [peak_nbytes(side, rows, new_tokens) for side in sides]
    times = measure_all(sides, rows, new_tokens)
    ratios = compare(times[0], times[1]) if len(times) > 1 else (None, None)
    return BenchResult(
        tuple(
            BenchSide(
                os.fspath(side.model), side.load_seconds, timing.prefill, timing.token, side.memory_nbytes, peak,
                step_nbytes(side.opened.path), side.virtual_tokens,
            )
            for side, timing, peak in zip(sides, times, peaks, strict=True)
        ),
        sides[0].opened.memory.device, prompt_length, new_tokens, batch, bandwidth, tuple(floors), *ratios,
    )  # fmt: skip


def _fitting(models: Sequence[StrPath], asked: int | None, new_tokens: int) -> int:
    """Tokens of a row, which leave room for the steps in every graph.

    Raises:
        FitError: one has no room for them, or is the decoder of an encoder.
    """
    fitting = _PROMPT if asked is None else asked
    for model in models:
        path = find_graph(model)
        if (contract := from_metadata(read_metadata(path), path)) is None:
            room = longest_of(path) - (cache_length(0, new_tokens) if token_tables(path).cached else 0)
            fitting = min(fitting, room) if asked is None and room > 0 else fitting
            continue
        if contract.encoder:
            raise FitError("an encoder-decoder is not timed", file=path, hint="time its encoder_model.onnx alone")
        steps = cache_length(0, new_tokens) if contract.kind == "decoder" else 0
        room = contract.max_length - contract.virtual_tokens - steps
        if room < min(fitting, 1 if asked is None else fitting):
            text = f"{contract.max_length} positions have no room for {fitting if asked else 1} tokens"
            text += f" and {steps} steps" if steps else ""
            raise FitError(text, file=path, hint="fewer: `prompt_length=`" + (", `new_tokens=`" if steps else ""))
        fitting = min(fitting, room)
    return fitting


def _vocabulary(opened: GraphSession) -> int:
    return opened.contract.vocabulary or vocabulary(opened)
