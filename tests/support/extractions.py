# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes for the tests of extraction, and what a round trip through PEFT must give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

import surgery
from tests.oracles import disk, models

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]
WHOLE = 64  # no matrix of the tiny models has more directions


def everything(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As after a full fine-tune: no tensor keeps its values."""
    if not value.is_floating_point():
        return value + 3 if name.endswith("num_batches_tracked") else value
    moved = (value.float() + 0.03 * torch.randn(value.shape, generator=generator)).to(value.dtype)
    return moved.abs() if name.endswith("running_var") else moved


def low_rank(rank: int) -> Change:
    def change(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if value.ndim != 2:
            return value
        left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in value.shape)
        return (value.double() + 0.05 * left @ right.T).to(value.dtype)

    return change


def only(part: str, change: Change = everything) -> Change:
    return lambda name, value, generator: change(name, value, generator) if part in name else value


def tune(base: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(5)
    tensors = {name: change(name, value, generator) for name, value in sorted(disk.read_tensors(base).items())}
    disk.write_safetensors(folder / "model.safetensors", tensors)
    return folder


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def assert_round_trip(arch: str, base: Path, tuned: Path, out: Path, tolerance: float = 2e-6) -> None:
    """Attached = merged by PEFT = merged here = TUNED, and TUNED is not BASE."""
    surgery.merge(base, out, output=out.with_name("merged"))
    wanted = models.run(arch, models.load(arch, tuned))
    assert largest(models.run(arch, models.load(arch, base)) - wanted) > 1e-2
    assert largest(models.run(arch, models.load(arch, out.with_name("merged"))) - wanted) < tolerance
    attached = PeftModel.from_pretrained(models.load(arch, base), str(out)).double().eval()
    assert largest(models.run(arch, attached) - wanted) < tolerance
    assert largest(models.run(arch, attached.merge_and_unload()) - wanted) < tolerance


ARCHS = (
    "llama", "llama_tied", "llama_cls", "qwen2", "gpt2", "gpt2_bare", "opt", "t5", "gpt_neox", "phi3", "mixtral", "mixtral_square",
    "qwen2_moe", "vit", "resnet", "whisper", "bert", "torch_module",
)  # fmt: skip
