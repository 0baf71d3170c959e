# SPDX-License-Identifier: Apache-2.0
"""On the CPU no command waits for torch: whole processes, on the shipped example, in which importing it is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.kit import ROOT, environment, spawn

BASE, TUNED, LORA, DORA, PROMPT = (f"{ROOT}/examples/{name}" for name in ("base", "tuned", "lora", "dora", "prompt"))

REFUSAL = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch was imported")

sys.meta_path.insert(0, Refusal())
"""

COMMANDS = {
    "help": ["--help"],
    "formats": ["formats"],
    "env": ["env"],
    "inspect a model": ["inspect", BASE],
    "inspect an adapter": ["inspect", LORA],
    "report": ["report", LORA, DORA, "--base", BASE],
    "show a prompt": ["prompt", "show", PROMPT, "--base", BASE],
    "bake tokens": ["prompt", "bake", PROMPT, BASE, "-o", "{out}"],
    "bake keys and values": ["prompt", "bake", PROMPT, BASE, "-o", "{out}", "--as", "kv"],
    "combine prompts": ["prompt", "combine", PROMPT, PROMPT, "-o", "{out}"],
    "convert a prompt": ["prompt", "convert", PROMPT, "--to", "prefix", "--base", BASE, "-o", "{out}"],
    "transfer a prompt": ["prompt", "transfer", PROMPT, BASE, "--onto", TUNED, "-o", "{out}"],
    "tokens near a prompt": ["prompt", "nearest", PROMPT, BASE],
    "diff of models": ["diff", BASE, TUNED, "--spectrum"],
    "diff of adapters": ["diff", LORA, LORA],
    "convert to MLX": ["convert", LORA, "--to", "mlx", "-o", "{out}"],
    "convert to codes": ["convert", DORA, "--to", "compact", "-o", "{out}"],
    "combine": ["combine", f"{LORA}=0.5", f"{LORA}=-1", "-o", "{out}"],
    "combine by SVD": ["combine", f"{LORA}=0.5", f"{LORA}=-1", "--rank", "4", "-o", "{out}"],
    "combine by TIES": ["combine", LORA, LORA, "--method", "ties", "--density", "0.5", "--rank", "4", "-o", "{out}"],
    "layers": ["layers", BASE, "--keep", "0,2-3", "-o", "{out}"],
    "layers with more rows": ["layers", BASE, "--vocab", "pad=100", "-o", "{out}"],
    "layers with an adapter": [
        "layers",
        BASE,
        "--drop",
        "1",
        "-o",
        "{out}",
        "--adapter",
        LORA,
        "--adapter-out",
        "{out}-lora",
    ],
    "resize": ["resize", LORA, "--rank", "4", "-o", "{out}"],
    "resize what depends on the base": ["resize", DORA, "--base", BASE, "--rank", "4", "-o", "{out}"],
    "extract": ["extract-lora", BASE, TUNED, "--rank", "4", "-o", "{out}"],
    "extract a DoRA": ["extract-lora", BASE, TUNED, "--rank", "4", "--kind", "dora", "-o", "{out}"],
    "extract codes": ["extract-lora", BASE, TUNED, "--rank", "auto", "--factors", "int8", "-o", "{out}"],
    "merge": ["merge", BASE, LORA, DORA, "-o", "{out}"],
    "extract a LoRA": ["extract-lora", BASE, TUNED, "--rank", "4", "-o", "{out}"],
    "extract what fits best": ["extract-lora", BASE, TUNED, "--rank", "4", "--kind", "auto", "-o", "{out}"],
    "begin a LoRA": ["insert", BASE, "--new", "lora", "--init", "pissa", "-o", "{out}"],
    "begin an OFT": ["insert", BASE, "--new", "oft", "-o", "{out}"],
    "begin a prompt": ["insert", BASE, "--new", "prompt", "-o", "{out}"],
    "export": ["export-onnx", BASE, "-o", "{out}"],
    "export of a merge": ["export-onnx", BASE, LORA, "-o", "{out}"],
    "export with slots": ["export-onnx", BASE, "--swap", LORA, "-o", "{out}"],
    "export with a prompt": ["export-onnx", BASE, "--prefix", PROMPT, "-o", "{out}"],
}
NEEDS_TORCH = {
    "env that looks": ["env", "--deep"],  # at what torch can use
    "what a prompt does": [
        "prompt",
        "nearest",
        PROMPT,
        BASE,
        "--by",
        "effect",
        "--ids",
        "5,6,7",
    ],  # by the same reference
    "the loss of a model": ["eval", BASE, "--text", "README.md", "--limit", "100"],  # by the same reference
    "verify a graph": ["verify", "{graph}"],  # the reference is independent of the product's arithmetic
}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that cannot import torch."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(REFUSAL)
    return {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]])}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_torch(name: str, refusing: dict[str, str], tmp_path: Path) -> None:
    done = spawn(*(word.format(out=tmp_path / "out") for word in COMMANDS[name]), **refusing)
    assert "torch was imported" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_what_is_merged_is_verified_without_torch(refusing: dict[str, str], tmp_path: Path) -> None:
    assert spawn("merge", BASE, LORA, "-o", tmp_path / "out", **refusing).returncode == 0
    done = spawn("verify", tmp_path / "out", "--against", BASE, "--adapter", LORA, **refusing)
    assert done.returncode == 0, done.stderr


def test_a_recipe_needs_no_torch(refusing: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"steps: [{{verb: merge, base: {BASE}, adapters: {{{LORA}: 0.5}}}}]")
    done = spawn("apply", tmp_path / "recipe.yaml", "-o", tmp_path / "out", **refusing)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NEEDS_TORCH)
def test_the_exceptions_are_these(name: str, refusing: dict[str, str], tmp_path: Path) -> None:
    """The refusal works, and the list of exceptions is as short as it can be."""
    assert spawn("export-onnx", BASE, "-o", tmp_path / "graph", **refusing).returncode == 0
    done = spawn(*(word.format(graph=tmp_path / "graph") for word in NEEDS_TORCH[name]), **refusing)
    assert "torch was imported" in done.stdout + done.stderr
