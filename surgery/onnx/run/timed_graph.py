# SPDX-License-Identifier: Apache-2.0
"""A graph opened to be timed: how long that took, what it holds, and what a step of it must read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.chosen_adapters import choose_adapters, slot_arrays
from surgery.onnx.run.decoder import Decoder
from surgery.onnx.run.encoder import encode
from surgery.onnx.run.opening import GraphSession, open_graph
from surgery.onnx.run.peak import Peak, device_nbytes, resident_nbytes
from surgery.onnx.run.prepare import prepare_decoder
from surgery.onnx.run.timing import PREFILLS, Timing, measure
from surgery_formats.errors import FitError

__all__ = ["TimedGraph", "floor_seconds", "measure_all", "open_timed", "peak_nbytes", "step_nbytes"]


@dataclass(frozen=True, eq=False)
class TimedGraph:
    """A graph ready to be measured.

    Attributes:
        model: As given.
        opened: Its session.
        decoder: None for an encoder.
        load_seconds: Until the session stood.
        memory_nbytes: It took.
        virtual_tokens: In front of every row.
        peak: Counts what it takes.
        held_nbytes: It took, mapped weights that were read included.
        slots: Arrays of adapters that each run of an encoder is given; a decoder has its own.
    """

    model: str
    opened: GraphSession
    decoder: Decoder | None
    load_seconds: float
    memory_nbytes: int
    virtual_tokens: int
    peak: Peak
    held_nbytes: int
    slots: Mapping[str, npt.NDArray[Any]]


def open_timed(
    model: str | os.PathLike[str],
    *,
    batch: int,
    max_length: int,
    device: str = "auto",
    cuda_graph: bool = True,
    threads: int | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    prompt_adapter: str | os.PathLike[str] | None = None,
    provider_options: Mapping[str, str] | None = None,
    session_config: Mapping[str, str] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> TimedGraph:
    """Open `model` and make its buffers; `max_length` is without virtual tokens.

    See `open_graph` and `prepare_decoder`.
    """
    used, peak = _used(device), Peak(device)
    began = time.perf_counter()
    opened = open_graph(
        model, device=device, cuda_graph=cuda_graph, threads=threads, provider_options=provider_options,
        session_config=session_config, profile=profile,
    )  # fmt: skip
    loaded = time.perf_counter() - began
    decoder, past, slots = None, None, dict[str, npt.NDArray[Any]]()
    if opened.contract.kind == "decoder":
        decoder, past = prepare_decoder(
            opened, batch=batch, max_length=max_length, adapters=adapters, prompt_adapter=prompt_adapter
        )
    else:
        slots = slot_arrays(choose_adapters(list(adapters), opened), opened)
    tokens = past.tokens if past else 0
    return TimedGraph(
        os.fspath(model), opened, decoder, loaded, max(0, _used(device) - used), tokens, peak, peak.held(), slots
    )


def measure_all(
    sides: Sequence[TimedGraph], rows: list[list[int]], new_tokens: int, repeats: int = PREFILLS
) -> list[Timing]:
    """Time of every side, all of them alive, in turns."""

    def begin(side: TimedGraph) -> Callable[[], Any]:
        if side.decoder is None:
            return lambda: encode(side.opened, rows, side.slots)
        decoder = side.decoder
        return lambda: decoder.prefill(rows)

    return measure([begin(side) for side in sides], [side.decoder for side in sides], new_tokens, len(rows), repeats)


def peak_nbytes(side: TimedGraph, rows: list[list[int]], new_tokens: int) -> int:
    """The most that a side takes for a prefill and a step, besides what others of the process hold."""
    decoder = side.decoder

    def work() -> None:
        if decoder is None:
            encode(side.opened, rows, side.slots)
            return
        decoder.prefill(rows)
        if new_tokens:
            decoder.step(np.ones(len(rows), np.int64))

    return side.held_nbytes + side.peak.during(work)


def floor_seconds(side: TimedGraph) -> float:
    """Seconds to read the weights of one step once, at the copy bandwidth of this device, measured now.

    Raises:
        FitError: not on CUDA.
    """
    from surgery.onnx.run.cudart import CudaMemory, copy_bandwidth

    memory, nbytes = side.opened.memory, step_nbytes(side.opened.path)
    if not isinstance(memory, CudaMemory):
        raise FitError("the floor is measured on CUDA only")
    return nbytes / copy_bandwidth(memory, min(nbytes, memory.free() // 3))


def step_nbytes(path: Path) -> int:
    """Bytes of the weights that a step reads: all but tables of which it looks up a row.

    A weight used twice is read once.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    cast = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in names}
    whole = {
        cast.get(name, name)
        for node in graph.node
        for index, name in enumerate(node.input)
        if not (node.op_type == "Gather" and index == 0) and node.output[0] not in cast
    }
    sizes: dict[tuple[str, int], int] = {}
    for tensor in graph.initializer:
        if tensor.name in whole:
            place = {entry.key: entry.value for entry in tensor.external_data}
            inside = len(tensor.raw_data) or tensor.ByteSize()
            key = (place["location"], int(place.get("offset", 0))) if place else (tensor.name, -1)
            sizes[key] = max(sizes.get(key, 0), int(place["length"]) if place else inside)
    return sum(sizes.values())


def _used(device: str) -> int:
    """Bytes taken: on CUDA of the device, else private memory of this process; 0 where the system does not say."""
    return (device_nbytes(device) if device != "cpu" else 0) or resident_nbytes("RssAnon")
