# SPDX-License-Identifier: Apache-2.0
"""mlx.safetensors: weights that MLX and transformers' "metal" encoded, and what they decode.

Run with mlx (for the CPU), torch and transformers: ``python make_mlx.py``, or with ``--check`` to compare.

``decoded.X.weight`` is what MLX computes from the scales and biases in float32; in their own type of 16 bits it rounds
the product, and then the sum: ``rounded.X.weight`` is that, and ``given.X.weight`` what was encoded.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

GOLDEN = Path(__file__).with_name("mlx.safetensors")
mx.set_default_device(mx.cpu)

MLX = {
    # name: (bits, group, shape, type)
    **{f"bits.{bits}": (bits, 32, (6, 64), mx.bfloat16) for bits in (2, 3, 4, 5, 6, 8)},
    "group.64": (4, 64, (5, 192), mx.float16),
    "group.128": (3, 128, (4, 256), mx.float16),
    "float32": (4, 32, (6, 96), mx.float32),
    "float32.8": (8, 64, (4, 128), mx.float32),
    "experts": (4, 32, (3, 4, 64), mx.bfloat16),
    "experts.6": (6, 64, (2, 3, 128), mx.float16),
}
FLOATS = {
    # name: (mode, shape)
    "mxfp4": ("mxfp4", (6, 96)),
    "mxfp4.experts": ("mxfp4", (2, 3, 64)),
    "mxfp8": ("mxfp8", (5, 64)),
    "nvfp4": ("nvfp4", (6, 48)),
    "nvfp4.experts": ("nvfp4", (3, 2, 32)),
}
METAL = {"metal.2": (2, 32, (6, 64)), "metal.4": (4, 64, (5, 128)), "metal.8": (8, 32, (4, 64))}


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows of normal numbers; the first is 0, the next two have one sign."""
    made = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    rows = made.reshape(-1, shape[-1])
    rows[0] = 0
    rows[1], rows[2] = abs(rows[1]) + 0.01, -abs(rows[2])
    rows[3, 7] = 0.5
    return made


def as_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def by_mlx(name: str, seed: int) -> dict[str, torch.Tensor]:
    bits, size, shape, dtype = MLX[name]
    words, scales, biases = mx.quantize(mx.array(values(shape, seed)).astype(dtype), group_size=size, bits=bits)
    wide = [each.astype(mx.float32) for each in (scales, biases)]
    decoded = mx.dequantize(words, *wide, group_size=size, bits=bits)
    rounded = mx.dequantize(words, scales, biases, group_size=size, bits=bits)
    made = {"weight": words, "scales": scales, "biases": biases}
    own = {f"{name}.{part}": as_torch(each) for part, each in made.items()}
    own[f"given.{name}.weight"] = as_torch(mx.array(values(shape, seed)).astype(dtype))
    return {**own, f"decoded.{name}.weight": as_torch(decoded), f"rounded.{name}.weight": as_torch(rounded)}


def by_mlx_floats(name: str, seed: int) -> dict[str, torch.Tensor]:
    mode, shape = FLOATS[name]
    words, scales = mx.quantize(mx.array(values(shape, seed)), mode=mode)
    decoded = mx.dequantize(words, scales, mode=mode, dtype=mx.float32)
    own = {f"{name}.weight": as_torch(words), f"{name}.scales": as_torch(scales)}
    return {**own, f"decoded.{name}.weight": as_torch(decoded)}


def by_metal(name: str, seed: int) -> dict[str, torch.Tensor]:
    bits, size, shape = METAL[name]
    weight = torch.from_numpy(values(shape, seed))
    words, scales, biases = _affine_quantize_tensor(weight, size, bits)
    scales, biases = scales.to(torch.bfloat16), biases.to(torch.bfloat16)
    decoded = _affine_dequantize_tensor(words, scales, biases, size, bits).float()
    own = {"weight": words, "scales": scales, "qbiases": biases, "decoded": decoded}
    return {(f"decoded.{name}.weight" if part == "decoded" else f"{name}.{part}"): each for part, each in own.items()}


def build() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for table, build_one in ((MLX, by_mlx), (FLOATS, by_mlx_floats), (METAL, by_metal)):
        for seed, name in enumerate(table):
            made |= build_one(name, seed)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def main() -> None:
    made = build()
    versions = {name: version(name) for name in ("mlx", "transformers", "torch")}
    if "--check" in sys.argv:
        before = load_file(GOLDEN)
        assert set(before) == set(made), set(before) ^ set(made)
        for name, tensor in made.items():
            assert before[name].dtype is tensor.dtype, name
            assert before[name].equal(tensor), name
        print("the same", versions)
    else:
        save_file(made, GOLDEN, versions)
        print(GOLDEN.stat().st_size, "bytes", versions)


if __name__ == "__main__":
    main()
