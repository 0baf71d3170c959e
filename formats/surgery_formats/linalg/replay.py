# SPDX-License-Identifier: Apache-2.0
"""Functions of small arrays that a GPU is given again and again, as CUDA graphs.

Cholesky QR of a stack of panels is a hundred kernels of a few microseconds each: to launch them takes longer than
they run. A graph launches them all at once. It is worth recording for shapes that return, and does to the bit what the
function does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from surgery_formats.arrays import Array, is_torch

__all__ = ["forget", "replayed"]

_WORTH_IT = 3
"""The use from which a graph is recorded: that takes as long as four calls."""
_lock = threading.Lock()
_uses: Counter[Hashable] = Counter()
_recordings: dict[Hashable, _Recording] = {}


def replayed(function: Callable[..., Array], *arrays: Array) -> Array:
    """``function(*arrays)``; it must neither wait for the device nor depend on anything else."""
    if not is_torch(arrays[0]) or arrays[0].device.type != "cuda":
        return function(*arrays)
    key = function, *((array.device, array.dtype, array.shape, array.stride()) for array in arrays)
    with _lock:
        _uses[key] += 1
        if _uses[key] >= _WORTH_IT:
            if key not in _recordings:
                _recordings[key] = _Recording.of(function, arrays)
            return _recordings[key].play(arrays)
    return function(*arrays)


def forget() -> None:
    """Free what was recorded."""
    with _lock:
        _uses.clear()
        _recordings.clear()


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, the memory that it reads and writes, and the event after its last use on any stream."""

    graph: Any
    inputs: tuple[Array, ...]
    output: Array
    used: Any

    @classmethod
    def of(cls, function: Callable[..., Array], arrays: tuple[Array, ...]) -> _Recording:
        """Record `function` on the current stream, which is not the default one."""
        import torch  # graphs are CUDA's

        inputs = tuple(torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in arrays)
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would also free all cached memory; other threads go on copying meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            output = function(*inputs)
        finally:
            graph.capture_end()
        used: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        used.record()
        return cls(graph, inputs, output, used)

    def play(self, arrays: tuple[Array, ...]) -> Array:
        """The function of `arrays`, on the current stream."""
        self.used.wait()
        for static, array in zip(self.inputs, arrays, strict=True):
            static.copy_(array)
        self.graph.replay()
        output = self.output.clone()
        self.used.record()
        return output
