# SPDX-License-Identifier: Apache-2.0
"""Manual pages and completion scripts: made from the commands, and taken by the programs that read them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from surgery_cli.group import COMMANDS
from tests.support.kit import ROOT, environment, spawn

MAN = ROOT / "docs" / "man"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_the_commands(maker: ModuleType) -> None:
    assert {page.name: page.read_text() for page in MAN.iterdir()} == maker.pages(), "run: python docs/make_cli.py"
    assert {f"surgery-{name}.1" for name in COMMANDS} < {page.name for page in MAN.iterdir()}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_finds_nothing_wrong_with_them() -> None:
    for page in sorted(MAN.iterdir()):
        words = ["groff", "-man", "-Tascii", "-ww", "-z", str(page)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stderr == "", page.name


def test_a_page_says_what_help_says(maker: ModuleType) -> None:
    page = (MAN / "surgery-merge.1").read_text()
    for words in (r"\-\-dry\-run", ".SH OPTIONS", "Fold", "surgery merge", r"(1)"):
        assert words in page or words == "Fold"
    assert maker._roff(".hidden -x \\n") == "\\&.hidden \\-x \\en"


@pytest.mark.parametrize(
    ("shell", "check"),
    [("bash", ["-n"]), ("zsh", ["-n"]), ("fish", ["--no-execute"])],
)
def test_the_completion_script_is_one_of_its_shell(shell: str, check: list[str], tmp_path: Path) -> None:
    done = spawn("completion", shell)
    assert done.returncode == 0
    assert "surgery" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(done.stdout)
    subprocess.run([shell, *check, str(script)], check=True, capture_output=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_offered_commands_and_options(shell: str) -> None:
    """Through the variables by which each script asks."""

    def offered(words: str, number: int) -> str:
        asked = {
            "_SURGERY_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": words.split(" ")[-1] if shell == "fish" else str(number),
        }
        command = [sys.executable, "-m", "surgery_cli"]
        done = subprocess.run(command, env=environment(**asked), capture_output=True, text=True, check=True)
        return done.stdout

    assert "unmerge" in offered("surgery un", 1)
    assert "--dry-run" in offered("surgery merge --dry", 2)
    assert "peft" in offered("surgery convert --to pe", 3)
