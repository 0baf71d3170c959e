# SPDX-License-Identifier: Apache-2.0
"""torchao.safetensors: layers that torchao quantised, flattened as transformers saves them, and what it decodes.

Run with torchao and torch for the CPU: ``python make_torchao.py``, or with ``--check`` to compare. Classes that a CPU
does not make are told in the metadata alone: their tensors are only there to be refused.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerBlock, PerGroup, PerTensor
from torchao.quantization.quant_primitives import dequantize_affine
from torchao.quantization.quantize_.workflows.int4 import int4_tensor

GOLDEN = Path(__file__).with_name("torchao.safetensors")
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
E5M2 = torch.float8_e5m2


def intx(bits: int, group: int, asymmetric: bool = False) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
    )


CONFIGS = {
    "int8": (Int8WeightOnlyConfig(), (12, 40), BF16),
    "int8.float32": (Int8WeightOnlyConfig(), (7, 33), F32),
    "int8.tensor": (Int8WeightOnlyConfig(granularity=PerTensor()), (6, 32), BF16),
    "float8": (Float8WeightOnlyConfig(), (12, 40), BF16),
    "float8.e5m2": (Float8WeightOnlyConfig(weight_dtype=E5M2), (5, 21), F16),
    "intx4": (intx(4, 32), (9, 96), BF16),
    "intx4.asymmetric": (intx(4, 32, True), (9, 96), F32),
    "intx3": (intx(3, 0), (6, 48), BF16),
    **{f"intx{bits}": (intx(bits, 16), (4, 32), F32) for bits in (1, 2, 5, 6, 7, 8)},
    "nvfp4": (NVFP4WeightOnlyConfig(), (16, 64), BF16),
}


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Int4Tensor):
        low = (tensor.qdata << 4) >> 4
        codes = torch.stack([low, tensor.qdata >> 4], dim=2).reshape(tensor.shape[0], -1, tensor.block_size[1])
        scale, zero = (each.float().T[:, :, None] for each in (tensor.scale, tensor.zero_point))
        return (codes * scale + zero).reshape(tensor.shape)
    if isinstance(tensor, IntxUnpackedToInt8Tensor):  # whose own method rounds to the type that it had
        return dequantize_affine(
            tensor.qdata, tensor.block_size, tensor.scale, tensor.zero_point, torch.int8, output_dtype=F32
        )
    return tensor.dequantize(output_dtype=F32)


def int4_row_quantize_zp(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """As FBGEMM defines it, from where torchao's MSLK has it; no package index has that."""
    grouped = weight.float().reshape(len(weight), -1, size)
    least = grouped.amin(2)
    scale = (grouped.amax(2) - least).clamp(min=1e-6) / 15
    codes = ((grouped - least[:, :, None]) / scale[:, :, None]).round().clamp(0, 15) - 8
    return codes.reshape(weight.shape).to(torch.int8), scale.T.contiguous(), (least + 8 * scale).T.contiguous()


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)


def int4(weight: torch.Tensor, size: int) -> Int4Tensor:
    int4_tensor.int4_row_quantize_zp, int4_tensor.pack_int4 = int4_row_quantize_zp, pack_int4
    return Int4Tensor.from_hp(weight, [1, size])


def build() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    state, given = {}, {}
    for seed, (name, (config, shape, dtype)) in enumerate(CONFIGS.items()):
        module = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
        module[0].weight.data = values(shape, seed).to(dtype)
        given[f"given.{name}.weight"] = module[0].weight.data
        quantize_(module, config)
        state[f"{name}.weight"] = module[0].weight.data
    stack = values((2, 8, 32), 99)
    state["experts.gate_up_proj"] = Int8Tensor.from_hp(stack, PerBlock([1, 1, 32]))
    given["given.experts.gate_up_proj"] = stack
    blocks = values((32, 64), 98)
    state["float8.blocks.weight"] = Float8Tensor.from_hp(blocks, granularity=PerBlock([16, 32]))
    given["given.float8.blocks.weight"] = blocks
    for name, shape, dtype in (
        ("int4", (6, 128), BF16),
        ("int4.float16", (5, 96), F16),
        ("int4.float32", (3, 32), F32),
    ):
        weight = values(shape, len(name)).to(dtype)
        state[f"{name}.weight"], given[f"given.{name}.weight"] = int4(weight, 32), weight
    flat, metadata = flatten_tensor_state_dict(state)
    decoded = {f"decoded.{name}": in_float32(tensor) for name, tensor in state.items() if name != "nvfp4.weight"}
    return {**flat, **given, **decoded}, metadata


def main() -> None:
    made, metadata = build()
    versions = {name: version(name) for name in ("torchao", "torch")}
    if "--check" in sys.argv:
        before = load_file(GOLDEN)
        assert set(before) == set(made), set(before) ^ set(made)
        for name, tensor in made.items():
            assert before[name].dtype is tensor.dtype, name
            assert before[name].shape == tensor.shape, name
            assert before[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
        with safe_open(GOLDEN, "pt") as file:
            assert all(json.loads(file.metadata()[key]) == json.loads(value) for key, value in metadata.items())
        print("the same", versions)
    else:
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, GOLDEN, {**metadata, **versions})
        print(GOLDEN.stat().st_size, "bytes", versions)


if __name__ == "__main__":
    main()
