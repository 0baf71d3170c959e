# SPDX-License-Identifier: Apache-2.0
"""hqq.safetensors: layers that hqq encoded and saved, and what it decodes in float32 and in its own float16.

Run with hqq and torch for the CPU: ``python make_hqq.py``, or with ``--check`` to compare.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("hqq.safetensors")

CASES = {
    # name: (bits, group, axis, shape, type, codes held as floats)
    **{
        f"bits{bits}.axis{axis}": (bits, 32, axis, (16, 64), torch.float16, False)
        for bits in (8, 4, 3, 2, 1)
        for axis in (0, 1)
    },
    "bits6": (6, 16, 1, (8, 32), torch.float16, False),
    "bits5": (5, 16, 0, (16, 20), torch.float16, False),
    "bits1.58": (1.58, 32, 1, (16, 32), torch.float16, False),
    "bfloat16": (4, 64, 1, (16, 128), torch.bfloat16, False),
    "float32": (2, 16, 1, (16, 48), torch.float32, False),
    "crossing": (4, 64, 1, (16, 40), torch.float16, False),
    "crossing3": (3, 16, 1, (6, 24), torch.float16, False),
    "crossing8": (8, 16, 1, (6, 24), torch.float16, False),
    "uneven": (4, 16, 0, (10, 24), torch.float16, False),
    "uneven3": (3, 24, 0, (9, 24), torch.float16, False),
    "held": (4, 32, 1, (16, 64), torch.float16, True),
    "held.bfloat16": (2, 32, 0, (16, 64), torch.bfloat16, True),
}


def build() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for seed, (name, (bits, group, axis, shape, dtype, held)) in enumerate(CASES.items()):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        linear.weight.data = values.half().float()
        if ".axis" in name:
            made[f"given.{name}.weight"] = values.half()
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=held)
        layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        made |= {f"{name}.{key}": value.data.clone() for key, value in layer.state_dict().items() if value is not None}
        wide = {key: value.float() if key in ("scale", "zero") else value for key, value in layer.meta.items()}
        made[f"decoded.{name}.weight"] = Quantizer.dequantize(layer.W_q.data, {**wide, "compute_dtype": torch.float32})
        if dtype is torch.float16 and seed < 2:
            made[f"half.{name}.weight"] = layer.dequantize()
    return made


def main() -> None:
    made = build()
    versions = {name: version(name) for name in ("hqq", "torch")}
    if "--check" in sys.argv:
        before = load_file(GOLDEN)
        assert set(before) == set(made), set(before) ^ set(made)
        for name, tensor in made.items():
            assert before[name].dtype is tensor.dtype, name
            assert before[name].shape == tensor.shape, name
            assert before[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
        print("the same", versions)
    else:
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, GOLDEN, versions)
        print(GOLDEN.stat().st_size, "bytes", versions)


if __name__ == "__main__":
    main()
