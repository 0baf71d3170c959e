# SPDX-License-Identifier: Apache-2.0
"""vLLM: its model on the CPU, wrapped by ``WorkerLoRAManager``; what lies in the slots of its layers after activation.

Its compiled kernels are not called to load an adapter; they are stood in for. Limits are the engine's defaults.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
import transformers
from loading import Found, Loaded, run
from stubs import stand_in

_ = transformers.AutoProcessor, transformers.utils.is_torchvision_available()  # asked before the stand-ins exist
stand_in("torchvision", "xgrammar", "vllm._C", "vllm._moe_C")

import vllm.model_executor.models.registry as registry
from vllm.config import set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.model_loader import get_model

registry._run_in_subprocess = lambda function: function()  # where there would be no stand-ins
torch.accelerator.empty_cache = lambda: None  # there is none

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def linear(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    parent, leaf = name.rpartition(".")[::2]
    for part, a, b in zip(PARTS.get(leaf, (leaf,)), layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
        yield f"{parent}.{part}".removeprefix(".") + ".weight", b[0, 0] @ a[0, 0]


def experts(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    name = name.removesuffix(".routed_experts")
    down = layer.w2_lora_b_stacked[0][0] @ layer.w2_lora_a_stacked[0][0]
    halves = [b[0] @ a[0] for a, b in zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True)]
    yield f"{name}.gate_up_proj", torch.cat(halves, 1)
    yield f"{name}.down_proj", down


def held(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(layer, "w13_lora_a_stacked"):
        yield from experts(name, layer)
    elif hasattr(layer, "lora_a_stacked_2d"):  # an embedding
        yield f"{name}.weight", layer.lora_a_stacked[0] @ layer.lora_b_stacked[0, 0].T
    elif isinstance(layer.lora_a_stacked, torch.Tensor):  # a head
        yield f"{name}.weight", layer.lora_b_stacked[0, 0] @ layer.lora_a_stacked[0, 0]
    else:
        yield from linear(name, layer)


def opened(base: Path) -> Callable[[Path], Loaded]:
    arguments = EngineArgs(
        model=str(base),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=int(os.environ.get("MAX_LORA_RANK", LoRAConfig.max_lora_rank)),
    )
    config = arguments.create_engine_config()
    context = set_current_vllm_config(config)
    context.__enter__()
    init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
    initialize_model_parallel(1, 1)
    model = get_model(vllm_config=config)
    manager = WorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
    manager.create_lora_manager(model, config)

    def read() -> Found:
        layers = manager._adapter_manager.modules.items()
        found = {f"delta/{key}": delta for name, layer in layers for key, delta in held(name, layer)}
        return {key: delta.float().numpy() for key, delta in found.items() if delta.abs().max() > 0}

    def load(adapter: Path) -> Loaded:
        manager.remove_all_adapters()
        manager.add_adapter(LoRARequest("adapter", 1, str(adapter)))
        manager._adapter_manager.activate_adapter(1)
        return read

    return load


if __name__ == "__main__":
    run(opened, "vllm")
