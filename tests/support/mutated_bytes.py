# SPDX-License-Identifier: Apache-2.0
"""A file of safetensors with a few of its bytes changed, many times over: what reads it may refuse it, by our errors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.errors import SurgeryError
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["count_refused"]


def count_refused(path: Path, times: int, read: Callable[[Mapping[str, StoredTensor]], None]) -> int:
    """How many of `times` mutations of a file `read` refuses; any other error is raised.

    Three in ten of the changed bytes are taken from the whole file behind the length of its header, the others from its data.
    The last mutation stays in the file.
    """
    raw, generator = bytearray(path.read_bytes()), np.random.default_rng(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for _ in range(times):
        mutated = bytearray(raw)
        for _ in range(generator.integers(1, 4)):
            start = 8 if generator.random() < 0.3 else header
            mutated[generator.integers(start, len(raw))] = generator.integers(0, 256)
        path.write_bytes(mutated)
        try:
            read({tensor.name: tensor for tensor in open_safetensors(path).tensors})
        except SurgeryError:
            refused += 1
    return refused
