# SPDX-License-Identifier: Apache-2.0
"""``inspect``, ``report``, ``formats``, ``env`` and ``convert``: what people see, what machines read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.kit import HIDDEN, LAYERS, RANK, Run, make_base, spawn

HOSTILE = "evil\x1b[2J\x1b]0;owned\x07\rforged\u202e[red]markup[/red]"


def names_below(node: dict) -> set[str]:
    return {node["name"]}.union(*map(names_below, node["children"]))


def test_inspect_shows_the_modules_of_a_model(run: Run, base):
    result = run("inspect", base)
    assert result.exit_code == 0, result.stderr
    for text in ("llama", "layers.0-1", "q_proj.weight", f"{HIDDEN}x{HIDDEN}", "attention", "BF16", "tokenizer.json"):
        assert text in result.stdout, text
    assert result.stderr == ""


def test_depth_limits_the_tree_and_all_lifts_the_limit(run: Run, base):
    shallow = run("inspect", base, "--depth", "1").stdout
    assert "embed_tokens" not in shallow
    assert "model ..." in shallow
    assert "q_proj" in run("inspect", base, "--depth", "1", "--all").stdout


def test_numbers_of_a_model_are_those_of_its_file(run: Run, base):
    stored = load_file(base / "model.safetensors")
    found = json.loads(run("inspect", base, "--json").stdout)["result"]
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["nbytes"] == (base / "model.safetensors").stat().st_size


def test_inspect_shows_ranks_and_scales_of_an_adapter(run: Run, lora):
    result = run("inspect", lora)
    for text in ("peft", "LoRA", "rank", "alpha", "scale", "model.layers.*.self_attn.q_proj"):
        assert text in result.stdout, text
    found = json.loads(run("inspect", lora, "--json").stdout)["result"]
    assert found["ranks"] == {str(RANK): 2 * LAYERS}
    assert found["parameters"] == 2 * LAYERS * 2 * RANK * HIDDEN
    every = run("inspect", lora, "--all").stdout
    assert all(f"model.layers.{layer}.self_attn.v_proj" in every for layer in range(LAYERS))


@pytest.mark.parametrize("flags", [("--all",), ("--json",)])
def test_hostile_names_are_data_not_orders(tmp_path, flags):
    """In a process of its own, so that nothing between the command and its stdout can be kinder than a terminal."""
    folder = make_base(tmp_path / "base", **{f"model.{HOSTILE}.weight": torch.ones(3)})
    done = spawn("inspect", folder, *flags)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout + done.stderr) & set("\x1b\x07\r\u202e")
    if flags == ("--json",):
        document = json.loads(done.stdout)
        assert f"model.{HOSTILE}.weight" in names_below(document["result"]["components"][0]["tree"])
    else:
        assert "evil\\x1b[2J" in done.stdout
        assert "[red]markup[/red]" in done.stdout  # shown, not obeyed


def test_hostile_metadata_and_configuration_are_escaped(run: Run, lora):
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(tensors, lora / "adapter_model.safetensors", {HOSTILE: HOSTILE})
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": HOSTILE}))
    result = run("inspect", lora, "--all")
    assert result.exit_code == 0, result.stderr
    assert not set(result.stdout + result.stderr) & set("\x1b\x07\r\u202e")
    assert result.stdout.count("evil\\x1b") == 3


def test_names_are_whole_where_no_terminal_says_how_wide_it_is(run: Run, tmp_path):
    name = "block." + "x" * 150 + ".weight"
    folder = make_base(tmp_path / "base", **{name: torch.ones(3)})
    assert name in run("inspect", folder, "--all").stdout


def test_report_compares_an_adapter_with_full_copies(run: Run, base, lora, tmp_path):
    result = run("report", lora, "--base", base, "--md", tmp_path / "r.md")
    assert result.exit_code == 0, result.stderr
    assert "full copies" in result.stdout
    assert (tmp_path / "r.md").read_text().startswith("# Savings")
    found = json.loads(run("report", base, lora, "--json").stdout)["result"]
    adapter = found["adapters"][0]
    assert adapter["trained"] == 2 * LAYERS * 2 * RANK * HIDDEN
    assert adapter["nbytes"] == (lora / "adapter_model.safetensors").stat().st_size
    assert [task["tasks"] for task in adapter["tasks"]] == [1, 10, 100]


def test_a_report_replaces_nothing_unasked(run: Run, lora, tmp_path):
    (tmp_path / "r.md").write_text("mine")
    result = run("report", lora, "--md", tmp_path / "r.md")
    assert result.exit_code == 2
    assert (tmp_path / "r.md").read_text() == "mine"
    assert run("report", lora, "--md", tmp_path / "r.md", "--overwrite").exit_code == 0
    assert (tmp_path / "r.md").read_text() != "mine"


def test_report_counts_the_numbers_of_tasks_asked_for(run: Run, base, lora):
    found = json.loads(run("report", base, lora, "--tasks", "7", "--tasks", "3", "--json").stdout)["result"]
    assert [task["tasks"] for task in found["adapters"][0]["tasks"]] == [7, 3]
    assert run("report", lora, "--tasks", "0").exit_code == 2


def test_formats_lists_every_built_in_format(run: Run):
    result = run("formats")
    found = json.loads(run("formats", "--json").stdout)["result"]
    names = [one["name"] for one in found["formats"]]
    assert {"peft", "kohya", "mlx", "compact"} <= set(names)
    assert all(name in result.stdout for name in names)
    assert "llama" in result.stdout
    assert "W' = W + s B A" in result.stdout


def test_env_lists_the_installed_packages(run: Run):
    result = run("env")
    assert torch.__version__ in result.stdout
    found = json.loads(run("env", "--json").stdout)["result"]
    assert {"name": "torch", "version": torch.__version__} in found["packages"]


def test_convert_there_and_back(run: Run, lora, tmp_path):
    there = run("convert", lora, "--to", "mlx", "-o", tmp_path / "mlx")
    assert there.exit_code == 0, there.stderr
    assert f"{2 * LAYERS} exact" in there.stdout
    assert "proof" in there.stdout
    back = run("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back", "--json")
    document = json.loads(back.stdout)
    assert document["command"] == "convert"
    assert document["result"]["output"] == str(tmp_path / "back")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (lora, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_says_what_codes_cost(run: Run, lora, tmp_path):
    result = run("convert", lora, "--to", "compact", "--factors", "int4", "-o", tmp_path / "c", "-v")
    assert result.exit_code == 0, result.stderr
    assert f"{2 * LAYERS} approximated" in result.stdout
    assert "int4 codes in groups of 32, error " in result.stdout
    document = json.loads(run("convert", lora, "--to", "compact", "-o", tmp_path / "d", "--json").stdout)["result"]
    assert 0 < document["max_approximation"] == max(entry["error"] for entry in document["entries"]) < 0.02
    assert run("convert", lora, "--to", "mlx", "--factors", "int8", "-o", tmp_path / "e").exit_code == 4
    assert run("inspect", tmp_path / "c").exit_code == 0


def test_a_dry_run_of_convert_writes_nothing(run: Run, lora, tmp_path):
    result = run("convert", lora, "--to", "mlx", "-o", tmp_path / "mlx", "--dry-run", "-v")
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.self_attn.q_proj" in result.stdout
    assert "nothing was written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_convert_to_what_is_no_format(run: Run, lora, tmp_path):
    result = run("convert", lora, "--to", "koya", "-o", tmp_path / "x")
    assert result.exit_code == 2
    assert "did you mean 'kohya'" in result.stderr


def test_convert_refuses_what_a_format_cannot_hold(run: Run, base, lora, tmp_path):
    words = ("convert", lora, "--to", "kohya", "--base", base, "-o", tmp_path / "x.safetensors")
    result = run(*words)
    assert result.exit_code == 4
    assert "this format names diffusion models only" in result.stderr
    assert "--allow-loss" not in result.stderr, "which would leave nothing"
    assert not (tmp_path / "x.safetensors").exists()


def test_a_column_that_says_nothing_is_not_shown(run: Run, base, lora):
    alone = run("report", lora).stdout
    assert "of a copy" not in alone
    assert "of a copy" in run("report", lora, "--base", base).stdout


def test_extraction_says_when_an_adapter_is_larger_than_the_copy(run: Run):
    words = ("extract-lora", "examples/base", "examples/tuned", "--dry-run", "--rank")
    large = run(*words, "1000").stdout
    assert "times larger than the full copy's" in large
    heading = next(line for line in large.splitlines() if line.startswith("layers") and "times" in line)
    assert heading.endswith("class"), "remarks stand below"
    assert "rank cut from 1000 to 64: the change has no more" in large
    assert "times smaller than the full copy's" in run(*words, "4").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("resize", "examples/lora", "--max-error", ".01"), ("lose a direction", "allow a larger error")),
        (("resize", "examples/lora", "--rank", "16"), ("higher rank than asked", "only add zeros")),
        (("extract-lora", "examples/base", "examples/lora"), ("an adapter where a full model", "surgery merge")),
        (("convert", "examples/lora", "--to", "vllm"), ("vllm is a program: --for vllm",)),
        (("convert", "examples/lora", "--to", "nemo"), ("only read", "choose another format with --to")),
        (("convert", "examples/base", "--to", "mlx"), ("a full model where an adapter", "the other way round")),
        (("extract-lora", "examples/base", "examples/tuned", "--budget", "10X"), ("no budget: write 20MB",)),
        (("extract-lora", "examples/base", "examples/tuned", "--calibration", "nix"), ("nix: no such file",)),
    ],
)
def test_refusals_say_what_to_do(run: Run, words, says):
    done = run(*words, "--dry-run")
    assert done.exit_code in (2, 3, 4)
    for text in says:
        assert text in done.stderr


def test_an_adapter_is_not_asked_for_the_base_it_does_not_hold(run: Run, tmp_path):
    assert run("combine", "examples/lora=0.5", "-o", tmp_path / "half").exit_code == 0
    plain = run("verify", tmp_path / "half")
    assert (plain.exit_code, plain.stderr) == (0, "")
    against = run("verify", tmp_path / "half", "--against", "examples/base")
    assert against.exit_code == 0
    assert "nothing to compare" in against.stderr


@pytest.mark.parametrize(
    ("width", "kept", "left_out"), [(80, "signal", "moved"), (100, "survives", "noise"), (140, "moved", None)]
)
def test_a_narrow_terminal_keeps_names_whole(monkeypatch, run: Run, width, kept, left_out):
    monkeypatch.setattr("surgery_cli.output._width", lambda: width)
    shown = run("extract-lora", "examples/base", "examples/tuned", "--rank", "4", "--dry-run").stdout.splitlines()
    heading = next(line for line in shown if line.startswith("layers"))
    assert kept in heading
    assert left_out is None or left_out not in heading
    assert any(line.startswith("model.layers.*.post_attention_layernorm ") for line in shown)
    assert max(map(len, shown)) <= width


def test_convert_as_lora_asks_by_its_own_flags(run: Run, base, lora, tmp_path):
    refused = run("convert", lora, "--to", "mlx", "--rank", "2", "-o", tmp_path / "x")
    assert refused.exit_code == 2
    assert "--as lora" in refused.stderr
    done = run("convert", lora, "--to", "peft", "--as", "lora", "--rank", "1", "-o", tmp_path / "x", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["result"]
    assert found["as"] == "lora"
    assert all(entry["outcome"] == "approximated" and 0 < entry["error"] < 1 for entry in found["entries"])
    assert found["entries"][0]["detail"] == "cut to rank 1"
