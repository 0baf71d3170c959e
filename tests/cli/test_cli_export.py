# SPDX-License-Identifier: Apache-2.0
"""``surgery export-onnx`` from the command line to the files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.oracles import recipes
from tests.support.kit import environment, spawn

BASE, LORA, PROMPT = "examples/base", "examples/lora", "examples/prompt"


def test_a_graph_beside_the_weights_as_a_clone_that_was_not_installed(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    done = spawn("export-onnx", tmp_path / "base", "-o", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert "used where they lie" in done.stdout
    assert (tmp_path / "base/model.onnx").stat().st_size < 100_000
    again = spawn("export-onnx", tmp_path / "base", "-o", tmp_path / "base")
    assert (again.returncode, again.stderr.count("already exists")) == (2, 1)


def test_neither_torch_nor_transformers_is_imported_for_a_plain_export(tmp_path):
    code = (
        "import sys; from surgery.verbs.export_onnx import export_onnx; "
        f"export_onnx({BASE!r}, output={str(tmp_path / 'out')!r}); "
        "print([name for name in ('torch', 'transformers', 'onnx_ir', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "modes"),
    [
        ((LORA,), ["merged"]),
        ((f"{LORA}=0.5",), ["merged"]),
        ((PROMPT,), ["prefix"]),
        ((LORA, "--mode", "swappable"), ["swapped"]),
        (("--merge", f"{LORA}=0.5", "--prefix", PROMPT), ["merged", "prefix"]),
        (("--swap", LORA, PROMPT), ["swapped", "prefix"]),
    ],
)
def test_the_words_decide_whether_an_adapter_is_merged_swapped_or_a_prefix(run, tmp_path, words, modes):
    done = run("--json", "export-onnx", BASE, *words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert [one["mode"] for one in result["adapters"]] == modes
    weights = "base.safetensors" if "merged" in modes else "model.safetensors"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", weights, "tokenizer.json"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((f"{PROMPT}=0.5", "--mode", "prefix"), 4, "has the weight 0.5 but is neither merged nor in slots"),
        ((PROMPT, "--mode", "merged"), 4, "virtual tokens"),
        ((LORA, "--mode", "prefix"), 4, "has no virtual tokens"),
        (("--target", "cpu", "--dtype", "bf16"), 4, "cannot run bf16"),
        (("--weights", "reference"), 4, "only to weights in its own folder"),
        (("--swap", "examples/dora"), 4, "DoRA for"),
        (["--mode", "swappable"], 2, "there are none"),
    ],
)
def test_an_impossible_export_is_refused_and_writes_nothing(run, tmp_path, words, code, says):
    done = run("export-onnx", BASE, *words, "-o", tmp_path / "out")
    assert done.exit_code == code
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_comes_next_can_be_pasted(run, tmp_path):
    named = tmp_path / "größe und mehr"
    done = run("export-onnx", BASE, "-o", named)
    assert f"surgery run '{named}' -p \"...\"" in done.stdout
    shutil.copytree(BASE, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "--ids 1,2,3" in run("export-onnx", tmp_path / "silent", "-o", tmp_path / "out").stdout
    full = run("run", named, "-p", "def", "--max-new", "600")
    assert "longest sequence is reached" in full.stderr


def test_weights_without_a_config_are_refused_by_its_name(run, tmp_path):
    shutil.copytree(BASE, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    done = run("export-onnx", tmp_path / "bare", "-o", tmp_path / "out")
    assert done.exit_code == 4
    assert "config.json: missing" in done.stderr


def test_codes_are_told_with_their_error_and_measured_without_a_length(run, tmp_path):
    out = tmp_path / "out"
    done = run("export-onnx", BASE, LORA, "--weights-type", "int4", "-o", out)
    assert "43 in int4: error 0.0861 of the values, at most 0.089" in " ".join(done.stdout.split())
    timed = run("--json", "bench", out, "--new-tokens", "5", "--device", "cpu", "--threads", "1")
    assert json.loads(timed.stdout)["result"]["prompt_length"] == 503  # 512 positions, less the steps
    done = run("bench", out, "--prompt-length", "512", "--device", "cpu")
    assert (done.exit_code, "512 positions have no room for 512 tokens" in done.stderr) == (4, True)


def test_an_adapter_that_was_exported_with_the_graph_goes_by_its_name(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("export-onnx", BASE, "--swap", LORA, "-o", out).exit_code == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()  # a folder of that name is no .onnx_adapter file
    asked = ("run", out, "-p", "function", "--max-new", "8", "--device", "cpu", "--adapter")
    file = out / "adapters/lora.onnx_adapter"
    for strength in ("", "=0.7"):
        by_name, by_file = run(*asked, f"lora{strength}"), run(*asked, f"{file}{strength}")
        assert (by_name.exit_code, by_name.stdout) == (0, by_file.stdout)
    assert run(*asked, "lora").stdout != run(*asked, "lora=-3").stdout
    done = run(*asked, "style")
    assert (done.exit_code, "adapters of the graph: lora" in done.stderr) == (3, True)
    assert run(*asked, "lora=much").exit_code == 4


def test_a_classifier_says_what_comes_next_and_a_missing_head_is_a_matter_of_the_task(run, tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    done = run("export-onnx", base, "-o", tmp_path / "out")
    assert f"surgery run {tmp_path / 'out'} --ids 1,2,3" in done.stdout
    done = run("export-onnx", BASE, "-o", tmp_path / "scored", "--task", "text-classification")
    assert (done.exit_code, "no such head: another --task" in done.stderr) == (4, True)
