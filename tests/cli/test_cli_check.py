# SPDX-License-Identifier: Apache-2.0
"""``surgery check`` and ``surgery convert --for`` on the command line: exit codes, usage, screens."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.kit import Run

ROOT = Path(__file__).parents[2]
BASE, LORA, DORA = (str(ROOT / "examples" / name) for name in ("base", "lora", "dora"))


def test_exit_code_6_says_that_a_program_does_not_honour_it(run: Run):
    assert run("check", BASE, LORA, "--for", "vllm").exit_code == 0
    refused = run("check", BASE, DORA, "--for", "vllm")
    assert refused.exit_code == 6
    assert "vLLM does not yet support DoRA" in refused.stdout
    assert run("check", BASE, DORA).exit_code == 0  # a table of all is no question about one


def test_json_has_every_verdict_and_the_sources(run: Run):
    result = run("--json", "check", BASE, DORA, "--for", "vllm@0.33.0")
    assert result.exit_code == 6
    found = json.loads(result.stdout)["result"]
    (check,) = found["consumers"]
    assert (found["honoured"], check["outcome"], check["version"]) == (False, "refused", "0.33.0")
    assert {verdict["what"] for verdict in check["verdicts"]} == {"DoRA"}
    assert check["sources"][0]["program"] == "vllm"


def test_what_was_fixed_exits_with_0_and_is_honoured(run: Run, tmp_path: Path):
    out = str(tmp_path / "out")
    fixed = run("check", BASE, DORA, "--for", "llama.cpp", "--fix", out, "--max-error", ".4")
    assert fixed.exit_code == 0, fixed.stderr
    assert "honoured by llama.cpp" in fixed.stdout
    assert run("check", BASE, out, "--for", "llama.cpp").exit_code == 0
    again = run("convert", LORA, "--for", "edge-llm", "--base", BASE, "-o", str(tmp_path / "converted"))
    assert again.exit_code == 0, again.stderr


def test_options_that_do_not_go_together_are_usage(run: Run, tmp_path: Path):
    out = str(tmp_path / "out")
    for words, message in (
        (("check", BASE, LORA, "--fix", out), "--fix goes with --for"),
        (("check", BASE, LORA, "--for", "vllm", "--saved", "drop"), "go with --fix"),
        (("check", BASE, LORA, "--for", "vlm"), "no consumer 'vlm'"),
        (("convert", LORA, "-o", out), "either --to FORMAT or --for CONSUMER"),
        (("convert", LORA, "--to", "peft", "--saved", "drop", "-o", out), "go with --for"),
    ):
        result = run(*words)
        assert result.exit_code == 2, words
        assert message in result.stderr
