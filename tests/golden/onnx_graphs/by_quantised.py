# SPDX-License-Identifier: Apache-2.0
"""Other exporters' graphs after onnxruntime's own quantisers: those of transformers.js' files (q4, quantized) and QDQ."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import onnxruntime
from graphs import HERE, say
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.numpy import load_file


class Once(CalibrationDataReader):
    """The one run whose ranges a static quantisation is made of."""

    def __init__(self, name: str) -> None:
        run = load_file(HERE / "bases" / name / "run.safetensors")
        self.left = [{key[7:]: value for key, value in run.items() if key.startswith("inputs.")}]

    def get_next(self) -> dict[str, numpy.ndarray] | None:
        return self.left.pop() if self.left else None


def tell(folder: Path, source: str, name: str, dtype: str, how: str) -> None:
    say(folder, name, ["onnxruntime-gpu", "onnx"], exporter=f"{how} of {source}", dtype=dtype)


def four_bits(root: Path, graph: str, source: str, name: str, *, symmetric: bool) -> None:
    folder = root / graph
    folder.mkdir(parents=True)
    model = onnx.load(HERE / source / "model.onnx")
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=symmetric, accuracy_level=1)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"), False)
    tell(folder, source, name, "int4", "MatMulNBits")


def make(root: Path) -> None:
    onnxruntime.set_default_logger_severity(3)
    four_bits(root, "q4-llama", "optimum-llama", "llama", symmetric=True)
    four_bits(root, "q4-zeros-llama", "optimum-llama", "llama", symmetric=False)
    for name, weights, by_channel in (("bert", QuantType.QInt8, True), ("llama", QuantType.QUInt8, False)):
        folder = root / f"quantized-{name}"
        folder.mkdir(parents=True)
        source = HERE / f"optimum-{name}" / "model.onnx"
        quantize_dynamic(source, folder / "model.onnx", weight_type=weights, per_channel=by_channel)
        tell(folder, f"optimum-{name}", name, "int8", "dynamic quantisation")
    folder = root / "qdq-vit"
    folder.mkdir(parents=True)
    quantize_static(
        HERE / "script-vit" / "model.onnx", folder / "model.onnx", Once("vit"), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    tell(folder, "script-vit", "vit", "int8", "QDQ")
