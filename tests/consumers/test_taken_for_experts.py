# SPDX-License-Identifier: Apache-2.0
"""LoRAs of dense layers and shared experts, which PEFT takes for experts of an older release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.numpy import load_file

import surgery
from tests.support import expert_models
from tests.support.adapter_files import draw, write_peft
from tests.support.attached import quiet

DENSE, SHARED = "layers.0.mlp", "layers.1.mlp.shared_experts"


def _adapter(folder: Path, base: Path, owner: str, leaves: list[str]) -> Path:
    """A LoRA as PEFT before 0.19 saved it."""
    sizes = {name: array.shape for name, array in load_file(base / "model.safetensors").items()}
    tensors = {}
    for seed, leaf in enumerate(leaves):
        rows, columns = sizes[f"model.{owner}.{leaf}.weight"]
        key = f"base_model.model.model.{owner}.{leaf}"
        tensors |= {f"{key}.lora_A.weight": draw(seed, 2, columns), f"{key}.lora_B.weight": draw(seed + 9, rows, 2)}
    return write_peft(folder, tensors, target_modules=leaves)


def _attached(base: Path, adapter: Path) -> torch.Tensor:
    with quiet():
        model = expert_models.load("deepseek_v3", base)
        return expert_models.logits(peft.PeftModel.from_pretrained(model, str(adapter)).eval())


@pytest.mark.parametrize("owner", [DENSE, SHARED])
@pytest.mark.parametrize("leaves", [["gate_proj", "up_proj", "down_proj"], ["down_proj"], ["gate_proj"]])
@pytest.mark.parametrize("program", ["peft", "transformers"])
def test_peft_honours_them_once_they_are_written_as_parameters(
    tmp_path: Path, owner: str, leaves: list[str], program: str
) -> None:
    base = expert_models.build("deepseek_v3", tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", base, owner, leaves)
    (before,) = surgery.check(base, adapter, consumer=program, fix=tmp_path / "fixed").consumers
    surgery.merge(base, [adapter], output=tmp_path / "merged")
    own = expert_models.logits(expert_models.load("deepseek_v3", base))
    merged = expert_models.logits(expert_models.load("deepseek_v3", tmp_path / "merged"))
    assert before.outcome == ("refused" if leaves == ["gate_proj"] else "ignored")
    if before.outcome == "refused":
        with pytest.raises(ValueError, match="without also targeting up_proj"):
            _attached(base, adapter)
    else:
        assert torch.equal(_attached(base, adapter), own)
    assert (merged - own).abs().max() > 1e-3
    torch.testing.assert_close(_attached(base, tmp_path / "fixed"), merged, rtol=0, atol=1e-5)


def test_other_programs_take_them_as_they_are(tmp_path: Path) -> None:
    base = expert_models.build("deepseek_v3", tmp_path / "base")
    adapter = _adapter(tmp_path / "adapter", base, DENSE, ["gate_proj", "up_proj", "down_proj"])
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert (found["vllm"], found["llama.cpp"]) == ("honoured", "honoured")


OLD = [f"layers.1.mlp.experts.{expert}" for expert in range(4)]
ALL = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("owners", "leaves", "config", "honoured"),
    [
        (OLD, ALL, {}, True),
        (OLD, ALL, {"alpha_pattern": {"down_proj": 1}}, True),
        (OLD, ["down_proj"], {}, True),
        (OLD, ALL, {"use_rslora": True}, False),
        (OLD, ["gate_proj", "up_proj"], {}, False),
        (OLD[:3], ALL, {}, False),
    ],
)
def test_experts_of_an_older_release_are_honoured_where_peft_stacks_them(
    tmp_path: Path, owners: list[str], leaves: list[str], config: dict[str, Any], honoured: bool
) -> None:
    base = expert_models.build("deepseek_v3", tmp_path / "base")
    tensors: dict[str, Any] = {}
    for owner in owners:
        _adapter(tmp_path / "adapter", base, owner, leaves)
        tensors |= load_file(tmp_path / "adapter/adapter_model.safetensors")
    adapter = write_peft(tmp_path / "adapter", tensors, target_modules=leaves, **config)
    surgery.merge(base, [adapter], output=tmp_path / "merged")
    merged = expert_models.logits(expert_models.load("deepseek_v3", tmp_path / "merged"))
    for program in ("peft", "transformers"):
        assert surgery.check(base, adapter, consumer=program).honoured == honoured
    try:
        right = bool((_attached(base, adapter) - merged).abs().max() < 1e-5)
    except RuntimeError:  # of sizes, where an expert is missing
        right = False
    assert right == honoured
