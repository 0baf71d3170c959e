# SPDX-License-Identifier: Apache-2.0
"""Olive: ``olive convert-adapters``, its file read by onnxruntime, and what a graph with these inputs adds: ``x A B``."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import onnxruntime
from loading import Found, run
from olive.cli.convert_adapters import ConvertAdaptersCommand
from safetensors import safe_open


def opened(base: Path) -> Callable[[Path], Found]:
    folder = Path(tempfile.mkdtemp())
    with safe_open(base / "model.safetensors", "np") as file:
        weights = set(file.keys())

    def load(adapter: Path) -> Found:
        output = folder / f"{adapter.name}.onnx_adapter"
        given = Namespace(
            adapter_path=str(adapter), adapter_format="onnx_adapter", output_path=str(output), dtype="float32"
        )
        given.quantize_int4, given.int4_block_size, given.int4_quantization_mode = False, 32, "symmetric"
        command = object.__new__(ConvertAdaptersCommand)
        command.args = given
        ConvertAdaptersCommand.run.__wrapped__(command)
        held = onnxruntime.AdapterFormat.read_adapter(str(output)).get_parameters()
        values = {name: value.numpy() for name, value in held.items()}
        found = {}
        for a in (name for name in values if name.endswith(".lora_A.weight")):
            b, weight = a.replace(".lora_A.", ".lora_B."), a.replace(".lora_A.", ".")
            if b in values and weight in weights:  # a graph of the base has no input of another name
                found[f"delta/{weight}"] = (values[a] @ values[b]).T
        return found

    return load


if __name__ == "__main__":
    run(opened, "olive-ai", "onnxruntime-gpu")
