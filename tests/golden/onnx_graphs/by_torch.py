# SPDX-License-Identifier: Apache-2.0
"""Graphs by torch.onnx.export, of both kinds, and one as onnxruntime writes it after its own optimisation."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from graphs import base, say, strip
from models import KINDS, opened
from torch import Tensor, nn

AXES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
AXES["position_ids"] = AXES["input_ids"]


class Answer(nn.Module):
    """A model that answers with one tensor, and keeps no keys and values."""

    def __init__(self, model: nn.Module, names: list[str], output: str, more: dict[str, object]) -> None:
        super().__init__()
        self.model, self.names, self.output, self.more = model, names, output, more

    def forward(self, *values: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, values, strict=True)), **self.more), self.output)


def export(folder: Path, name: str, *, dynamo: bool, **more: object) -> None:
    folder.mkdir(parents=True)
    kind, path = KINDS[name], folder / "model.onnx"
    inputs = kind.inputs()
    if (
        name == "llama"
    ):  # without them the rotation's tables have a batch of one, and opset 23's operator takes no other
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    without_cache = {"use_cache": False} if name in ("llama", "gpt2") else {}
    wrapped = Answer(opened(base(name), name), list(inputs), kind.output, without_cache)
    axes = {key: AXES.get(key, {0: "batch"}) for key in inputs}
    if dynamo:
        dim = {label: torch.export.Dim(label) for label in ("batch", "sequence")}
        shapes = tuple({axis: dim[label] for axis, label in axes[key].items()} for key in inputs)
        more = {"dynamo": True, "dynamic_shapes": {"values": shapes}, **more}
    else:
        more = {"dynamo": False, "dynamic_axes": axes, **more}
    torch.onnx.export(
        wrapped.eval(), tuple(inputs.values()), str(path), input_names=list(inputs), output_names=["out"], **more
    )
    strip(path)
    exporter = "torch dynamo" if dynamo else "torchscript"
    say(folder, name, ["torch", "onnxscript", "transformers", "onnx"], exporter=exporter, dtype="float32")


def optimised(source: Path, folder: Path, name: str) -> None:
    """What a session writes that was asked for its optimised model."""
    folder.mkdir(parents=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "model.onnx")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    say(folder, name, ["onnxruntime-gpu"], exporter=f"onnxruntime of {source.parent.name}", dtype="float32")


def fused(source: Path, folder: Path, name: str, *, half: bool) -> None:
    """What onnxruntime's optimiser for transformers writes: attention as one operator, its three maps as one matrix."""
    from onnxruntime.transformers import optimizer

    folder.mkdir(parents=True)
    made = optimizer.optimize_model(str(source), model_type="bert", num_heads=2, hidden_size=32, opt_level=0)
    if half:
        made.convert_float_to_float16(keep_io_types=True)
    made.save_model_to_file(str(folder / "model.onnx"))
    exporter, dtype = f"onnxruntime.transformers of {source.parent.name}", "float16" if half else "float32"
    say(folder, name, ["onnxruntime-gpu"], exporter=exporter, dtype=dtype)


def make(root: Path) -> None:
    onnxruntime.set_default_logger_severity(3)
    for name in ("llama", "bert", "vit", "unet", "gpt2", "resnet"):
        export(root / f"dynamo-{name}", name, dynamo=True, opset_version=23 if name == "llama" else 20)
        if name != "gpt2":  # optimum-onnx makes one the same way
            export(root / f"script-{name}", name, dynamo=False, opset_version=17)
    optimised(root / "script-llama" / "model.onnx", root / "optimised-llama", "llama")
    fused(root / "script-bert" / "model.onnx", root / "fused-bert", "bert", half=False)
    fused(root / "script-bert" / "model.onnx", root / "fused-bert-fp16", "bert", half=True)
