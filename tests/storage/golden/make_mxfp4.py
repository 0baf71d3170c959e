# SPDX-License-Identifier: Apache-2.0
"""mxfp4.safetensors: weights in MXFP4 that ModelOpt encodes, laid out as gpt-oss and as linear layers, and what is decoded.

Run with nvidia-modelopt, transformers and torch for the CPU: ``python make_mxfp4.py``, or with ``--check`` to compare.
Experts of gpt-oss are decoded by transformers, and so are layers as DeepSeek V4 has them; others by ModelOpt.
"""

from __future__ import annotations

from pathlib import Path

import torch
from golden_cases import Case, write_or_check
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GOLDEN = Path(__file__).with_name("mxfp4.safetensors")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers; a row of small ones, one of zeros, and an outlier."""
    made = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[..., 0, :] *= 1e-3
    made[..., 1, :] = 0
    made.view(-1)[-1] = 0.5
    return made


def encoded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, exponents = MXFP4QTensor.quantize(weight.clone(), 32)
    return codes._quantized_data, exponents.reshape(*weight.shape[:-1], -1)


def gpt_oss() -> Case:
    stored, decoded = {}, {}
    for name, weight in {"gate_up_proj": values(3, 16, 64), "down_proj": values(3, 8, 32, seed=1)}.items():
        codes, exponents = encoded(weight)
        key = f"model.layers.0.mlp.experts.{name}"
        blocks = codes.reshape(*exponents.shape, 16)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": exponents}
        decoded[key] = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    return Case(stored, decoded, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def linear(*shape: int) -> Case:
    weight = values(*shape)
    codes, exponents = encoded(weight)
    tensor = MXFP4QTensor(weight.shape, torch.float32, codes)
    decoded = tensor.dequantize(torch.float32, scale=exponents.reshape(-1), block_sizes={-1: 32})
    return Case(
        {"layer.weight": codes, "layer.weight_scale": exponents}, {"layer.weight": decoded}, {"quant_method": "quark"}
    )


def deepseek() -> Case:
    codes, exponents = encoded(values(6, 64))
    codes, scale = codes.view(torch.int8), exponents.view(torch.float8_e8m0fnu)
    decoded = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
    told = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    return Case({"layer.weight": codes, "layer.scale": scale}, {"layer.weight": decoded}, told)


if __name__ == "__main__":
    cases = {"gpt-oss": gpt_oss(), "linear": linear(12, 96), "one group": linear(5, 32), "deepseek": deepseek()}
    write_or_check(GOLDEN, cases, ("torch", "transformers", "nvidia-modelopt"))
