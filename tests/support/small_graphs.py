# SPDX-License-Identifier: Apache-2.0
"""Graphs of one operator over weights of `kit.make_base`, as exporters use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

__all__ = ["FORMS", "Q", "V", "answer", "weights_in", "write_graph"]

Q, V = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"
MICROSOFT = "com.microsoft"
X = [2, 5, 32]

Made = tuple[list[onnx.NodeProto], dict[str, Any], list[int]]
"""Nodes from ``x`` to ``y``, initializers, and the shape of ``x``."""


def matmul(W: Mapping[str, Any]) -> Made:
    return [helper.make_node("MatMul", ["x", "w"], ["y"], name="n")], {"w": W[Q].T}, X


def matmul_with_bias(W: Mapping[str, Any]) -> Made:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], name="n"), helper.make_node("Add", ["b", "p"], ["y"])]
    return nodes, {"w": W[Q].T, "b": np.arange(32, dtype=np.float32)}, X


def gemm(W: Mapping[str, Any]) -> Made:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=0.5, beta=2.0)
    return [node], {"w": W[Q], "b": np.arange(32, dtype=np.float32)}, [7, 32]


def gemm_as_stored(W: Mapping[str, Any]) -> Made:
    return [helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": W[Q].T}, [7, 32]


def fused_matmul(W: Mapping[str, Any]) -> Made:
    return [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain=MICROSOFT, transB=1, alpha=0.25)], {"w": W[Q]}, X


def fused_gemm(W: Mapping[str, Any]) -> Made:
    node = helper.make_node("FusedGemm", ["x", "w"], ["y"], domain=MICROSOFT, transB=1, activation="Relu")
    return [node], {"w": W[Q]}, [7, 32]


def transposed(W: Mapping[str, Any]) -> Made:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["y"]),
    ]
    return nodes, {"w": W[Q]}, X


def constant(W: Mapping[str, Any]) -> Made:
    made = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ascontiguousarray(W[Q].T)))
    return [made, helper.make_node("MatMul", ["x", "w"], ["y"])], {}, X


def half(W: Mapping[str, Any]) -> Made:
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["y"]),
    ]
    return nodes, {"w": W[Q].T.astype(np.float16)}, X


def packed(W: Mapping[str, Any]) -> Made:
    other = np.random.default_rng(3).normal(size=(32, 16)).astype(np.float32)
    return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.concatenate([W[Q].T, other, W[V].T], 1)}, X


def packed_as_stored(W: Mapping[str, Any]) -> Made:
    return [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": np.concatenate([W[V], W[Q]])}, [7, 32]


def split(W: Mapping[str, Any]) -> Made:
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["y0"]),
        helper.make_node("MatMul", ["x", "w1"], ["y1"]),
        helper.make_node("Concat", ["y0", "y1"], ["y"], axis=-1),
    ]
    return nodes, {"w0": W[Q].T[:, :24], "w1": W[Q].T[:, 24:]}, X


def convolution(W: Mapping[str, Any]) -> Made:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1])
    return [node], {"w": W[Q].reshape(32, 32, 1, 1)}, [2, 32, 3, 4]


def branches(W: Mapping[str, Any]) -> Made:
    shape = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)

    def body(name: str, factor: float) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"p_{name}"], name=f"m_{name}"),
            helper.make_node("Mul", [f"p_{name}", f"f_{name}"], ["out"], name=f"s_{name}"),
        ]
        return helper.make_graph(nodes, name, [], [shape], [numpy_helper.from_array(np.float32(factor), f"f_{name}")])

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("then", 1.0), else_branch=body("else", 3.0))
    return [node], {"w": W[Q].T, "c": np.array(False)}, X


FORMS: dict[str, Callable[[Mapping[str, Any]], Made]] = {
    form.__name__: form
    for form in (
        matmul, constant, matmul_with_bias, gemm, gemm_as_stored, fused_matmul, fused_gemm, transposed, half, packed,
        packed_as_stored, split, convolution, branches,
    )
}  # fmt: skip


def weights_in(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def write_graph(path: Path, form: str, weights: Mapping[str, Any]) -> Path:
    nodes, initializers, shape = FORMS[form](weights)
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def answer(path: Path, feed: Mapping[str, Any], adapter: Path | None = None) -> Any:
    """The first output of a graph whose nodes run as they are."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = onnxruntime.RunOptions()
    if adapter is not None:
        lora = onnxruntime.LoraAdapter()
        lora.Load(str(adapter))
        run.add_active_adapter(lora)
    return session.run(None, dict(feed), run)[0]
