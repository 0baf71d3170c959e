# SPDX-License-Identifier: Apache-2.0
"""What diffusers reads of merged single files, in an environment with diffusers: SURGERY_DIFFUSERS names its python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import merge
from tests.support.adapter_files import Arrays
from tests.support.kit import ROOT

pytestmark = pytest.mark.nightly

SCRIPT = ROOT / "tests" / "oracles" / "diffusers_single_files.py"


def peer(word: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "formats"), "HF_HUB_OFFLINE": "1"}
    command = [os.environ["SURGERY_DIFFUSERS"], str(SCRIPT), word, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lora(weights: Arrays) -> Arrays:
    """Of every matrix and convolution, in diffusers' names."""
    rng = np.random.default_rng(2)
    found: Arrays = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.ndim in (2, 4, 5):
            stem, (out, *inputs) = f"transformer.{name.removesuffix('.weight')}", tensor.shape
            found[f"{stem}.lora_A.weight"] = 0.1 * rng.standard_normal((2, *inputs)).astype(np.float32)
            ones = (1,) * (tensor.ndim - 2)
            found[f"{stem}.lora_B.weight"] = rng.standard_normal((out, 2, *ones)).astype(np.float32)
    return found


def test_a_merged_single_file_loads_as_the_merged_folder(tmp_path: Path) -> None:
    """Bit for bit the same model, by diffusers' own loader, and the base's file by it the base's folder."""
    peer("make", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        here = tmp_path / name
        weights = load_file(here / "folder" / "diffusion_pytorch_model.safetensors")
        save_file(lora(weights), here / "lora.safetensors")
        merge(here / "base.safetensors", here / "lora.safetensors", output=here / "one")
        merge(here / "folder", here / "lora.safetensors", output=here / "other")
        merged = load_file(here / "other" / "diffusion_pytorch_model.safetensors")
        assert sum(not np.array_equal(tensor, weights[key]) for key, tensor in merged.items()) > 5
    told = peer("check", tmp_path).splitlines()
    assert sorted(line.split()[1].rstrip(":") for line in told if line.startswith("OK")) == names
