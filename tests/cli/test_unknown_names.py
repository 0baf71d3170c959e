# SPDX-License-Identifier: Apache-2.0
"""A name that an option does not know is a fault of usage, exit code 2, and the message lists or suggests those there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kit import ROOT, Run

BASE, LORA, TUNED, PROMPT = (f"{ROOT}/examples/{name}" for name in ("base", "lora", "tuned", "prompt"))


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["convert", LORA, "--to", "nope"], "kohya"),
        (["convert", LORA, "--to", "kohia"], "did you mean 'kohya'"),
        (["convert", LORA, "--for", "nope"], "vllm"),
        (["convert", LORA, "--to", "peft", "--dialect", "nope"], "unsloth"),
        (["combine", LORA, LORA, "--to", "nope"], "kohya"),
        (["combine", LORA, LORA, "--method", "nope"], "ties"),
        (["resize", LORA, "--rank", "2", "--to", "nope"], "kohya"),
        (["extract-lora", BASE, TUNED, "--to", "nope"], "kohya"),
        (["prompt", "convert", PROMPT, "--to", "nope"], "p-tuning"),
        (["prompt", "convert", PROMPT, "--to", "prefx"], "did you mean 'prefix'"),
        (["prompt", "transfer", PROMPT, BASE, "--onto", TUNED, "--method", "nope"], "ridge"),
        (["export-onnx", BASE, "--task", "nope"], "text-generation"),
        (["export-onnx", BASE, "--layout", "nope"], "optimum"),
        (["insert", BASE, "--new", "nope"], "rslora"),
        (["merge", BASE, LORA, "--quantized", "nope"], "residual"),
        (["merge", BASE, LORA, "--quantized", "requantise"], "; did you mean 'requantize'?"),
        (["merge", BASE, LORA, "--dtype", "float16"], "; did you mean 'fp16'?"),
        (["convert", LORA, "--to", "peft", "--dtype", "torch.bfloat16"], "; did you mean 'bf16'?"),
        (["merge", BASE, LORA, "--device", "gpu"], "'gpu' is no device; there are cpu, cuda"),
        (["check", BASE, LORA, "--for", "nope"], "vllm"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_an_unknown_name_is_a_fault_of_usage(words: list[str], known: str, run: Run, tmp_path: Path) -> None:
    out = [] if words[0] == "check" else ["-o", str(tmp_path / "out")]
    done = run(*words, *out)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: invalid value for '{words[-2]}': ")
    assert known in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["merge", BASE, f"{LORA}:0.7"], "lora=0.7"),
        (["merge", BASE, LORA, "0.7"], "there is no '0.7'; weights are written ADAPTER=0.7"),
        (["combine", LORA, f"{LORA}:1"], "lora=1"),
        (["report", LORA, "--tasks", "100"], "hint: --base names it"),
    ],
)
def test_what_is_written_otherwise_is_refused_with_how_to_write_it(words: list[str], cure: str, run: Run) -> None:
    done = run(*words, *(["--dry-run"] if words[0] != "report" else []))
    assert done.exit_code == 2, done.output
    assert cure in done.stderr
