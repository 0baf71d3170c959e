# SPDX-License-Identifier: Apache-2.0
"""fp8.safetensors: weights in fp8 as transformers, ModelOpt and ComfyUI's kernels make them, and what these decode.

Run with those packages and torch for the CPU: ``python make_fp8.py``, or with ``--check`` to compare. FBGEMM needs a GPU:
its kernel for rows is replaced by the same arithmetic in torch, its layout is what transformers makes of that.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import comfy_kitchen.tensor.fp8 as comfy
import torch
import transformers.integrations.fbgemm_fp8 as fbgemm
from golden_cases import Case, write_or_check
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight

GOLDEN = Path(__file__).with_name("fp8.safetensors")
E4M3, E5M2, F32, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers; a row of small ones, one of zeros, and an outlier."""
    made = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[..., 0, :] *= 1e-3
    made[..., 1, :] = 0
    made.view(-1)[-1] = 0.5
    return made


def fine_grained(name: str, weight: torch.Tensor, block: tuple[int, int] | None, scale_fmt: str = "float") -> Case:
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=config)
    stored = Fp8Quantize(quantizer).convert({name: weight})
    scale = next(tensor for key, tensor in stored.items() if key.endswith("_scale_inv"))
    decoded = Fp8Dequantize(quantizer)._dequantize_one(stored[name], scale, output_dtype=F32)
    told = {"quant_method": "fp8", "weight_block_size": block, "scale_fmt": scale_fmt, "activation_scheme": "dynamic"}
    return Case(stored, {name: decoded}, told)


def uneven(shape: tuple[int, int], block: tuple[int, int]) -> Case:
    """Blocks that do not divide the weight, as in DeepSeek V3, read as the layer's own backward pass reads them."""
    rows, columns = block
    grid = -(-shape[0] // rows), -(-shape[1] // columns)
    padded = torch.zeros(grid[0] * rows, grid[1] * columns)
    padded[: shape[0], : shape[1]] = values(*shape)
    blocks = padded.reshape(grid[0], rows, grid[1], columns)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[: shape[0], : shape[1]].to(E4M3)
    decoded = _dequantize_fp8_weight(codes, scales, list(block), F32)
    stored = {"layer.weight": codes, "layer.weight_scale_inv": scales}
    return Case(stored, {"layer.weight": decoded}, {"quant_method": "fp8", "weight_block_size": block})


def mistral() -> Case:
    """Scales of the tensor in bfloat16, and one of the inputs."""
    weight = values(6, 20)
    scale = (weight.abs().max() / 448).to(BF16)
    codes = (weight / scale.float()).clamp(-448, 448).to(E4M3)
    decoded = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=F32)
    stored = {
        "layer.weight": codes,
        "layer.weight_scale_inv": scale,
        "layer.activation_scale": torch.tensor(0.5).to(BF16),
    }
    return Case(stored, {"layer.weight": decoded}, {"quant_method": "fp8", "weight_block_size": None})


def modelopt(axis: int | None) -> Case:
    weight = values(6, 20)
    weight[1] = 0.01  # a row of zeros has the scale 0, and codes that are no numbers
    codes, scale = FP8QTensor.quantize(weight, axis=axis)
    decoded = codes.dequantize(F32, scale=scale)
    stored = {
        "layer.weight": codes._quantized_data,
        "layer.weight_scale": scale.squeeze(),
        "layer.input_scale": torch.tensor(0.5),
    }
    return Case(stored, {"layer.weight": decoded}, {"quant_method": "modelopt", "quant_algo": "FP8"})


def scaled(dtype: torch.dtype, names: tuple[str, str]) -> Case:
    """``fp8_scaled``: the marker, and scales of weights and inputs in either spelling."""
    weight = values(6, 20)
    codes, params = comfy.TensorCoreFP8Layout.quantize(weight, dtype=dtype)
    decoded = comfy.TensorCoreFP8Layout.dequantize(codes, params)
    stored = {"layer.weight": codes, f"layer.{names[0]}": params.scale, f"layer.{names[1]}": torch.tensor(1.0)}
    return Case({"scaled_fp8": torch.empty(0, dtype=dtype), **stored}, {"layer.weight": decoded})


def plain(dtype: torch.dtype) -> Case:
    stored = {"layer.weight": values(6, 20).to(dtype), "layer.bias": values(2, 10).reshape(-1).to(dtype)}
    return Case(stored, {name: tensor.float() for name, tensor in stored.items()})


def rows_of_fbgemm() -> Case:
    def quantize_fp8_per_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (weight.abs().amax(1) / 448).clamp(min=1e-9)
        return (weight / scale[:, None]).clamp(-448, 448).to(E4M3), scale

    fbgemm.quantize_fp8_per_row = quantize_fp8_per_row
    sizes = SimpleNamespace(num_local_experts=3, intermediate_size=8, hidden_size=8, hidden_act="silu")
    model = torch.nn.ModuleDict({"experts": fbgemm.FbgemmFp8Llama4TextExperts(sizes), "layer": torch.nn.Linear(20, 6)})
    stored: dict[str, torch.Tensor] = {}
    weights = {
        "experts.gate_up_proj": values(3, 8, 16),
        "experts.down_proj": values(3, 8, 8, seed=1),
        "layer.weight": values(6, 20),
    }
    for name, weight in weights.items():
        stored |= fbgemm.FbgemmFp8Quantize(None).convert({name: [copy.deepcopy(weight)]}, model=model)
    stored = {name: tensor.detach().clone() for name, tensor in stored.items()}
    scales = {name: stored[f"{name}_scale"] for name in weights}
    scales["experts.down_proj"] = scales["experts.down_proj"].mT  # a scale for every output, which are its columns
    decoded = {name: stored[name].float() * scales[name] for name in weights}
    assert all((decoded[name] - weight).abs().max() < 0.02 for name, weight in weights.items())
    return Case(stored, decoded, {"quant_method": "fbgemm_fp8"})


if __name__ == "__main__":
    cases = {
        "block": fine_grained("layer.weight", values(32, 48), (16, 16)),
        "block of rows": fine_grained("layer.weight", values(12, 40), (4, 20)),
        "tensor": fine_grained("layer.weight", values(7, 33), None),
        "powers of two": fine_grained("layer.weight", values(32, 48), (16, 16), "ue8m0"),
        "experts": fine_grained("experts.gate_up_proj", values(3, 32, 16), (16, 16)),
        "uneven": uneven((100, 72), (32, 32)),
        "576 rows": uneven((72, 16), (16, 16)),
        "mistral": mistral(),
        "modelopt": modelopt(None),
        "modelopt rows": modelopt(0),
        "comfy": scaled(E4M3, ("scale_weight", "scale_input")),
        "comfy e5m2": scaled(E5M2, ("weight_scale", "input_scale")),
        "fbgemm": rows_of_fbgemm(),
        **{
            str(dtype).partition("_")[2]: plain(dtype)
            for dtype in (E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
        },
    }
    write_or_check(GOLDEN, cases, ("torch", "transformers", "nvidia-modelopt", "comfy-kitchen"))
