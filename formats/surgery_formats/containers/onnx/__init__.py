# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: any ``.onnx`` file, with its weights where they lie, in it or in files beside it."""

from surgery_formats.containers.onnx.graph import OnnxGraph, TypedTensors, open_graph

__all__ = ["OnnxGraph", "TypedTensors", "open_graph"]
