# SPDX-License-Identifier: Apache-2.0
"""What only a process of its own shows: closed descriptors, a bound on memory, and faults that need more than one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.kit import environment
from tests.support.small_world import invoke, make_world

# 2 GB of addresses hold Python, numpy and onnxruntime, and nothing whose size an input or an argument chooses.
BOUNDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from surgery_cli.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_world(tmp_path_factory.mktemp("world"))


def _closed(*fds: int) -> tuple[int, str, str]:
    def close() -> None:
        for fd in fds:
            os.close(fd)

    done = subprocess.run(
        [sys.executable, "-m", "surgery_cli", "formats"], env=environment(), capture_output=True, text=True, preexec_fn=close, check=False
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_closed_stdout_is_said() -> None:
    code, _, told = _closed(1)
    assert code == 2
    assert told == "error: stdout is closed\n  hint: send it to /dev/null if nobody reads it\n"


def test_closed_stdin_and_stderr_are_done_without() -> None:
    code, shown, told = _closed(0, 2)
    assert (code, told) == (0, "")
    assert "peft" in shown


def _adapter(world: dict[str, Path], folder: Path, scale_A: float, scale_B: float, **config: Any) -> Path:
    folder.mkdir()
    tensors = load_file(world["lora"] / "adapter_model.safetensors")
    scaled = {name: values * np.float32(scale_A if "lora_A" in name else scale_B) for name, values in tensors.items()}
    save_file(scaled, folder / "adapter_model.safetensors")
    known = json.loads((world["lora"] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))
    return folder


@pytest.mark.parametrize(
    ("scales", "config", "dtype", "says"),
    [
        ((1e-5, 1e6), {}, "fp16", "too large for fp16"),
        ((1e-8, 1e4), {}, "fp16", "fp16 loses"),
        ((1.0, 1e12), {"lora_alpha": 1e30}, "fp32", "too large for fp32"),
    ],
)
def test_factors_that_a_slot_does_not_hold_are_refused(
    scales: tuple[float, float], config: dict[str, Any], dtype: str, says: str, world: dict[str, Path], tmp_path: Path
) -> None:
    adapter = _adapter(world, tmp_path / "lora", *scales, **config)
    out = tmp_path / "out"
    result = invoke(
        "export-onnx", world["base"], "--swap", adapter, "--dtype", dtype, "--target", "portable", "-o", out
    )
    assert result.exit_code == 4
    assert says in result.stderr
    assert str(adapter) in result.stderr
    assert "self_attn" in result.stderr
    assert not out.exists()


def test_outputs_of_a_base_that_was_exported_into_pass_verify(world: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (base / name).write_bytes((world["base"] / name).read_bytes())
    (base / "original").mkdir()  # as repositories of Llama have it
    (base / "original" / "params.json").write_text("{}")
    for words in (
        ("export-onnx", base, world["lora"], "-o", base),
        ("merge", base, world["lora2"], "-o", tmp_path / "merged"),
        ("verify", tmp_path / "merged", "--against", base),
        ("export-onnx", base, "-o", tmp_path / "graph"),
        ("verify", tmp_path / "graph", "--against", base),
    ):
        result = invoke(*words)
        assert result.exit_code == 0, (words, result.stderr)
    assert not (tmp_path / "merged" / "genai_config.json").exists()


def test_a_report_replaces_no_input_no_pipe_and_nothing_in_an_input(world: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.md"
    os.mkfifo(pipe)
    for place, code in ((world["lora"] / "adapter_model.safetensors", 2), (world["lora"] / "new.md", 4), (pipe, 4)):
        result = invoke("report", world["lora"], "--base", world["base"], "--md", place, "--overwrite")
        assert result.exit_code == code, result.stderr
    assert not (world["lora"] / "new.md").exists()
    assert pipe.is_fifo()


LARGE: dict[str, tuple[str, int]] = {
    "tokens": ("bench {graph} --prompt-length 300000000", 4),
    "rows": ("bench {graph} --prompt-length 4 --new-tokens 1 --batch 1000000", 4),
    "a cache": ("bench {graph} --prompt-length 4 --new-tokens 1 --cache 1000000000000", 0),
    "new tokens": ("run {graph} --ids 1 --max-new 1000000000000000", 0),
    "threads": ("run {graph} --ids 1 --threads 1000000", 2),
    "workers": ("extract-lora {base} {tuned} -o {out} --rank 2 --workers 1000000000", 2),
    "rank": ("insert {base} --new lora --rank 1000000000000 -o {out}", 4),
    "positions": ("export-onnx {base} --max-length 1000000000000 -o {out}", 4),
    "rows of a vocabulary": ("layers {base} --vocab pad=1000000000000 -o {out}", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_what_an_argument_makes_large_takes_no_memory(name: str, world: dict[str, Path], tmp_path: Path) -> None:
    line, code = LARGE[name]
    done = _bounded(line.format(out=tmp_path / "out", **world).split())
    assert done.returncode == code, done.stderr
    assert not list(tmp_path.iterdir())


def _bounded(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BOUNDED, *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def _sparse(name: str, size: int) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, size)

    return change


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights of a terabyte": ("base", _sparse("model.safetensors", 1 << 40)),
    "a configuration of a terabyte": ("base", _sparse("config.json", 1 << 40)),
    "settings of a terabyte": ("lora", _sparse("adapter_config.json", 1 << 40)),
    "a graph of a terabyte": ("graph", _sparse("model.onnx", 1 << 40)),
    "an account of a terabyte": ("merged", _sparse("surgery_manifest.json", 1 << 40)),
    "a recipe of a terabyte": ("recipe", _sparse("", 1 << 40)),
    "an adapter file of a terabyte": ("onnx_adapter", _sparse("", 1 << 40)),
}
READ = {
    "base": "merge {base} {lora} -o {out}",
    "lora": "merge {base} {lora} -o {out}",
    "graph": "run {graph} --ids 1",
    "merged": "verify {merged}",
    "recipe": "apply {recipe} -o {out}",
    "onnx_adapter": "run {slots} --ids 1 --adapter {onnx_adapter}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_an_input_makes_large_takes_no_memory(name: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    of, change = FILES[name]
    change(world[of])
    done = _bounded(READ[of].format(out=tmp_path / "out", **world).split())
    assert done.returncode in (3, 4, 5), done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
