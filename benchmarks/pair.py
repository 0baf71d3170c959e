# SPDX-License-Identifier: Apache-2.0
"""A base and a full fine-tune of it, made on the spot: random bf16 weights, and a change of known making on every linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from shapes import Shape, describe, shards_of

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import as_bytes

_RANK = 16
_LOW, _NOISE = 2e-3, 4e-4
"""Root mean square of the change's low-rank part and of the rest: about 4 % of the energy is not of rank 16."""


def write_pair(shape: Shape, base: Path, tuned: Path, device: str = "cpu", shards: int = 1) -> None:
    """Two bf16 folders with an index; every matrix but a tied embedding differs.

    A tied embedding is left as it is: PEFT's only form for one that changed in every row is two full copies, whose writing would be all
    that is measured.
    """
    for folder in (base, tuned):
        folder.mkdir(parents=True)
    files = shards_of(shape.tensors(), shards)
    weight_map = {name: file for file, group in files.items() for name, _ in group}
    for folder in (base, tuned):
        describe(shape, folder, weight_map)

    def write(number: int, file: str, group: list[tuple[str, tuple[int, ...]]]) -> None:
        header, ranges = layout([(name, DType.BF16, size) for name, size in group], {"format": "pt"})
        with open(base / file, "wb") as one, open(tuned / file, "wb") as other:
            for out in (one, other):
                out.write(header)
            for name, size in group:
                assert one.tell() == ranges[name][0]
                changed = len(size) == 2 and not (shape.tied and "embed" in name)
                for before, after in _values(name, size, device, changed=changed):
                    one.write(as_bytes(before))
                    other.write(as_bytes(after))

    with ThreadPoolExecutor(len(files)) as pool:
        jobs = [pool.submit(write, number, file, group) for number, (file, group) in enumerate(files.items())]
        for job in jobs:
            job.result()


def _values(
    name: str, size: tuple[int, ...], device: str, *, changed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows of both, on the CPU."""
    generator = torch.Generator(device).manual_seed(sum(name.encode()))
    if len(size) == 1:
        ones = torch.ones(size, dtype=torch.bfloat16)
        yield ones, ones
        return

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    right, step = normal(_RANK, size[1]), (1 << 26) // size[1]
    for start in range(0, size[0], step):
        rows = min(step, size[0] - start)
        before = (normal(rows, size[1]) * 0.02).bfloat16()
        after = before
        if changed:
            change = normal(rows, _RANK) @ right * (_LOW / _RANK**0.5) + normal(rows, size[1]) * _NOISE
            after = (before.float() + change).bfloat16()
        yield before.cpu(), after.cpu()
