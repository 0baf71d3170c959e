# SPDX-License-Identifier: Apache-2.0
"""``surgery merge`` from the command line to the files."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.kit import LAYERS, Run, environment, make_lora, spawn

CHANGED = 2 * LAYERS  # q and v of every layer


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, hidden ones too."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def expected(base: Path, *adapters: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """W + w * alpha / r * B A in float64, rounded once."""
    tensors = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    for folder, weight in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        factors = load_file(folder / "adapter_model.safetensors")
        for name in factors:
            if ".lora_A." in name:
                down, up = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                tensors[target] += weight * config["lora_alpha"] / config["r"] * up @ down
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # float32 arithmetic may fall on the other side of a tie
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-6)
        assert (found[name] != tensor).float().mean() < 0.01


def test_as_a_clone_that_was_not_installed(base, lora, tmp_path):
    done = spawn("merge", base, lora, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "out/model.safetensors"), expected(base, (lora, 1.0)))
    assert (tmp_path / "out/surgery_manifest.json").exists()
    assert (tmp_path / "out/tokenizer.json").exists()


def test_weights_of_several_adapters(run: Run, base, lora, tmp_path):
    other = make_lora(tmp_path / "other", 0.5)
    result = run("merge", base, f"{lora}=0.25", f"{other}=-2", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert_same(load_file(tmp_path / "out/model.safetensors"), expected(base, (lora, 0.25), (other, -2.0)))


def test_the_summary_of_a_merge_names_inputs_and_results(run: Run, base, lora, tmp_path):
    result = run("merge", base, lora, "-o", tmp_path / "out")
    for text in (
        str(base),
        str(lora),
        f"{CHANGED} updated",
        "9 copied",
        "survives",
        "rounding noise",
        str(tmp_path / "out"),
    ):
        assert text in result.stdout, text
    assert "from_pretrained" in result.stderr
    assert "warning" not in result.stderr
    assert "below" not in result.stdout


def test_an_update_that_is_rounded_away_ends_in_a_warning_with_the_number(run: Run, base, tmp_path):
    weak = make_lora(tmp_path / "weak", 1e-4)
    result = run("merge", base, f"{weak}=0.3", "-o", tmp_path / "out")
    assert result.exit_code == 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("warning: only ")
    assert "%" in last
    assert "--dtype fp32" in last
    assert "model.layers.0.self_attn.q_proj.weight" in result.stdout  # the worst modules
    quiet = run("merge", base, f"{weak}=0.3", "-o", tmp_path / "quiet", "-q")
    assert quiet.stdout == ""
    assert quiet.stderr.splitlines() == [last]


def test_an_fp32_output_keeps_a_small_update(run: Run, base, tmp_path):
    weak = make_lora(tmp_path / "weak", 1e-4)
    result = run("merge", base, weak, "-o", tmp_path / "out", "--dtype", "fp32", "--json")
    ledger = json.loads(result.stdout)["result"]["ledger"]
    assert ledger["survival"] > 0.99
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}


def test_json_is_all_there_is_on_stdout(base, lora, tmp_path):
    done = spawn("merge", base, lora, "-o", tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert document["schema_version"] == 1
    assert document["command"] == "merge"
    result = document["result"]
    assert result["output"] == str(tmp_path / "out")
    assert result["nbytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert result["ledger"]["classes"] == {"copied": 9, "updated": CHANGED}
    manifest = json.loads((tmp_path / "out/surgery_manifest.json").read_text())
    assert manifest["ledger"]["tensors"] == result["ledger"]["tensors"]


def test_a_dry_run_writes_nothing_and_says_what_the_run_does(run: Run, base, lora, tmp_path):
    before = everything(tmp_path)
    result = run("merge", base, lora, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert everything(tmp_path) == before
    for text in ("free disk", "peak memory", "model.safetensors", f"{CHANGED} updated", "LoRA r4 x2"):
        assert text in result.stdout, text
    assert "nothing was written" in result.stderr
    planned = json.loads(run("merge", base, lora, "-o", tmp_path / "out", "--dry-run", "--json").stdout)["result"]
    assert everything(tmp_path) == before
    done = json.loads(run("merge", base, lora, "-o", tmp_path / "out", "--json").stdout)["result"]
    assert planned["output"] is None
    assert (
        planned["files"] == done["files"] == {"model.safetensors": (tmp_path / "out/model.safetensors").stat().st_size}
    )
    assert planned["ledger"]["classes"] == done["ledger"]["classes"]


def test_the_first_operations_only_unless_asked(run: Run, base, tmp_path):
    every = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    big = make_lora(tmp_path / "big", targets=every[:4])
    steps = 4 * LAYERS
    shown = run("merge", base, big, "-o", tmp_path / "out", "--dry-run").stdout.count("LoRA r4")
    assert shown == min(steps, 10)


def test_a_merge_overwrites_with_shards_only_when_asked(run: Run, base, lora, tmp_path):
    out = tmp_path / "out"
    assert run("merge", base, lora, "-o", out).exit_code == 0
    assert run("merge", base, lora, "-o", out, "--shard-size", "10kB").exit_code == 2
    assert run("merge", base, lora, "-o", out, "--shard-size", "10kB", "--overwrite").exit_code == 0
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert_same(merged, expected(base, (lora, 1.0)))


def test_a_memory_limit_too_small_for_a_tensor_exits_with_7(run: Run, base, lora, tmp_path):
    result = run("merge", base, lora, "-o", tmp_path / "out", "--memory-limit", "1kB")
    assert result.exit_code == 7
    assert "self_attn" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("-q",), ("--json",)])
def test_the_bar_is_for_people_at_a_terminal(base, lora, tmp_path, flags):
    """Its stderr is a terminal; stdout is not, and gets no bar either way."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "surgery_cli", "merge", str(base), str(lora), "-o", str(tmp_path / "out"), *flags]
    process = subprocess.Popen(command, env=environment(TERM="xterm"), stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.stdout is not None
    data = process.stdout.read()
    process.stdout.close()
    assert process.wait(300) == 0
    assert b"\x1b" not in data
    assert (b"merging" in shown) == (not flags)
    assert (b"/s" in shown) == (not flags)


def test_a_dry_run_says_what_would_be_in_the_way(run: Run, base, lora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    there = run("merge", base, lora, "-o", tmp_path / "out", "--dry-run")
    assert there.exit_code == 0
    assert "--overwrite" in there.stderr.splitlines()[-1]
    assert "--overwrite" not in run("merge", base, lora, "-o", tmp_path / "out", "--dry-run", "--overwrite").stderr
    nowhere = run("merge", base, lora, "-o", tmp_path / "no/out", "--dry-run", "--json")
    assert "no folder" in json.loads(nowhere.stdout)["result"]["warnings"][0]
    assert run("merge", base, lora, "-o", tmp_path / "no/out").exit_code == 3


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "examples/base", "examples/lora"),
        ("convert", "examples/lora", "--to", "mlx"),
        ("combine", "examples/lora", "examples/lora"),
        ("resize", "examples/lora", "--rank", "4"),
        ("extract-lora", "examples/base", "examples/tuned", "--rank", "1"),
    ],
)
def test_only_what_is_written_needs_a_place(run: Run, words):
    rehearsed = run(*words, "--dry-run")
    assert rehearsed.exit_code == 0, rehearsed.stderr
    assert "None" not in rehearsed.stdout
    assert "dry run: nothing was written" in rehearsed.stderr
    done = run(*words)
    assert done.exit_code == 2
    assert "missing option '-o' / '--output'" in done.stderr
    assert "--dry-run does without" in done.stderr


def test_a_dry_run_says_that_the_output_is_an_input(run: Run, base, lora):
    words = ("merge", base, lora, "-o", base, "--overwrite")
    assert "is one of the inputs" in run(*words, "--dry-run").stderr
    assert run(*words).exit_code == 4
