# SPDX-License-Identifier: Apache-2.0
"""compressed_tensors.safetensors: weights that compressed-tensors compresses, and what it decompresses.

Run with compressed-tensors and torch for the CPU: ``python make_compressed_tensors.py``, or with ``--check`` to compare.
Scales are in float32, so that the package computes in float32, but for some cases in bfloat16: there, and in its FP4
formats, ``decoded`` is rounded to bfloat16 at the end.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from golden_cases import Case, write_or_check

GOLDEN = Path(__file__).with_name("compressed_tensors.safetensors")


def values(*shape: int, seed: int = 0, zeros: float = 0) -> torch.Tensor:
    """Normal numbers, not around zero; a row of small ones, one of zeros, and an outlier."""
    made = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.01
    made[..., 0, :] *= 1e-3
    made[..., 1, :] = zeros
    made.view(-1)[-1] = 0.3
    return made


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every block, as the package's observers give them."""
    if args.strategy in ("group", "tensor_group"):
        blocks = weight.unflatten(-1, (-1, args.group_size))
        return blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, tuple(args.block_structure))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    return weight.amin().reshape(1), weight.amax().reshape(1)


def case(scheme: QuantizationScheme, weight: torch.Tensor, dtype: torch.dtype = torch.float32, form: str = "") -> Case:
    args = scheme.weights
    low, high = extremes(weight, args)
    state = {"weight": weight.to(dtype)}
    overall = generate_gparam(weight.amin(), weight.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, overall)
    state |= {"weight_scale": scale.to(dtype), "weight_zero_point": zero}
    if overall is not None:
        state["weight_global_scale"] = overall
    inputs = scheme.input_activations
    if inputs is not None and not inputs.dynamic:
        state["input_scale"] = torch.tensor([0.5])
    if inputs is not None and inputs.strategy == "tensor_group":
        state["input_global_scale"] = torch.tensor([2.0])
    form = form or infer_module_format(torch.nn.Linear, scheme).value
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress({name: tensor.clone() for name, tensor in state.items()}, scheme)
    decoded = compressor.decompress({name: tensor.clone() for name, tensor in stored.items()}, scheme)["weight"]
    assert (decoded.float() - weight).abs().max() < 0.6, form
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed")
    told = {**json.loads(config.model_dump_json(exclude_none=True)), "transform_config": {}, "sparsity_config": {}}
    return Case(
        {f"layer.{name}": tensor.detach() for name, tensor in stored.items()}, {"layer.weight": decoded.detach()}, told
    )


def integers(bits: int, *, symmetric: bool = True, **args: object) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **args))


def floats(**args: object) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, type="float", **args))


def preset(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


def packed() -> dict[str, Case]:
    """Every width, symmetric or not, in groups, in rows of odd lengths, and with one scale."""
    cases = {}
    for bits in range(2, 9):
        for symmetric in (True, False):
            name = f"int{bits}{'' if symmetric else ' asymmetric'}"
            group = integers(bits, symmetric=symmetric, strategy="group", group_size=16)
            cases[f"{name} groups"] = case(group, values(11, 48, seed=bits))
            cases[f"{name} rows"] = case(
                integers(bits, symmetric=symmetric, strategy="channel"), values(9, 37, seed=bits)
            )
        cases[f"int{bits} tensor"] = case(integers(bits, strategy="tensor"), values(5, 21, seed=bits))
    cases["int4 groups of 32"] = case(integers(4, strategy="group", group_size=32), values(36, 32), torch.bfloat16)
    cases["int3 many rows"] = case(integers(3, symmetric=False, strategy="group", group_size=32), values(40, 32))
    cases["int4 asymmetric tensor"] = case(integers(4, symmetric=False, strategy="tensor"), values(5, 21))
    return cases


def whole() -> dict[str, Case]:
    block = {"strategy": "block", "block_structure": [16, 16]}
    no_zeros = values(9, 37, zeros=0.01)  # of which the package makes zero points that are no numbers
    return {
        "w8a8": case(preset("W8A8"), values(9, 37)),
        "int8 asymmetric": case(integers(8, symmetric=False, strategy="channel"), values(9, 37), form="int-quantized"),
        "int8 groups": case(integers(8, strategy="group", group_size=8), values(6, 40), form="naive-quantized"),
        "int8 blocks": case(integers(8, **block), values(40, 40), form="int-quantized"),
        "int4 in bytes": case(integers(4, strategy="channel"), values(9, 37), form="naive-quantized"),
        "fp8": case(preset("FP8"), values(9, 37)),
        "fp8 rows": case(preset("FP8_DYNAMIC"), values(9, 37), torch.bfloat16),
        "fp8 blocks": case(floats(**block), values(40, 40), form="float-quantized"),
        "fp8 groups": case(floats(strategy="group", group_size=8), values(6, 40), form="naive-quantized"),
        "fp8 asymmetric": case(floats(strategy="channel", symmetric=False), no_zeros, form="naive-quantized"),
        "mxfp8": case(preset("MXFP8A16"), values(6, 64)),
        "mxfp6": case(preset("MXFP6A16"), values(6, 64)),
        "mxfp4": case(preset("MXFP4A16"), values(6, 64)),
        "nvfp4": case(preset("NVFP4"), values(7, 48)),
        "nvfp4 weights": case(preset("NVFP4A16"), values(7, 48, seed=1)),
    }


if __name__ == "__main__":
    write_or_check(GOLDEN, {**packed(), **whole()}, ("torch", "compressed-tensors"))
