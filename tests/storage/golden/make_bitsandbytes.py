# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes.safetensors: weights that bitsandbytes encoded, as its layers save them, and what it decodes.

Run with bitsandbytes and torch for the CPU: ``python make_bitsandbytes.py``, or with ``--check`` to compare.

``decoded.X`` is the arithmetic that bitsandbytes defines in torch, and that its kernels for GPUs follow. Its kernels for
CPUs are compared with it where each row is whole blocks: elsewhere those with AVX-512 take scales of other blocks.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("bitsandbytes.safetensors")

U8, BF16, F16, F32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32
FOUR_BIT = {
    # name: (type, nested, block, shape, type before, type that holds the codes)
    "nf4": ("nf4", False, 64, (3, 128), F32, U8),
    "nf4.nested": ("nf4", True, 64, (16, 64), BF16, U8),
    "nf4.nested.many": ("nf4", True, 32, (260, 32), BF16, U8),
    "nf4.crossing": ("nf4", False, 64, (5, 96), F16, U8),
    "nf4.nested.crossing": ("nf4", True, 64, (7, 80), F32, U8),
    "nf4.odd": ("nf4", False, 64, (7, 33), F32, U8),
    "nf4.nested.odd": ("nf4", True, 64, (9, 19), F32, U8),
    "nf4.narrow": ("nf4", False, 64, (70, 3), F32, U8),
    "nf4.wide": ("nf4", False, 64, (2, 200), F32, U8),
    "nf4.block128": ("nf4", False, 128, (3, 256), BF16, U8),
    "nf4.block256": ("nf4", False, 256, (5, 64), F32, U8),
    "nf4.block2048": ("nf4", False, 2048, (3, 700), BF16, U8),
    "nf4.held.bf16": ("nf4", False, 64, (4, 64), BF16, BF16),
    "nf4.nested.held.f32": ("nf4", True, 64, (4, 96), F32, F32),
    "nf4.vector": ("nf4", False, 64, (150,), F32, U8),
    "fp4": ("fp4", False, 64, (3, 128), F32, U8),
    "fp4.nested": ("fp4", True, 64, (12, 64), BF16, U8),
    "fp4.crossing": ("fp4", False, 64, (5, 96), F32, U8),
    "fp4.odd": ("fp4", False, 32, (5, 21), F32, U8),
    "fp4.block512": ("fp4", False, 512, (2, 512), F16, U8),
}
STACKED = {"experts.gate_up_proj": ("nf4", True, 64, (3, 8, 32), F32, U8)}
INT8 = {"int8": (16, 24), "int8.odd": (5, 7), "int8.half": (4, 64)}


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers, a row of which is small, one zero, and one has an outlier."""
    generator = torch.Generator().manual_seed(seed)
    made = 0.02 * torch.randn(shape, generator=generator)
    made[0] *= 1e-3
    if len(shape) > 1:
        made[1] = 0
    made.view(-1)[-1] = 0.5
    return made


def four_bit(name: str, seed: int) -> dict[str, torch.Tensor]:
    quant_type, nested, block, shape, dtype, storage = {**FOUR_BIT, **STACKED}[name]
    weight = values(shape, seed).to(dtype)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    key = name if name in STACKED else f"{name}.weight"
    saved = {f"{key}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = codes.view(U8).reshape(-1)
    decoded = _dequantize_4bit_compute(flat, absmax, state.code, block, (1, weight.numel()), F32).reshape(shape)
    if shape[-1] % block == 0:
        state.dtype = F32
        assert bnb.dequantize_4bit(codes, state).equal(decoded), name
    before = {} if weight.numel() > 8000 else {f"given.{key}": weight}  # a second level of two scales takes that many
    return {key: codes, **saved, **before, f"decoded.{key}": decoded}


def layer(name: str, made: torch.nn.Module, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    made.load_state_dict({"weight": weight})
    state = made.to("cpu").state_dict()
    return {f"{name}.{part}": tensor.clone() for part, tensor in state.items()}


def build() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for seed, name in enumerate([*FOUR_BIT, *STACKED]):
        made |= four_bit(name, seed)
    for seed, (name, shape) in enumerate(INT8.items(), 100):
        weight = values(shape, seed).to(F16)
        made |= layer(name, Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False), weight)
        decoded = bnb.int8_vectorwise_dequant(made[f"{name}.weight"], made[f"{name}.SCB"])
        made |= {f"given.{name}.weight": weight, f"decoded.{name}.weight": decoded}
    linear = Linear4bit(64, 4, bias=False, compress_statistics=False, quant_type="nf4")
    key, saved = "nf4.weight", layer("layer", linear, values((4, 64), 7))
    same, _ = bnb.quantize_4bit(values((4, 64), 7), quant_type="nf4")
    assert saved["layer.weight"].equal(same)
    named = {part.removeprefix("layer.weight") for part in saved}
    assert named == {part.removeprefix(key) for part in made if part.startswith(key)}, named
    return made


def main() -> None:
    made = build()
    versions = {name: version(name) for name in ("bitsandbytes", "torch")}
    if "--check" in sys.argv:
        before = load_file(GOLDEN)
        assert set(before) == set(made), set(before) ^ set(made)
        for name, tensor in made.items():
            same = before[name].dtype is tensor.dtype and before[name].view(U8).equal(tensor.contiguous().view(U8))
            assert same or (tensor.dim() == 0 and tensor.equal(before[name])), name
        print("the same", versions)
    else:
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, GOLDEN, versions)
        print(GOLDEN.stat().st_size, "bytes", versions)


if __name__ == "__main__":
    main()
