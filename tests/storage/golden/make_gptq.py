# SPDX-License-Identifier: Apache-2.0
"""gptq.safetensors: weights that gptqmodel, auto-gptq and auto-round encoded, as their layers save them, and what they decode.

Run with these three and torch for the CPU: ``python make_gptq.py``, or with ``--check`` to compare. auto-gptq no longer
imports beside a current transformers: its layer and its quantiser are loaded from their files alone.

``decoded.X.weight`` is ``(in, out)`` in float32, by gptqmodel's dequantiser; in float16 it is what a layer computes with.
``given.X.weight`` is what was encoded.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("gptq.safetensors")
F16, F32 = torch.float16, torch.float32

GPTQMODEL = {
    # name: (version, bits, group, symmetric, order, in, out)
    "v1.4": (1, 4, 32, True, "", 64, 40),
    "v1.4.all": (1, 4, -1, False, "", 72, 16),
    "v1.4.act": (1, 4, 32, False, "act", 96, 24),
    "v1.4.static": (1, 4, 32, True, "static", 64, 16),
    "v1.4.zero": (1, 4, 32, False, "", 32, 32),
    "v2.4": (2, 4, 64, False, "", 128, 16),
    "v2.4.short": (2, 4, 64, False, "", 96, 16),
    "v2.4.128": (2, 4, 128, True, "", 256, 8),
    "v1.2": (1, 2, 32, False, "", 32, 32),
    "v2.2": (2, 2, 16, True, "act", 32, 16),
    "v1.3": (1, 3, 32, False, "", 32, 32),
    "v2.3": (2, 3, 64, True, "act", 64, 32),
    "v1.8": (1, 8, 32, True, "", 64, 12),
    "v2.8": (2, 8, -1, False, "", 40, 12),
}
AUTO_GPTQ = {"old.4": (4, 32, 64, 32), "old.3": (3, 32, 32, 32), "old.8": (8, 32, 32, 32), "old.2": (2, 32, 32, 32)}
GIVEN = ("v1.4", "v2.8", "v2.4.short")  # whose weights before are kept
AUTO_ROUND = {
    # name: (layer, bits, group, in, out)
    "round.v2.4": (qlinear_torch, 4, 32, 64, 32),
    "round.v1.4": (qlinear_torch_zp, 4, 32, 64, 32),
    "round.v1.3": (qlinear_torch_zp, 3, 32, 64, 32),
    "round.v2.5": (qlinear_torch, 5, 32, 64, 32),
    "round.v1.6": (qlinear_torch_zp, 6, 32, 32, 32),
    "round.v2.7": (qlinear_torch, 7, 32, 32, 32),
}


def own_file(package: str, *path: str) -> ModuleType:
    """A module of an installed package without the package."""
    root = importlib.util.find_spec(package)
    assert root is not None
    assert root.origin is not None
    spec = importlib.util.spec_from_file_location(path[-1], Path(root.origin).parent.joinpath(*path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUANTIZER = own_file("auto_gptq", "quantization", "quantizer.py").Quantizer
OLD = own_file("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda_old.py").QuantLinear


def linear(rows: int, columns: int, seed: int) -> torch.nn.Linear:
    """`rows` outputs of `columns` inputs; an output has an outlier, one is 0."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Linear(columns, rows, bias=False)
    made.weight.data = (0.02 * torch.randn(rows, columns, generator=generator)).to(F16).to(F32)
    made.weight.data[1] = 0
    made.weight.data[2, 3] = 0.5
    return made


def scales_and_zeros(
    weight: torch.Tensor, bits: int, symmetric: bool, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every output and group, by GPTQ's own rule."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        quantizer = QUANTIZER()
        quantizer.configure(bits, perchannel=True, sym=symmetric)
        quantizer.find_params(weight[:, groups == group], weight=True)
        scales.append(quantizer.scale)
        zeros.append(quantizer.zero)
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def saved(name: str, layer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor.clone() for part, tensor in layer.state_dict().items() if not part.startswith("wf")
    }


def by_gptqmodel(name: str, seed: int) -> dict[str, torch.Tensor]:
    number, bits, size, symmetric, order, inputs, outputs = GPTQMODEL[name]
    layer = TorchLinear(
        bits=bits, group_size=size, desc_act=bool(order), sym=symmetric, in_features=inputs, out_features=outputs,
        bias=False, pack_dtype=torch.int32, backend=BACKEND.TORCH, adapter=None, register_buffers=True, format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    made = linear(outputs, inputs, seed)
    if name == "v1.4.zero":
        made.weight.data[4:7] = made.weight.data[4:7].abs()
    size = inputs if size == -1 else size
    groups = torch.arange(inputs) // size
    if order == "act":  # the groups are of inputs in another order
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed)).argsort()]
    if order == "static":
        groups = groups[torch.arange(inputs).reshape(2, -1).T.flatten()]
    scales, zeros = scales_and_zeros(made.weight.data, bits, symmetric, groups)
    layer.pack_original(made, scales, zeros, groups.to(torch.int32))
    layer.qzero_format(format=2)
    layer.post_init()
    decoded = layer.dequantize_weight()
    if number == 1:
        convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    tensors = saved(name, layer)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        config = {"bits": bits, "checkpoint_format": "gptq" if number == 1 else "gptq_v2"}
        exact = convert_gptq_file(Path(folder) / "model.safetensors", F32, config, device="cpu")[f"{name}.weight"].T
    if name in GIVEN:
        tensors[f"given.{name}.weight"] = made.weight.data.T.to(F16)
    if exact.to(F16).equal(decoded):
        return {**tensors, f"decoded.{name}.weight": exact}
    # A zero point of 0 was borrowed from its neighbour, which this dequantiser does not know, but the layer does.
    assert number == 1, name
    assert (zeros == 0).any(), name
    convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    assert layer.dequantize_weight().equal(decoded)  # as it is loaded
    return {**tensors, f"decoded.{name}.weight": decoded}


def by_auto_gptq(name: str, seed: int) -> dict[str, torch.Tensor]:
    bits, size, inputs, outputs = AUTO_GPTQ[name]
    layer = OLD(bits, size, inputs, outputs, bias=False)
    made = linear(outputs, inputs, seed)
    groups = torch.arange(inputs) // size
    made = made.half()
    scales, zeros = scales_and_zeros(made.weight.data.float(), bits, bits < 4, groups)
    assert (zeros > 0).all()
    layer.pack(made, scales.half(), zeros, None)
    decoded = layer(torch.eye(inputs, dtype=F16))
    return {**saved(name, layer), f"decoded.{name}.weight": decoded}


def by_auto_round(name: str, seed: int) -> dict[str, torch.Tensor]:
    module, bits, size, inputs, outputs = AUTO_ROUND[name]
    layer = module.QuantLinear(bits, size, inputs, outputs, bias=False)
    layer.device = "cpu"
    made = linear(outputs, inputs, seed)
    groups = torch.arange(inputs) // size
    scales, zeros = scales_and_zeros(made.weight.data, bits, False, groups)
    scales[3] *= -1  # its search may find such
    layer.pack(made, scales, zeros, None, device="cpu")
    decoded = layer(torch.eye(inputs, dtype=F16))
    return {**saved(name, layer), f"decoded.{name}.weight": decoded}


def build() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for table, build_one in ((GPTQMODEL, by_gptqmodel), (AUTO_GPTQ, by_auto_gptq), (AUTO_ROUND, by_auto_round)):
        for seed, name in enumerate(table):
            made |= build_one(name, seed)
    return {name: tensor.detach().contiguous() for name, tensor in made.items()}


def main() -> None:
    made = build()
    versions = {name: version(name) for name in ("gptqmodel", "auto-gptq", "auto-round", "torch")}
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
