# SPDX-License-Identifier: Apache-2.0
"""A folder of onnxruntime-genai, run by onnxruntime-genai itself: milliseconds per token as JSON. A process of its own, see onnx_gpu.py."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch  # noqa: F401  # isort: skip  # first: it loads the CUDA libraries that the others look for
import onnxruntime  # noqa: F401  # isort: skip  # then this, whose library genai takes over
import numpy as np
import onnxruntime_genai as og


def main(folder: str, prompt: int, cache: int, steps: int) -> None:
    began = time.perf_counter()
    model = og.Model(folder)
    load = time.perf_counter() - began
    search = og.GeneratorParams(model)
    search.set_search_options(max_length=cache, min_length=cache, do_sample=False)
    tokens = np.random.default_rng(1).integers(3, 1000, prompt).astype(np.int32)
    firsts, seconds = [], []
    for _ in range(3):  # the first round warms up
        generator = og.Generator(model, search)
        began = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        firsts.append(time.perf_counter() - began)
        for _ in range(steps):
            began = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - began)
    found = {
        "load_s": load,
        "first_token_ms": 1e3 * statistics.median(firsts[1:]),
        "decode_ms": 1e3 * statistics.median(seconds[steps:]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
