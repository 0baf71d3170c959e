# SPDX-License-Identifier: Apache-2.0
"""Pairs of adapters and of models that differ, and what diff says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from surgery import diff
from surgery.comparison.checkpoints import CheckpointDiff
from surgery.comparison.results import AdapterDiff
from surgery_cli.group import surgery
from tests.support.adapter_files import draw, write_peft

__all__ = ["Q", "V", "changed", "diff_adapters", "diff_models", "lora", "run"]

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = Q.replace("q_proj", "v_proj")


def lora(folder: Path, *seeds: tuple[str, int, int], **config: object) -> Path:
    """``(stem, seed, rank)`` each; weights of 24x32."""
    tensors = {}
    for stem, seed, rank in seeds:
        tensors[f"{stem}.lora_A.weight"] = draw(seed, rank, 32)
        tensors[f"{stem}.lora_B.weight"] = draw(seed + 1, 24, rank)
    ranks = {stem.rpartition(".")[2]: rank for stem, _, rank in seeds}
    return write_peft(folder, tensors, **{"r": seeds[0][2], "lora_alpha": 4, "rank_pattern": ranks, **config})


def diff_adapters(a: Path, b: Path, **options: object) -> AdapterDiff:
    """The difference of two adapters."""
    found = diff(a, b, **options)  # type: ignore[arg-type]
    assert isinstance(found, AdapterDiff)
    return found


def diff_models(a: Path, b: Path, **options: object) -> CheckpointDiff:
    """The difference of two checkpoints."""
    found = diff(a, b, **options)  # type: ignore[arg-type]
    assert isinstance(found, CheckpointDiff)
    return found


def run(*words: object) -> Result:
    """What the command does with these words."""
    return CliRunner().invoke(surgery, [str(word) for word in words])


def changed(base: Path, folder: Path, **new: torch.Tensor | None) -> Path:
    """A copy with some tensors replaced (``__`` for dots) or removed."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in new.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
