# SPDX-License-Identifier: Apache-2.0
"""What vLLM reads: PEFT's stacks for models whose class says ``is_3d_moe_weight``, one LoRA for each expert for others.

It wants all projections of all experts of a layer, or none (vLLM 0.33.0, ``lora/model_manager.py``,
``_stack_moe_lora_weights``; ``lora/lora_weights.py``, ``pack_moe``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.adapters.expert_layers import ExpertLayer
from surgery_formats.adapters.peft.dialects.single import put_single
from surgery_formats.adapters.peft.dialects.stacks import PEFT_STACKS, put_stacks
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.packing import NO_STACKS
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.models.expert_stacks import ExpertRole
from surgery_formats.tensors.tensor import Tensor

__all__ = ["STACKED", "VLLM"]

STACKED = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe")
"""Model types of the classes with ``is_3d_moe_weight``; their text models' types begin alike."""


@dataclass(frozen=True, slots=True)
class _Vllm:
    name: str = "vllm"
    title: str = (
        "vLLM: PEFT's stacks (since 0.19) for gpt-oss, Qwen3.5-MoE, Qwen3-VL-MoE, Qwen3-Omni, InternS1-Pro; "
        "experts one by one under the disk's names for others"
    )
    limits: str = "all projections of all experts, each of one rank: zeros stand for those that were not trained"
    source: str = "vllm 0.33.0 lora/model_manager.py, lora/lora_weights.py, model_executor/models (is_3d_moe_weight)"
    uniform: bool = False

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Stacks without PEFT's ``target_parameters``; all else that it reads has a name of its own."""
        stacked = any(".experts.base_layer.lora_A" in tensor.name for tensor in tensors)
        return stacked and not config.target_parameters

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """As the model's class wants them."""
        stacked = _is_stacked(layer)
        held = layer.fused() if stacked else layer.split()
        wanted: tuple[ExpertRole, ...] = (
            ("gate_up_proj", "down_proj") if stacked else ("gate_proj", "up_proj", "down_proj")
        )
        stacks = {role: held.get(role) or layer.empty(role) for role in wanted}
        if stacked:
            return put_stacks(file, layer, list(stacks.values()))
        trained = next((stack for stack in stacks.values() if stack.loras), None)
        said = [
            put_single(file, stack, {e: layer.single(role, e) for e in range(stack.count)}, complete=True, like=trained)
            for role, stack in stacks.items()
        ]
        return ", ".join(filter(None, said))

    def named(self, module: str) -> str:
        """As it is."""
        return module

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """As PEFT's, so that PEFT reads the stacks too."""
        return PEFT_STACKS.fields(file) if file.experts else NO_STACKS


def _is_stacked(layer: ExpertLayer) -> bool:
    return str(layer.component.config.get("model_type", "")).startswith(STACKED)


VLLM = _Vllm()
