# SPDX-License-Identifier: Apache-2.0
"""Graphs by the model builder of onnxruntime-genai."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from graphs import base, say, scratch

GRAPHS = {
    "genai-llama": ("llama", "fp32", ""),
    "genai-llama-fp16": ("llama", "fp16", ""),
    "genai-llama-int4": ("llama", "int4", ""),
    "genai-llama-slots": ("llama", "fp32", "lora"),
    "genai-qwen2": ("qwen2", "fp32", ""),
    "genai-qwen2-int4": ("qwen2", "int4", ""),
}


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy with the tokenizer that the builder asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder / name)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(80)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    return folder


def make(root: Path) -> None:
    for graph, (name, precision, adapter) in GRAPHS.items():
        with scratch() as place:
            source = with_tokenizer(base(name), place / "base")
            command = [
                "-i",
                source,
                "-o",
                place / "out",
                "-p",
                precision,
                "-e",
                "cuda" if precision == "fp16" else "cpu",
            ]
            options = [f"adapter_path={base(name).parent / adapter}"] if adapter else []
            options += ["int4_block_size=32", "int4_accuracy_level=1"] if precision == "int4" else []
            command += ["--extra_options", *options] if options else []
            done = subprocess.run(
                [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, command), "-c", str(place / "cache")],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{graph}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            (root / graph).mkdir(parents=True)
            for file in ("model.onnx", "model.onnx.data"):
                shutil.copy(place / "out" / file, root / graph / file)
            more = {"adapter": adapter} if adapter else {}
            dtype = {"fp32": "float32", "fp16": "float16"}.get(precision, precision)
            packages = ["onnxruntime-genai", "onnx-ir", "torch", "transformers"]
            say(root / graph, name, packages, exporter="genai builder", dtype=dtype, **more)
