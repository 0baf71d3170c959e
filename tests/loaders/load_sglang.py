# SPDX-License-Identifier: Apache-2.0
"""SGLang: its model on the CPU, and a ``LoRAManager`` started with the adapter as ``--lora-paths`` starts one; its memory pool.

Its kernels are not called to load an adapter; they are stood in for. Limits follow the adapter, as they do at a start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from loading import Found, Loaded, run
from stubs import stand_in

_ = transformers.AutoProcessor, transformers.utils.is_torchvision_available()  # asked before the stand-ins exist
stand_in("torchvision", "xgrammar", "soundfile", "librosa", "sgl_kernel", "flashinfer", "cuda", "vllm")

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.model_loader import get_model
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Without an accelerator there is no pinned memory."""
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


torch.tensor, torch.empty, torch.zeros = unpinned(torch.tensor), unpinned(torch.empty), unpinned(torch.zeros)
torch.Tensor.pin_memory = lambda tensor, *args: tensor
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
BLOCKS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


def dense(module: str, layer: int, a: torch.Tensor, b: torch.Tensor, rows: list[int]) -> Iterator[tuple[str, Any]]:
    """What the kernels compute: each part of a fused projection with its own rows of A."""
    parts = PARTS.get(module, (module,))
    rank, begin = a.shape[0] // len(parts), 0
    for index, (part, count) in enumerate(zip(parts, rows, strict=True)):
        piece = b[begin : begin + count, :rank] @ a[index * rank : (index + 1) * rank]
        yield f"model.layers.{layer}.{BLOCKS[module]}.{part}.weight", piece
        begin += count


def experts(layer: int, module: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """A (experts, parts rank, in), B (experts, out, rank)."""
    name, rank = f"model.layers.{layer}.mlp.experts.{module}", b.shape[-1]
    parts = b.split(b.shape[1] // 2, 1) if module == "gate_up_proj" else (b,)
    yield name, torch.cat([part @ a[:, i * rank : (i + 1) * rank] for i, part in enumerate(parts)], 1)


def held(manager: LoRAManager, uid: str, rows: dict[str, list[int]]) -> Found:
    """What lies in the slot of an adapter."""
    pool, scale, found = manager.memory_pool, manager.loras[uid].scaling, {}
    slot, applied = pool.get_buffer_id(uid), {}
    for module, layers in pool.A_buffer.items():
        for layer, buffer in enumerate(layers):
            a, b = buffer[slot], pool.B_buffer[module][layer][slot]
            if module.endswith("_moe"):
                applied.update(experts(layer, module.removesuffix("_moe"), a, b))  # B has the scale in it
            elif module in BLOCKS:
                found.update(dense(module, layer, a, b, rows.get(module, [b.shape[0]])))
    for module, a in pool.embedding_A_buffer.items():
        found[f"model.{module}.weight"] = (pool.embedding_B_buffer[module][slot] @ a[slot]).T
    for module, a in pool.lm_head_A_buffer.items():
        found[f"{module}.weight"] = pool.lm_head_B_buffer[module][slot] @ a[slot]
    found = {name: scale * delta for name, delta in found.items()} | applied
    return {f"delta/{name}": delta.float().numpy() for name, delta in found.items() if delta.abs().max() > 0}


def opened(base: Path) -> Callable[[Path], Loaded]:
    arguments = ServerArgs(
        model_path=str(base), device="cpu", dtype="float32", enable_lora=True, skip_tokenizer_init=True
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(0))
    init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
    initialize_model_parallel()
    config = ModelConfig.from_server_args(arguments)
    loading = LoadConfig()
    sizes = config.hf_config
    q, kv = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    rows = {"qkv_proj": [q, kv, kv], "gate_up_proj": [sizes.intermediate_size] * 2}

    def load(adapter: Path) -> Loaded:
        model = get_model(model_config=config, load_config=loading, device_config=DeviceConfig("cpu"))
        manager = LoRAManager(
            base_model=model,
            base_hf_config=config.hf_config,
            max_loras_per_batch=2,
            load_config=loading,
            dtype=torch.float32,
            server_args=arguments,
            lora_backend="torch_native",
            lora_paths=[LoRARef(lora_name="adapter", lora_path=str(adapter), pinned=False)],
        )
        (uid,) = manager.loras
        manager.fetch_new_loras({uid})
        return lambda: held(manager, uid, rows)

    return load


if __name__ == "__main__":
    run(opened, "sglang")
