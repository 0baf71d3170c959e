# SPDX-License-Identifier: Apache-2.0
"""The builder's graph with an adapter in it, after Olive took the adapter out: slots, and the adapter as its file."""

from __future__ import annotations

import shutil
from pathlib import Path

from graphs import HERE, say, scratch


def make(root: Path) -> None:
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.extract_adapters import ExtractAdapters

    folder = root / "olive-llama-slots"
    folder.mkdir(parents=True)
    source = HERE / "genai-llama-slots" / "model.onnx"
    with scratch() as place:
        create_pass_from_dict(ExtractAdapters, {}, disable_search=True).run(
            ONNXModelHandler(str(source)), str(place / "out")
        )
        for file in (place / "out").rglob("*"):
            if file.is_file():
                shutil.copy(file, folder / file.name)
    say(folder, "llama", ["olive-ai", "onnx-ir"], exporter="Olive of genai-llama-slots", dtype="float32", slots="lora")
