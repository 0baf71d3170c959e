# SPDX-License-Identifier: Apache-2.0
"""What the library writes does not depend on the threads that numpy's linear algebra has."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from safetensors.numpy import save_file

import surgery

JOBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "the exact sum": lambda a, b, out: surgery.combine([(a, 0.5), (b, -0.3)], output=out),
    "a cut sum": lambda a, b, out: surgery.combine([(a, 0.5), (b, 0.3)], output=out, rank=16),
    "TIES": lambda a, b, out: surgery.combine([(a, 0.5), (b, 0.3)], output=out, rank=16, method="ties", density=0.3),
    "a resized one": lambda a, b, out: surgery.resize(a, output=out, rank=8),
    "codes": lambda a, b, out: surgery.convert(a, "compact", output=out),
}


def large_lora(folder: Path, seed: int) -> Path:
    """Large enough for numpy to share its products out."""
    rng, key = np.random.default_rng(seed), "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    sides = {"A": (32, 1536), "B": (1024, 32)}
    folder.mkdir()
    values = {f"{key}{side}.weight": rng.normal(size=shape).astype(np.float32) for side, shape in sides.items()}
    save_file(values, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_the_bytes_are_the_same_with_one_thread_and_two(job: str, tmp_path: Path) -> None:
    a, b = (large_lora(tmp_path / name, seed) for seed, name in enumerate("ab"))
    written = []
    for threads in (1, 2):
        out = tmp_path / str(threads) / "out"
        out.parent.mkdir()
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            JOBS[job](a, b, out)
        written.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert written[0] == written[1]
