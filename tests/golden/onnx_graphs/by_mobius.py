# SPDX-License-Identifier: Apache-2.0
"""Graphs by mobius."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from by_genai import with_tokenizer
from graphs import base, say, scratch

GRAPHS = {
    "mobius-llama": ("llama", "f32", "cpu"),
    "mobius-llama-fp16": ("llama", "f16", "cuda"),
    "mobius-qwen2": ("qwen2", "f32", "default"),
}
DTYPES = {"f32": "float32", "f16": "float16"}


def make(root: Path) -> None:
    for graph, (name, dtype, provider) in GRAPHS.items():
        with scratch() as place:
            with_tokenizer(base(name), place / "base")
            command = ["build", "--model", "base", "--dtype", dtype, "--ep", provider, "out"]
            done = subprocess.run([sys.executable, "-m", "mobius", *command], cwd=place, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{graph}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            (root / graph).mkdir(parents=True)
            for file in (place / "out").rglob("model.onnx*"):
                shutil.copy(file, root / graph / file.name)
            packages = ["mobius-onnx", "onnx-ir", "onnxscript", "torch", "transformers"]
            say(root / graph, name, packages, exporter="mobius", dtype=DTYPES[dtype])
