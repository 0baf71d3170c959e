# SPDX-License-Identifier: Apache-2.0
"""``--memory-limit`` is kept, as the kernel saw it: beyond what a merge takes of nothing, no more than the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery.engine.blocks import BLOCK_ELEMENTS
from tests.support.adapter_files import draw, write_peft
from tests.support.quantised_folders import FORMATS, NF4

ROOT = Path(__file__).parents[2]
OUT, INPUTS, RANK = 2048, 1024, 8
LEAST = 5 * 8 * BLOCK_ELEMENTS + 8 * RANK * (OUT + INPUTS)
"""Bytes that one weight may take: what `surgery.engine.blocks` says, worked out anew."""
CODED = 2048
LEAST_CODED = 5 * 8 * 4 * BLOCK_ELEMENTS + 8 * RANK * 2 * CODED
"""The same of a weight of so many rows and columns whose codes are chosen again."""


def pair(folder: Path, out: int, inputs: int, count: int) -> tuple[Path, Path]:
    """A base of `count` float32 weights, and a LoRA on each."""
    folder.mkdir()
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(count)]
    (folder / "base").mkdir()
    values = {f"{name}.weight": draw(number, out, inputs) for number, name in enumerate(names)}
    save_file(values, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    factors = {}
    for number, name in enumerate(names):
        factors[f"base_model.model.{name}.lora_A.weight"] = draw(100 + number, RANK, inputs)
        factors[f"base_model.model.{name}.lora_B.weight"] = draw(200 + number, out, RANK)
    write_peft(folder / "lora", factors, r=RANK, lora_alpha=RANK)
    return folder / "base", folder / "lora"


def coded(folder: Path, size: int, count: int) -> tuple[Path, Path]:
    """The same with NF4 in place of float32: random codes and scales."""
    base, lora = pair(folder, size, size, count)
    chance = np.random.default_rng(0)
    method, state = (
        FORMATS["nf4"][1],
        {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [size, size]},
    )
    tensors = {}
    for name in load_file(base / "model.safetensors"):
        tensors[name] = chance.integers(0, 256, (size * size // 2, 1), np.uint8)
        tensors[f"{name}.absmax"] = chance.random(size * size // 64, np.float32)
        tensors[f"{name}.quant_map"] = NF4.numpy()
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": method}))
    return base, lora


def merged(base: Path, lora: Path, out: Path, *options: str) -> tuple[int, int, str]:
    """Exit code, the peak of resident memory in bytes, stderr; eight workers, if the limit allows them."""
    words = [
        sys.executable,
        "-P",
        "-m",
        "surgery_cli",
        "-q",
        "merge",
        base,
        lora,
        "-o",
        out,
        "--workers",
        "8",
        *options,
    ]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "formats", "cli"))
    command = subprocess.Popen(map(str, words), stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths})
    peak = 0
    while command.poll() is None:
        peak = max(peak, high_water(command.pid))
        time.sleep(0.002)
    assert command.stderr is not None
    return command.returncode, peak, command.stderr.read().decode()


def high_water(pid: int) -> int:
    """Bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_the_limit_is_kept_seen_from_outside(tmp_path: Path) -> None:
    tiny, large = pair(tmp_path / "tiny", 32, 16, 1), pair(tmp_path / "large", OUT, INPUTS, 8)
    code, fixed, _ = merged(*tiny, tmp_path / "nothing")
    assert code == 0
    code, unlimited, _ = merged(*large, tmp_path / "unlimited")
    assert code == 0
    for number, limit in enumerate((LEAST, 2 * LEAST)):
        code, peak, error = merged(*large, tmp_path / f"out{number}", "--memory-limit", str(limit))
        assert code == 0, error
        assert peak <= fixed + limit, (fixed, limit, peak, unlimited)
        written = (tmp_path / f"out{number}" / "model.safetensors").read_bytes()
        assert written == (tmp_path / "unlimited" / "model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_the_limit_is_kept_where_codes_are_chosen_again(tmp_path: Path) -> None:
    tiny, large = coded(tmp_path / "tiny", 64, 1), coded(tmp_path / "large", CODED, 4)
    ways = ("--quantized", "requantize", "--accept-loss")
    code, fixed, error = merged(*tiny, tmp_path / "nothing", *ways)
    assert code == 0, error
    limit = 2 * LEAST_CODED
    code, peak, error = merged(*large, tmp_path / "out", *ways, "--memory-limit", str(limit))
    assert code == 0, error
    assert peak <= fixed + limit, (fixed, limit, peak)


def test_a_limit_that_one_weight_exceeds_writes_nothing(tmp_path: Path) -> None:
    large = pair(tmp_path / "large", OUT, INPUTS, 2)
    code, _, error = merged(*large, tmp_path / "out", "--memory-limit", str(LEAST - 1))
    assert code == 7
    assert "raise the limit" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]
