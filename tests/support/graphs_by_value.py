# SPDX-License-Identifier: Apache-2.0
"""A small base, and graphs that hold its weights in any layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.wanted import wanted_weights
from surgery_formats import open_checkpoint
from surgery_formats.containers.onnx import open_graph

__all__ = ["base_of", "graph_of", "initializer", "located", "nbits", "random_weights"]


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def base_of(folder: Path, weights: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def initializer(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def graph_of(path: Path, tensors: Sequence[TensorProto], nodes: Sequence[Any] = (), *, external: bool = False) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in "xy")
    graph = helper.make_graph(list(nodes) or [helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], list(tensors))
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def located(graph: Path, base: Path, **options: Any) -> Located:
    return located_weights(open_graph(graph), wanted_weights(open_checkpoint(base)), **options)


def nbits(
    name: str, values: np.ndarray, bits: int = 4, size: int = 16, *, zeros: bool = False, dtype: Any = np.float32
) -> tuple[list[TensorProto], Any]:
    """A MatMulNBits of ``(out, in)`` values, as its own quantiser rounds them: initializers and the node."""
    rows, cols = values.shape
    blocks = -(-cols // size)
    padded = np.pad(values, ((0, 0), (0, blocks * size - cols))).reshape(rows, blocks, size)
    most = (1 << bits) - 1
    if zeros:
        low, high = np.minimum(padded.min(2), 0), np.maximum(padded.max(2), 0)
        scale = ((high - low) / most).astype(dtype)
        point = np.clip(np.rint(-low / scale.astype("f4")), 0, most)
    else:
        extreme = np.take_along_axis(padded, np.abs(padded).argmax(2)[..., None], 2)[..., 0]
        scale = (extreme / -(1 << bits - 1)).astype(dtype)
        point = np.full(scale.shape, 1 << bits - 1)
    wide = scale.astype("f4")[..., None]
    codes = np.clip(np.rint(padded / np.where(wide == 0, 1, wide) + point[..., None]), 0, most).astype(np.uint8)
    tensors = [
        initializer(f"{name}_q", _packed(codes, bits)),
        initializer(f"{name}_s", scale.reshape(-1)),
    ]
    inputs = [f"{name}_x", f"{name}_q", f"{name}_s"]
    if zeros:
        per = 8 // bits
        even = np.pad(point.astype(np.uint8), ((0, 0), (0, -blocks % per)))
        tensors.append(initializer(f"{name}_z", _packed(even, bits).reshape(-1)))
        inputs.append(f"{name}_z")
    node = helper.make_node(
        "MatMulNBits", inputs, [f"{name}_y"], domain="com.microsoft", K=cols, N=rows, bits=bits, block_size=size
    )
    return tensors, node


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    pairs = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    return np.bitwise_or.reduce(pairs << np.arange(0, 8, bits, dtype=np.uint8), axis=-1).astype(np.uint8)
