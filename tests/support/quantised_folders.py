# SPDX-License-Identifier: Apache-2.0
"""Models quantised as the formats define it, by plain torch and not by the codecs under test: one encoder per format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Encoder = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bitsandbytes, blocks of 64, scales in float32; the size must be a multiple of 64."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax.clamp(min=1e-38)[:, None])[..., None] - NF4).abs().argmin(-1).reshape(-1)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": raw,
    }


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bitsandbytes LLM.int8: a scale per row."""
    scale = weight.float().abs().amax(1).clamp(min=1e-38)
    codes = (weight.float() * (127 / scale)[:, None]).round().to(torch.int8)
    stem = name.removesuffix(".weight")
    return {name: codes, f"{stem}.SCB": scale, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def _affine(weight: torch.Tensor, size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``(out, in)``, scales and zero points ``(out, groups)``, from the least and the greatest of each group."""
    groups = weight.float().reshape(weight.shape[0], -1, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return codes.reshape(weight.shape).int(), scale, zero.int()


def _packed(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes in int32 words along the last axis, the first in the lowest bits."""
    count = 32 // bits
    words = codes.reshape(*codes.shape[:-1], -1, count).long()
    words = words if order is None else words[..., list(order)]
    packed = (words << (torch.arange(count) * bits)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def gptq(name: str, weight: torch.Tensor, size: int = 32, bits: int = 4) -> dict[str, torch.Tensor]:
    """GPTQ, first version: zero points are stored minus one."""
    codes, scale, zero = _affine(weight, size, bits)
    stem, zero = name.removesuffix(".weight"), zero.clamp(min=1)
    return {
        f"{stem}.qweight": _packed(codes, bits).T,
        f"{stem}.qzeros": _packed(zero.T - 1, bits),
        f"{stem}.scales": scale.T.half(),
        f"{stem}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // size,
    }


def awq(name: str, weight: torch.Tensor, size: int = 32) -> dict[str, torch.Tensor]:
    """AWQ, gemm."""
    codes, scale, zero = _affine(weight, size, 4)
    stem, order = name.removesuffix(".weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{stem}.qweight": _packed(codes.T.contiguous(), 4, order),
        f"{stem}.qzeros": _packed(zero.T.contiguous(), 4, order),
        f"{stem}.scales": scale.T.half(),
    }


def mlx(name: str, weight: torch.Tensor, size: int = 32) -> dict[str, torch.Tensor]:
    """MLX, affine, 4 bits."""
    codes, scale, zero = _affine(weight, size, 4)
    stem, words = name.removesuffix(".weight"), _packed(codes, 4).numpy().view("uint32")
    return {
        name: torch.from_numpy(words),
        f"{stem}.scales": scale.half(),
        f"{stem}.biases": (-zero * scale).half(),
    }


def fp8(name: str, weight: torch.Tensor, size: int = 32) -> dict[str, torch.Tensor]:
    """DeepSeek's blocks, with a scale each."""
    out, inputs = weight.shape
    blocks = weight.float().reshape(out // size, size, inputs // size, size)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(out, inputs).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}


def fp8_tensor(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """ModelOpt's FP8: one scale."""
    scale = weight.float().abs().amax() / 448
    stem = name.removesuffix(".weight")
    return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{stem}.weight_scale": scale}


def packed(name: str, weight: torch.Tensor, size: int = 32) -> dict[str, torch.Tensor]:
    """compressed-tensors, 4 bits, symmetric: a code is stored plus 8."""
    groups = weight.float().reshape(weight.shape[0], -1, size)
    scale = (groups.abs().amax(2) / 7.5).clamp(min=1e-8).half().float()
    codes = (groups / scale[..., None]).round().clamp(-8, 7).reshape(weight.shape).int() + 8
    return {
        f"{name}_packed": _packed(codes, 4),
        f"{name}_scale": scale.half(),
        f"{name}_shape": torch.tensor(weight.shape),
    }


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nvfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' NVFP4: values are divided by the global scale."""
    groups = weight.float().reshape(weight.shape[0], -1, 16)
    whole = 448 * 6 / weight.float().abs().amax()
    scale = (groups.abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    scaled = groups * whole / scale.float().clamp(min=1e-8)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.reshape(weight.shape)
    return {
        f"{name}_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8),
        f"{name}_scale": scale,
        f"{name}_global_scale": whole.reshape(1),
    }


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """What config.json has of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


BNB4: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "nf4": (nf4, BNB4),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "mlx": (mlx, {"bits": 4, "group_size": 32}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "fp8 tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "packed": (
        packed,
        compressed("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=32),
    ),
    "nvfp4": (
        nvfp4,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
}
"""By name: the encoder of a weight, and what config.json has of it."""
KINDS = {
    "nf4": "NF4",
    "int8": "INT8",
    "gptq": "GPTQ4",
    "awq": "AWQ4",
    "mlx": "MLX4",
    "fp8": "FP8 32x32",
    "fp8 tensor": "FP8",
    "packed": "INT4",
    "nvfp4": "NVFP4",
}
"""By name: what reports call a weight of it."""


def quantise_folder(source: Path, folder: Path, format_name: str, parts: tuple[str, ...] = ("_proj",)) -> Path:
    """A copy of a model whose matrices with one of `parts` in their names are stored in a format."""
    encode, config = FORMATS[format_name]
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        coded = tensor.ndim == 2 and any(part in name for part in parts)
        tensors |= encode(name, tensor) if coded else {name: tensor}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    old = json.loads((source / "config.json").read_text())
    key = "quantization" if format_name == "mlx" else "quantization_config"
    (folder / "config.json").write_text(json.dumps({**old, key: config}))
    return folder
