# SPDX-License-Identifier: Apache-2.0
"""What transformers with bitsandbytes saves and loads, in an environment that has both: SURGERY_BITSANDBYTES names its python."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surgery
from surgery.reference import forward, open_reference
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT

pytestmark = pytest.mark.nightly

SCRIPT = ROOT / "tests" / "oracles" / "bitsandbytes_peer.py"
LORA = ROOT / "examples" / "lora"
# The rows of down_proj are no whole blocks: kernels of bitsandbytes 0.50 for AVX-512 read other scales there.
SKIPPED = ["lm_head", "down_proj"]
NESTED = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": SKIPPED,
}
PLAIN = {**NESTED, "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "bfloat16"}
FP4 = {**NESTED, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
PROMPT, COUNT = [0, 17, 301, 45, 9, 810], 40


def peer(*words: object) -> str:
    python = os.environ["SURGERY_BITSANDBYTES"]
    done = subprocess.run([python, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def greedy(folder: Path) -> list[int]:
    opened = open_checkpoint(folder).main
    config = {key: value for key, value in opened.config.items() if key != "quantization_config"}
    model, tokens = open_reference(replace(opened, config=config)), list(PROMPT)
    for _ in range(COUNT):
        tokens.append(int(forward(model, torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("config", [NESTED, PLAIN, FP4], ids=["nested", "held in bfloat16", "FP4"])
@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
def test_a_merged_folder_speaks_in_bitsandbytes_as_it_does_here(quantized: str, config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    base, merged = tmp_path / "base", tmp_path / "merged"
    peer("quantise", ROOT / "examples" / "base", base, json.dumps(config))
    surgery.merge(base, LORA, output=merged, quantized=quantized)
    ours = greedy(merged)
    assert json.loads(peer("greedy", merged, json.dumps(PROMPT), COUNT)) == ours
    assert greedy(base) != ours
