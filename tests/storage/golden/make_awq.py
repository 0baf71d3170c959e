# SPDX-License-Identifier: Apache-2.0
"""awq.safetensors: weights that autoawq and auto-round encoded, as their layers save them, and what these stand for.

Run with both and torch for the CPU: ``python make_awq.py``, or with ``--check`` to compare.

``decoded.X.weight`` of gemm is float16 ``(in, out)``, by the programs' own function. autoawq has none for gemv: there it
is ``(out, in)``, its quantiser's numbers of the codes that the layer was given. ``given.X.weight`` is what was encoded.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq import utils as auto_round
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("awq.safetensors")
F16 = torch.float16

GEMM = {"gemm": (32, 64, 64), "gemm.64": (64, 128, 32), "gemm.128": (128, 256, 32), "gemm.all": (-1, 72, 32)}
GEMV = {"gemv": (32, 128, 16), "gemv.64": (64, 192, 8), "gemv.128": (128, 256, 8), "gemv.many": (32, 1056, 8)}
GIVEN = ("gemm", "gemm.all", "gemv.64")  # whose weights before are kept
ROUND = {"round.4": (4, 32, 64, 32), "round.5": (5, 32, 64, 32), "round.6": (6, 64, 64, 32), "round.7": (7, 32, 32, 32)}


class Quantizer:
    """As much of a quantiser as its arithmetic asks for."""

    def __init__(self, bits: int, size: int) -> None:
        self.w_bit, self.group_size, self.zero_point = bits, size, True


def linear(rows: int, columns: int, seed: int) -> torch.nn.Linear:
    """`rows` outputs of `columns` inputs; an output is 0, one has no negative weights."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Linear(columns, rows, bias=False)
    made.weight.data = 0.02 * torch.randn(rows, columns, generator=generator)
    made.weight.data[1] = 0
    made.weight.data[2].abs_()
    made.weight.data[3, 5] = 0.4
    return made


def quantised(made: torch.nn.Linear, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight as autoawq's quantiser rounds it, with scales and zero points ``(out, groups)``."""
    weight, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(Quantizer(bits, size), made.weight.data)
    return weight, scales, zeros


def saved(name: str, layer: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": tensor.clone() for part, tensor in layer.state_dict().items()}


def by_gemm(name: str, seed: int) -> dict[str, torch.Tensor]:
    size, inputs, outputs = GEMM[name]
    made = linear(outputs, inputs, seed)
    given = {f"given.{name}.weight": made.weight.data.T} if name in GIVEN else {}
    made.weight.data, scales, zeros = quantised(made, 4, size)
    size = inputs if size == -1 else size
    layer = WQLinear_GEMM.from_linear(made, 4, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    decoded = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size)
    assert torch.allclose(decoded.T.float(), made.weight.data, atol=1e-3), name
    return {**saved(name, layer), **given, f"decoded.{name}.weight": decoded}


def by_gemv(name: str, seed: int) -> dict[str, torch.Tensor]:
    size, inputs, outputs = GEMV[name]
    made = linear(outputs, inputs, seed)
    given = {f"given.{name}.weight": made.weight.data} if name in GIVEN else {}
    made.weight.data, scales, zeros = quantised(made, 4, size)
    layer = WQLinear_GEMV.from_linear(made, 4, size, scales=scales, zeros=zeros)
    half = layer.scales[:, : inputs // size].float().repeat_interleave(size, 1)
    wide = zeros.repeat_interleave(size, 1)
    codes = torch.round((made.weight.data + (zeros * scales).repeat_interleave(size, 1)) / half)
    return {**saved(name, layer), **given, f"decoded.{name}.weight": ((codes - wide) * half).to(F16)}


def by_auto_round(name: str, seed: int) -> dict[str, torch.Tensor]:
    bits, size, inputs, outputs = ROUND[name]
    made = linear(outputs, inputs, seed)
    made.weight.data, scales, zeros = quantised(made, bits, size)
    layer = auto_round.WQLinear_GEMM.from_linear(
        made, bits, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous(), device="cpu"
    )
    decoded = auto_round.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, size)
    assert torch.allclose(decoded.T.float(), made.weight.data, atol=1e-3), name
    return {**saved(name, layer), f"decoded.{name}.weight": decoded}


def build() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for table, build_one in ((GEMM, by_gemm), (GEMV, by_gemv), (ROUND, by_auto_round)):
        for seed, name in enumerate(table):
            made |= build_one(name, seed)
    return {name: tensor.detach().contiguous() for name, tensor in made.items()}


def main() -> None:
    made = build()
    versions = {name: version(name) for name in ("autoawq", "auto-round", "torch")}
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
