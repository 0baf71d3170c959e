# SPDX-License-Identifier: Apache-2.0
"""A random Llama of a real size in one aligned file, its weights in the order in which a graph packs them; and adapters for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from shapes import LINEAR, Shape

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.contract import Contract
from surgery.onnx.graph.target import OperatorSet
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint

EIGHT_B = Shape(4096, 32, 32, 8, 14336, 128256)
ALIGNMENT = 4096
SCALE = 0.02  # of matrices: after a norm, hidden values of size 1 make logits of size 0.02 * sqrt(hidden), about 1
NUMPY: dict[str, tuple[DType, Any, str]] = {
    "fp16": (DType.F16, np.float16, "float16"),
    "bf16": (DType.BF16, ml_dtypes.bfloat16, "bfloat16"),
}


def write_model(shape: Shape, folder: Path, dtype: str, seed: int = 0) -> None:
    """``model.safetensors`` with q|k|v and gate|up one after the other and every matrix on a page; norms near 1."""
    folder.mkdir(parents=True)
    stored, kind, label = NUMPY[dtype]
    rng = np.random.default_rng(seed)
    pool = memoryview(rng.normal(0, SCALE, (1 << 24) + 7919).astype(np.float32).astype(kind).view(np.uint8))
    norms = (1 + 0.1 * rng.normal(size=shape.hidden)).astype(kind).tobytes()
    tensors = sorted(shape.tensors(), key=lambda one: len(one[1]) == 1)  # vectors last: every matrix stays aligned
    header, _ = layout([(name, stored, size) for name, size in tensors], {"format": "pt"})
    gap = -len(header) % ALIGNMENT
    with open(folder / "model.safetensors", "wb") as file:
        file.write((len(header) - 8 + gap).to_bytes(8, "little") + header[8:] + b" " * gap)
        for position, (_, size) in enumerate(tensors):
            if len(size) == 1:
                file.write(norms)
                continue
            left, at = 2 * int(np.prod(size)), position * 7918 * 2
            while left:
                piece = pool[at : at + left]
                file.write(piece)
                left, at = left - len(piece), 0
    config = shape.config() | {"dtype": label}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def export(
    folder: Path,
    name: str,
    target: OperatorSet,
    dtype: str,
    slots: bool = False,
    shape: Shape | None = None,
    packed: bool = False,
    modules: Sequence[str] = LINEAR,
) -> tuple[Path, Contract]:
    """A graph beside the weights; `modules` have slots."""
    slotted = frozenset(
        f"model.layers.{layer}.{module}.weight" for layer in range(shape.layers if shape else 0) for module in modules
    )
    options = GraphOptions(
        target, NUMPY[dtype][0], prefill=False, slotted=slotted if slots else frozenset(), packed=packed
    )
    built = build(open_checkpoint(folder).main, options)
    path = folder / name
    path.write_bytes(built.graphs["model.onnx"].data)
    return path, built.contract


def write_slots(path: Path, contract: Contract, adapter: Path, dtype: str) -> None:
    """The factors of a PEFT LoRA for a graph's slots: transposed, the scale in B."""
    from safetensors.numpy import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    found = load_file(adapter / "adapter_model.safetensors")
    kind, arrays = NUMPY[dtype][1], {}
    for slot in contract.slots:
        stems = ["base_model.model." + name.removesuffix(".weight") for name in slot.weights]
        A = [found[f"{stem}.lora_A.weight"].T for stem in stems]
        B = [scale * found[f"{stem}.lora_B.weight"].T for stem in stems]
        blocks = np.zeros([sum(one.shape[axis] for one in B) for axis in (0, 1)], np.float32)
        row = column = 0
        for one in B:
            blocks[row : row + one.shape[0], column : column + one.shape[1]] = one
            row, column = row + one.shape[0], column + one.shape[1]
        arrays[slot.A], arrays[slot.B] = np.concatenate(A, 1).astype(kind), blocks.astype(kind)
    path.unlink(missing_ok=True)
    path.write_bytes(adapter_bytes(arrays))


def write_prefix(shape: Shape, folder: Path, tokens: int, seed: int = 1) -> None:
    """A prefix-tuned adapter as PEFT writes it: keys and values of `tokens` virtual tokens in every layer."""
    from safetensors.numpy import save_file

    folder.mkdir()
    width = shape.kv_heads * (shape.hidden // shape.heads)
    values = np.random.default_rng(seed).normal(0, 1, (tokens, 2 * shape.layers * width)).astype(np.float32)
    save_file({"prompt_embeddings": values}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens, "token_dim": width,
        "num_attention_heads": shape.kv_heads, "num_layers": shape.layers, "num_transformer_submodules": 1,
        "prefix_projection": False, "encoder_hidden_size": width, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
