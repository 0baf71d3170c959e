# SPDX-License-Identifier: Apache-2.0
"""loralib's state dicts: with the alpha they lack they merge to what its own layers merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

import surgery
from surgery import combine, convert
from surgery_cli.group import surgery as command
from surgery_formats.adapters.loralib import LORALIB
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.errors import FitError, MalformedError, UsageError
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

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
    with pytest.raises(FitError, match="files of kohya state their scale"):
        surgery.open(GOLDEN / "kohya/sd1/lora/adapter.safetensors", alpha=12)
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


def test_the_expected_weights_are_those_of_the_adapter(tmp_path: Path) -> None:
    adapter = surgery.open(HERE / "all.pt", alpha=12)
    assert_expected(BASE, merged(BASE, adapter, tmp_path / "out"), HERE / "expected.safetensors")


def test_what_it_reads_it_writes_and_says_the_alpha(tmp_path: Path) -> None:
    source = surgery.open(HERE / "all.pt", alpha=12)
    result = convert(source, "loralib", output=tmp_path / "x.pt")
    assert {entry.outcome for entry in result.entries} == {"exact"}
    assert result.warnings[-1] == "files of loralib state no scale: this one is read with alpha 12"
    mine, theirs = (torch.load(path, weights_only=True) for path in (tmp_path / "x.pt", HERE / "all.pt"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_scales_of_modules_meet_in_one_alpha(tmp_path: Path) -> None:
    stem = "base_model.model.layers.{}.fc1"
    tensors = {}
    for layer, rank in ((0, 2), (1, 4)):
        tensors[f"{stem.format(layer)}.lora_A.weight"] = draw(layer, rank, 16)
        tensors[f"{stem.format(layer)}.lora_B.weight"] = draw(9 + layer, 40, rank)
    lora = write_peft(tmp_path / "lora", tensors, r=2, lora_alpha=8, use_rslora=True)
    result = convert(lora, "loralib", output=tmp_path / "x.pt")
    assert [entry.outcome for entry in result.entries] == ["exact", "folded"]
    alpha = 8 * 2**0.5
    assert f"alpha {alpha:g}" in result.warnings[-1]
    mine, theirs = (
        merged(BASE, surgery.open(tmp_path / "x.pt", alpha=alpha), tmp_path / "a"),
        merged(BASE, lora, tmp_path / "b"),
    )
    assert all(abs(mine[key] - value).max() <= 1e-6 * abs(value).max() for key, value in theirs.items())
    more = combine([lora, lora], output=tmp_path / "two.pt", to="loralib")
    assert any("is read with alpha" in warning for warning in more.warnings)


@pytest.mark.parametrize(
    ("key", "config", "why"),
    [
        ("table.lora_embedding_A", {}, "its name alone tells"),
        ("layers.0.fc1.lora_magnitude_vector", {"use_dora": True}, "no DoRA"),
        ("layers.0.fc1.lora_B.bias", {"lora_bias": True}, "no offset"),
    ],
)
def test_what_loralib_has_no_place_for_is_named(key: str, config: dict[str, bool], why: str, tmp_path: Path) -> None:
    stem = "base_model.model"
    tensors = {
        f"{stem}.layers.0.fc1.lora_A.weight": draw(1, 2, 16),
        f"{stem}.layers.0.fc1.lora_B.weight": draw(2, 40, 2),
    }
    if "embedding" in key:
        tensors |= {f"{stem}.table.lora_embedding_A": draw(3, 2, 24), f"{stem}.table.lora_embedding_B": draw(4, 16, 2)}
    else:
        tensors[f"{stem}.{key}"] = abs(draw(5, 40)) + 1
    with pytest.raises(FitError, match=why):
        convert(write_peft(tmp_path / "x", tensors, r=2, **config), "loralib", output=tmp_path / "x.pt")


@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_the_suite_of_formats(check: Callable[[FormatCase, Path], None], tmp_path: Path) -> None:
    def write(folder: Path) -> Path:
        (folder / "golden").mkdir(exist_ok=True)
        return Path(shutil.copy(HERE / "all.pt", folder / "golden"))

    check(FormatCase(LORALIB.with_alpha(12), write), tmp_path)


def test_a_file_of_gpt2_is_not_one_of_diffusers(tmp_path: Path) -> None:
    """Its modules begin with ``transformer.``; without an alpha it is refused, where diffusers' would mean the rank."""
    module = "transformer.h.0.attn.c_attn"
    torch.save({f"{module}.lora_A": torch.ones(2, 8), f"{module}.lora_B": torch.ones(24, 2)}, tmp_path / "g.pt")
    assert format_at(tmp_path / "g.pt") is LORALIB
    with pytest.raises(FitError, match="stores no lora_alpha"):
        read_adapter(tmp_path / "g.pt")
