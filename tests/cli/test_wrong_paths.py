# SPDX-License-Identifier: Apache-2.0
"""What newcomers name in the place of a model or an adapter is told as what it is, with what to name instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery_formats.files.places import names_in
from tests.support.kit import ROOT, Run

BASE, LORA, DORA, PROMPT = (f"{ROOT}/examples/{name}" for name in ("base", "lora", "dora", "prompt"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: files that were cut off, an empty folder, and one with several models and adapters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("lora", "dora"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / "my adapters é" / name)
    shutil.copytree(BASE, tmp_path / "models" / "base")
    for name, source, size in (("cut head", LORA, 5000), ("cut", LORA, 300_000), ("cut base", BASE, 100_000)):
        shutil.copytree(source, tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:size])
    (tmp_path / "cut.gguf").write_bytes((ROOT / "tests/containers/golden/wide.gguf").read_bytes()[:30_000])
    shutil.copytree(BASE, tmp_path / "no tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
    shutil.copytree(LORA, tmp_path / "untrained")
    factors = load_file(tmp_path / "untrained" / "adapter_model.safetensors")
    zeros = {name: np.zeros_like(value) for name, value in factors.items() if ".lora_B." in name}
    save_file({**factors, **zeros}, tmp_path / "untrained" / "adapter_model.safetensors")
    (tmp_path / "short.yaml").write_text("merge:\n  base: x\n")
    (tmp_path / "file").write_text("")
    other = tmp_path / "other"
    shutil.copytree(LORA, other)
    tensors = {name: np.zeros((8, 8), np.float32) for name in load_file(other / "adapter_model.safetensors")}
    save_file(tensors, other / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["merge", BASE, "cut head"], "of which 4992 are there", "a copy or download of it was not finished"),
        (["merge", BASE, "cut"], "bytes early", "a copy or download of it was not finished"),
        (["merge", "cut base", LORA], "bytes early", "a copy or download of it was not finished"),
        (["inspect", "cut.gguf"], "its bytes are not inside the file", "a copy or download of it was not finished"),
        (["apply", "short.yaml"], "'merge' is no part of a recipe", "'steps:', then '- verb: merge'"),
        (
            ["report", "other", "--base", BASE],
            "none of its 42 parameters in the right shape",
            "is this the base it was",
        ),
        (["merge", BASE, "empty"], "an empty folder where an adapter was expected", "known: "),
        (["merge", BASE, "my adapters é"], "a folder of adapters where one was expected", "adapters é/dora, my adapt"),
        (["merge", BASE, f"{LORA}/adapter_config.json"], "one file of an adapter that is a folder", f"folder: {LORA}"),
        (
            ["merge", f"{BASE}/config.json", LORA],
            "not a file of weights by its name",
            f"name the folder that it is in: {BASE}",
        ),
        (["inspect", "models"], "no weights here", "there are weights in models/base: name one"),
        (["inspect", "empty"], "no weights here", "expected model.safetensors"),
        (
            ["eval", PROMPT, "--text", "x"],
            "an adapter where a full model was expected",
            "is attached to it: --adapter\n",
        ),
        (["eval", BASE, "--against", LORA, "--text", "x"], "an adapter where", "attached to it: --against-adapter\n"),
        (["merge", LORA, DORA], "an adapter where a full model was expected", "its base belongs here\n"),
        (["merge", "models/bas", LORA], "no such file or folder", "did you mean 'models/base'?"),
        (["report", LORA, "--base", BASE, "--tasks", "1,100"], "not a whole number", "repeated: --tasks 1 --tasks 100"),
        (
            ["eval", "no tokenizer", "--text", f"{BASE}/config.json"],
            "no tokenizer.json",
            "or give token ids with --ids",
        ),
        (["combine", LORA, DORA, "--method", "ties", "--rank", "4"], "needs --density, the share of the values", ""),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_what_is_named_wrongly_is_told_with_what_to_name(
    words: list[str], message: str, hint: str, place: Path, run: Run
) -> None:
    done = run(*words, *(["--dry-run"] if words[0] in ("merge", "combine") else []))
    assert done.exit_code in (2, 3, 4)
    told, _, hinted = done.stderr.partition("  hint: ")
    assert message in told
    assert hint in hinted


def test_an_untrained_adapter_is_told_as_one(place: Path, run: Run) -> None:
    done = run("merge", BASE, "untrained", "-o", "out")
    assert "no weight of the base would change: the adapter looks untrained" in done.stderr
    assert "a LoRA begins with B = 0" in done.stderr


def test_the_path_of_a_file_of_weights_is_no_name_on_the_hub(place: Path, run: Run) -> None:
    assert run("inspect", "nowhere/model.onnx").stderr == "error: nowhere/model.onnx: no such file or folder\n"


@pytest.mark.parametrize(
    "words",
    [["merge", BASE, LORA, "-o", "file/out"], ["convert", LORA, "--to", "gguf", "--base", BASE, "-o", "file/out.gguf"]],
)
def test_a_file_in_the_place_of_the_outputs_folder_is_told_as_a_file(words: list[str], place: Path, run: Run) -> None:
    done = run(*words)
    assert done.exit_code == 3
    assert done.stderr == "error: file: a file, not a folder to write into\n"


def test_check_names_the_command_that_goes_on(place: Path, run: Run) -> None:
    alone = run("check", BASE, DORA, "--for", "llama.cpp")
    assert (
        f"next: surgery check {BASE} {DORA} --for llama.cpp --fix OUT writes what it honours"
        in alone.stdout + alone.stderr
    )
    every = run("check", BASE, "my adapters é/lora")
    told = f"next: surgery check {BASE} 'my adapters é/lora' --for mlx-lm shows what is wrong, and the remedy"
    assert told in every.stdout + every.stderr
    honoured = run("check", BASE, LORA, "--for", "vllm")
    assert "next: " not in honoured.stdout + honoured.stderr


def test_a_folder_that_may_not_be_read_hides_no_other(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "models" / "a private one").mkdir()

    def listed(folder: Path) -> list[str]:
        if folder.name == "a private one":
            raise PermissionError(13, "Permission denied", str(folder))
        return names_in(folder)

    monkeypatch.setattr("surgery_formats.containers.sharded.names_in", listed)
    asked = run("inspect", "models")
    assert asked.exit_code == 3
    assert "there are weights in models/base: name one" in asked.stderr
