# SPDX-License-Identifier: Apache-2.0
"""Graphs by optimum-onnx, which needs transformers 4."""

from __future__ import annotations

import shutil
from pathlib import Path

from graphs import base, say, scratch

GRAPHS = {
    "optimum-llama": ("llama", "text-generation-with-past"),
    "optimum-gpt2": ("gpt2", "text-generation-with-past"),
    "optimum-bert": ("bert", "text-classification"),
    "optimum-vit": ("vit", "image-classification"),
}


def make(root: Path) -> None:
    from optimum.exporters.onnx import main_export

    for graph, (name, task) in GRAPHS.items():
        with scratch() as place:
            main_export(base(name), place / "out", task=task, library_name="transformers", do_validation=False)
            (root / graph).mkdir(parents=True)
            for file in (place / "out").glob("model.onnx*"):
                shutil.copy(file, root / graph / file.name)
        say(root / graph, name, ["optimum-onnx", "torch", "transformers"], exporter="optimum-onnx", dtype="float32")
