# SPDX-License-Identifier: Apache-2.0
"""A base and an adapter small enough to be made anew for each test, and the command in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery_cli.group import surgery
from tests.support.kit import Run, make_base, make_lora


@pytest.fixture
def run() -> Run:
    """``run("merge", ...)`` in this process."""
    return lambda *words: CliRunner().invoke(surgery, [str(word) for word in words])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama-shaped model in bf16."""
    return make_base(tmp_path / "base")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A PEFT LoRA for `base`, strong enough to survive bf16."""
    return make_lora(tmp_path / "lora")
