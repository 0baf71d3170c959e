# SPDX-License-Identifier: Apache-2.0
"""A base and adapters small enough to be made anew for a test, and two ways to run the command: in this process and as its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result
from safetensors.torch import save_file

from tests.support.json_documents import look

ROOT = Path(__file__).parents[2]
HIDDEN, LAYERS, RANK = 32, 2, 4
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")

Run = Callable[..., Result]


def environment(**extra: str) -> dict[str, str]:
    """As on a clone that was not installed."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "formats", "cli"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def spawn(*words: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """``python -m surgery_cli`` in a process of its own."""
    command = [sys.executable, "-m", "surgery_cli", *map(str, words)]
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False)
    look(list(map(str, words)), done.stdout, done.stderr)
    return done


def make_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **extra: torch.Tensor) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(64, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "o"):
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = torch.randn(HIDDEN, HIDDEN)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(2 * HIDDEN, HIDDEN)
    tensors["lm_head.weight"] = torch.randn(64, HIDDEN)
    save_file({k: v.to(dtype) for k, v in (tensors | extra).items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_lora(folder: Path, strength: float = 1.0, targets: tuple[str, ...] = TARGETS, **config: object) -> Path:
    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            stem = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, HIDDEN)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(HIDDEN, RANK) * strength
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    written = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": sorted({target.rpartition(".")[2] for target in targets}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return folder
