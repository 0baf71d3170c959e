# SPDX-License-Identifier: Apache-2.0
"""SiLU of a gate times what it gates in one operator: rounded once, in graphs for CUDA of 16 bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import surgery
from surgery.onnx.graph.activation import activate, gated_silu
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.target import TARGETS
from surgery_formats.dtypes import DType
from tests.oracles import recipes

WIDTH = 512


def product(io: DType, gate: np.ndarray[Any, Any], up: np.ndarray[Any, Any], *, fused: bool) -> np.ndarray[Any, Any]:
    """``silu(gate) * up`` by the operators of the graph, run on the CPU."""
    graph = Graph()
    ctx: Any = SimpleNamespace(graph=graph, io=io, target=TARGETS["cuda"], opset=23)
    for name in ("gate", "up"):
        graph.input(name, io, ("tokens", gate.shape[-1]))
    made = gated_silu(ctx, "gate", "up", gate.shape[-1], "mlp") if fused else None
    made = made or graph.node("Mul", [activate(ctx, "silu", "gate", "mlp"), "up"], "mlp")
    graph.output(made, io, ("tokens", gate.shape[-1]))
    session = onnxruntime.InferenceSession(graph.model({}, 21).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"gate": gate, "up": up})[0]
    return found


def exact(gate: np.ndarray[Any, Any], up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = gate.astype(np.float64)
    result: np.ndarray[Any, Any] = wide / (1 + np.exp(-wide)) * up.astype(np.float64)
    return result


def drawn(scale: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return (rng.normal(0, 4, (64, WIDTH)).astype(np.float16), rng.normal(0, scale, (64, WIDTH)).astype(np.float16))


def test_values_are_rounded_once() -> None:
    gate, up = drawn(8)
    nearest = exact(gate, up).astype(np.float16)
    twice = exact(gate, np.ones_like(up)).astype(np.float16) * up
    assert (twice != nearest).mean() > 0.2
    assert (
        product(DType.F16, gate, up, fused=True) != nearest
    ).mean() < 0.02  # its exp is the CPU's, good to a few units


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0, 1000.0])
def test_the_norm_is_a_factor_of_one(scale: float) -> None:
    gate, up = drawn(scale)
    gate, up = (
        np.abs(gate),
        np.minimum(up, np.float16(4000)),
    )  # where the CPU's sigmoid is good to more digits than fp16 has
    wanted = exact(gate, up)
    wanted, found = wanted[np.abs(wanted) > 6.2e-5], product(DType.F16, gate, up, fused=True)[np.abs(wanted) > 6.2e-5]
    rounding = 2.0**-11 + (scale / 2**15) ** 2 / 2 * 1.5  # half a unit, and the mean of squares beside epsilon
    assert (np.abs(found.astype(np.float64) - wanted) / np.abs(wanted)).max() <= rounding * 1.01


def test_float32_and_separate_operators_agree() -> None:
    gate, up = (array.astype(np.float32) for array in drawn(50))
    wanted = exact(gate, up)
    for fused in (True, False):
        assert np.abs(product(DType.F32, gate, up, fused=fused) - wanted).max() / np.abs(wanted).max() < 1e-6


def test_a_width_without_a_divisor_keeps_separate_operators() -> None:
    ctx: Any = SimpleNamespace(graph=Graph(), io=DType.F16, target=TARGETS["cuda"])
    assert gated_silu(ctx, "gate", "up", 48, "mlp") is None
    assert gated_silu(ctx, "gate", "up", 11008, "mlp")
    (scale,) = ctx.graph.proto.initializer
    assert list(scale.dims) == [128]


def test_only_graphs_for_cuda_of_16_bits_have_it(tmp_path: Path) -> None:
    base = recipes.build("llama", tmp_path / "base", intermediate_size=64, num_hidden_layers=2)

    def operators(name: str, **options: Any) -> list[str]:
        surgery.export_onnx(base, output=tmp_path / name, weights="copy", **options)
        graph = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        return [node.op_type for node in graph.node if node.op_type in ("GatedRMSNorm", "QuickGelu")]

    layers = 2
    assert operators("fp16", target="cuda", dtype="fp16") == ["GatedRMSNorm"] * layers
    assert operators("bf16", target="cuda", dtype="bf16") == ["GatedRMSNorm"] * layers
    assert operators("older", target="cuda", dtype="fp16", opset=21) == ["QuickGelu"] * layers
    assert operators("fp32", target="cuda", dtype="fp32") == ["QuickGelu"] * layers
    assert operators("cpu", target="cpu") == ["QuickGelu"] * layers
    for name in ("fp16", "bf16"):
        surgery.verify(tmp_path / name, against=base)


def test_an_opset_leaves_out_what_older_runtimes_lack(tmp_path: Path) -> None:
    base = recipes.build("qwen3", tmp_path / "base", num_hidden_layers=1)
    for name, opset, norms in (("now", None, True), ("older", 21, False)):
        surgery.export_onnx(base, output=tmp_path / name, weights="copy", target="cuda", dtype="fp16", opset=opset)
        nodes = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph.node
        (attention,) = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert any("norm" in one for one in attention.input) == norms
    surgery.verify(tmp_path / "older", against=base)


def test_bfloat16_holds_the_scale_and_its_square() -> None:
    ctx: Any = SimpleNamespace(graph=Graph(), io=DType.BF16, target=TARGETS["cuda"])
    gated_silu(ctx, "gate", "up", 64, "mlp")
    (scale,) = ctx.graph.proto.initializer
    (epsilon,) = [one.f for one in ctx.graph.proto.node[0].attribute if one.name == "epsilon"]
    value = np.frombuffer(scale.raw_data, ml_dtypes.bfloat16)[0]
    assert np.isfinite(epsilon)
    assert float(value) ** 2 == epsilon
