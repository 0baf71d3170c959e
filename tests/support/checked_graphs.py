# SPDX-License-Identifier: Apache-2.0
"""onnx's checker over our graphs."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["check_graph"]

OWN = "SimplifiedLayerNormalization"  # onnxruntime's operator in ONNX's domain, where the checker does not know it


def check_graph(path: Path) -> None:
    """Check every operator that is ONNX's, and the files of weights."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == OWN:
            node.domain = "com.microsoft"
    beside = path.with_name(f"checked-{path.name}")
    beside.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(beside))
    beside.unlink()
