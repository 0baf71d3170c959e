# SPDX-License-Identifier: Apache-2.0
"""nvfp4.safetensors: weights that ModelOpt encodes as NVFP4, as its export names them, and what it decodes.

Run with nvidia-modelopt and torch for the CPU: ``python make_nvfp4.py``, or with ``--check`` to compare.
"""

from __future__ import annotations

from pathlib import Path

import torch
from golden_cases import Case, write_or_check
from modelopt.torch.export.quant_utils import maybe_transpose_expert_weight_dimensions, to_quantized_weight
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

GOLDEN = Path(__file__).with_name("nvfp4.safetensors")
TOLD = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {"group_0": {"weights": {"group_size": 16}}},
}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers; a row of small ones, one of zeros, and an outlier."""
    made = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[..., 0, :] *= 1e-3
    made[..., 1, :] = 0
    made.view(-1)[-1] = 0.5
    return made


def encoded(weight: torch.Tensor, overall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and what they stand for."""
    beside = overall.view(-1, 1, 1) if overall.dim() else overall
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, beside)
    codes = to_quantized_weight(weight.clone(), scale, "nvfp4", overall, 16)
    tensor = NVFP4QTensor(weight.shape, torch.float32, codes)
    return codes, scale, tensor.dequantize(torch.float32, scale=scale, double_scale=beside, block_sizes={-1: 16})


def linear(*shape: int, seed: int = 0) -> Case:
    weight = values(*shape, seed=seed)
    overall = NVFP4QTensor.get_weights_scaling_factor_2(weight)
    codes, scale, decoded = encoded(weight, overall)
    stored = {"weight": codes, "weight_scale": scale, "weight_scale_2": overall, "input_scale": torch.tensor(0.01)}
    return Case({f"layer.{name}": tensor for name, tensor in stored.items()}, {"layer.weight": decoded}, TOLD)


def experts(each: bool) -> Case:
    """Of Llama 4: ``(experts, in, out)``, packed along the inputs; with a scale for all, or one an expert."""
    weight = values(3, 32, 8)
    turned, _ = maybe_transpose_expert_weight_dimensions(weight)
    amax = turned.abs().amax((1, 2)) if each else turned.abs().max()
    codes, scale, decoded = encoded(turned, amax / (6 * 448))
    codes, scale = maybe_transpose_expert_weight_dimensions(codes, scale)
    stored = {
        "": codes,
        "_weight_scale": scale,
        "_weight_scale_2": amax / (6 * 448),
        "_input_scale": torch.tensor(0.01),
    }
    name = "experts.gate_up_proj"
    return Case({name + part: tensor for part, tensor in stored.items()}, {name: decoded.mT}, TOLD)


def stacked() -> Case:
    """Experts as most models have them, ``(experts, out, in)``."""
    weight = values(2, 8, 48)
    overall = NVFP4QTensor.get_weights_scaling_factor_2(weight)
    codes, scale, decoded = encoded(weight, overall)
    name = "experts.down_proj"
    return Case({name: codes, f"{name}_weight_scale": scale, f"{name}_weight_scale_2": overall}, {name: decoded}, TOLD)


if __name__ == "__main__":
    cases = {
        "linear": linear(32, 64),
        "odd rows": linear(7, 48, seed=1),
        "one group": linear(5, 16, seed=2),
        "experts": experts(each=False),
        "experts each": experts(each=True),
        "stacked": stacked(),
    }
    write_or_check(GOLDEN, cases, ("torch", "nvidia-modelopt"))
