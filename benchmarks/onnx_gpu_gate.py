# SPDX-License-Identifier: Apache-2.0
"""``silu(gate) * up`` on a CUDA device: QuickGelu and Mul beside GatedRMSNorm, by how many values share a mean."""

from __future__ import annotations

import time
from typing import Any

import torch  # isort: skip  # before onnxruntime, which then uses the CUDA libraries that torch brings
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_gpu_run import Run

__all__ = ["gate"]

WIDTH, NODES, RUNS = 8192, 64, 20
MEANS = (0, 64, 128, 256, 512, 1024, 2048, WIDTH)
"""0: QuickGelu and Mul."""


def gate(run: Run) -> None:
    """Microseconds of an operator in a recorded graph, and the share of values that are not the nearest of fp16."""
    for tokens in (1, 512):
        for count in MEANS:
            micros, wrong = _measured(run.device, count, tokens)
            what = f"GatedRMSNorm, mean of {count}" if count else "QuickGelu, Mul"
            run.profile.append(
                {"what": f"{tokens} tokens, {what}: {wrong:.2%} not nearest", "per_step": 1.0, "us": micros}
            )
            print(f"  {tokens} tokens, {what}: {micros:.2f} us, {wrong:.2%} not nearest", flush=True)


def _measured(device: str, count: int, tokens: int) -> tuple[float, float]:
    torch.manual_seed(0)
    up, gate = (torch.randn(1, tokens, WIDTH, dtype=torch.float16, device=device) for _ in range(2))
    outs = [torch.zeros_like(up) for _ in range(NODES)]
    session = onnxruntime.InferenceSession(_graph(count, tuple(up.shape)), providers=_providers(device))
    binding = session.io_binding()
    for name, tensor in (("up", up), ("gate", gate)):
        binding.bind_input(name, device, 0, np.float16, tuple(tensor.shape), tensor.data_ptr())
    for number, tensor in enumerate(outs):
        binding.bind_output(f"y{number}", device, 0, np.float16, tuple(tensor.shape), tensor.data_ptr())
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(RUNS):
            session.run_with_iobinding(binding)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) / RUNS / NODES)
    wanted = (up.double() * gate.double() * torch.sigmoid(gate.double())).to(torch.float16)
    return min(taken) * 1e6, float((outs[0] != wanted).float().mean())


def _providers(device: str) -> list[Any]:
    return ["CPUExecutionProvider"] if device == "cpu" else [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]


def _graph(count: int, shape: tuple[int, ...]) -> bytes:
    """As many independent operators as there are outputs."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("up", "gate")}
    nodes, scale = [], [numpy_helper.from_array(np.full(count, 2.0**15, np.float16), "scale")] if count else []
    for number in range(NODES):
        out = f"y{number}"
        if count:
            names = ["up", "scale", "gate"]
            nodes.append(helper.make_node("GatedRMSNorm", names, [out], domain="com.microsoft", epsilon=2.0**30))
        else:
            nodes.append(helper.make_node("QuickGelu", ["gate"], [f"a{number}"], domain="com.microsoft", alpha=1.0))
            nodes.append(helper.make_node("Mul", [f"a{number}", "up"], [out]))
    outs = [helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT16, shape) for number in range(NODES)]
    graph = helper.make_graph(nodes, "gate", list(values.values()), outs, scale)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    return model
