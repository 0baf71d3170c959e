# SPDX-License-Identifier: Apache-2.0
"""A recorded function does to the bit what the function does."""

import threading

import numpy
import pytest
import torch

from surgery_formats.linalg.panel import orthonormal
from surgery_formats.linalg.replay import forget, replayed


def test_on_the_cpu_the_function_is_called() -> None:
    values = numpy.random.default_rng(0).normal(size=(3, 4, 50)).astype(numpy.float32)
    for _ in range(5):
        assert numpy.array_equal(replayed(orthonormal, values, values[0]), orthonormal(values, values[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_graph_gives_the_same_bits_on_any_stream() -> None:
    calls = []

    def counted(rows: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
        calls.append(rows.shape)
        return orthonormal(rows, filler)

    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(50):
                generator = torch.Generator("cuda").manual_seed(100 * seed + step)
                rows, filler = (torch.randn(8, 24, 700, device="cuda", generator=generator) for _ in range(2))
                if not torch.equal(replayed(counted, rows, filler), orthonormal(rows, filler)):
                    wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forget()
    assert not wrong
    assert len(calls) == 3, "two calls, and a third that is recorded"
