# SPDX-License-Identifier: Apache-2.0
"""loralib's state dicts: with the alpha they lack they merge to what its own layers merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

import surgery
from surgery import convert
from surgery_cli.group import surgery as command
from surgery_formats.adapters.loralib import LORALIB
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.errors import FitError, MalformedError, UsageError
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged

HERE = GOLDEN / "loralib"
BASE = HERE / "base"


@pytest.mark.parametrize("name", ["none", "all"])
def test_merges_to_what_loralib_merges(name: str, tmp_path: Path) -> None:
    assert format_at(HERE / f"{name}.pt") is LORALIB
    adapter = surgery.open(HERE / f"{name}.pt", alpha=12)
    assert adapter.unconsumed() == ()
    expected = load_file(HERE / "expected.safetensors")
    before = load_file(BASE / "model.safetensors")
    got = merged(BASE, adapter, tmp_path / "out")
    for key, values in expected.items():
        wanted = before[key] if key.endswith("bias") and name == "none" else values
        assert abs(got[key] - wanted).max() <= 1e-6 * max(1e-3, abs(wanted - before[key]).max()), key


def test_it_asks_for_the_alpha(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="loralib stores no lora_alpha"):
        read_adapter(HERE / "none.pt")
    with pytest.raises(FitError, match="files of mlx state their scale"):
        surgery.open(GOLDEN / "mlx/llama/lora-keys", alpha=12)
    with pytest.raises(UsageError, match="an alpha belongs to an adapter"):
        surgery.open("examples/base", alpha=12)
    with pytest.raises(FitError, match="is not finite"):
        surgery.open(HERE / "none.pt", alpha=float("nan"))


def test_the_command_takes_it(tmp_path: Path) -> None:
    run = CliRunner().invoke
    file = str(HERE / "none.pt")
    asked = run(command, ["merge", str(BASE), file, "-o", str(tmp_path / "a")])
    assert asked.exit_code == 4
    assert "alpha" in asked.output
    assert run(command, ["merge", str(BASE), file, "--alpha", "12", "-o", str(tmp_path / "a")]).exit_code == 0
    shown = run(command, ["inspect", file, "--alpha", "12"])
    assert shown.exit_code == 0
    assert "loralib" in shown.output
    assert run(command, ["convert", file, "--alpha", "12", "--to", "peft", "-o", str(tmp_path / "p")]).exit_code == 0
    with_bias = merged(BASE, surgery.open(HERE / "none.pt", alpha=12), tmp_path / "b")
    again = merged(BASE, tmp_path / "p", tmp_path / "c")
    assert all((with_bias[key] == again[key]).all() for key in with_bias)


def test_a_fused_layer_and_odd_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="a MergedLinear"):
        read_adapter(HERE / "fused.pt", alpha=12)
    torch.save({"a.lora_A": torch.from_numpy(draw(1, 2, 8))}, tmp_path / "a.pt")
    with pytest.raises(MalformedError, match="without its 'lora_B'"):
        read_adapter(tmp_path / "a.pt", alpha=1)
    with pytest.raises(FitError, match="they are only read"):
        convert("examples/lora", "loralib", output=tmp_path / "x.pt")


def test_the_expected_weights_are_those_of_the_adapter(tmp_path: Path) -> None:
    adapter = surgery.open(HERE / "all.pt", alpha=12)
    assert_expected(BASE, merged(BASE, adapter, tmp_path / "out"), HERE / "expected.safetensors")
