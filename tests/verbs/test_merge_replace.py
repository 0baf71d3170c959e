# SPDX-License-Identifier: Apache-2.0
"""One adapter in the place of another, in one pass: the bytes of an unmerge and a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import surgery
from surgery_cli.group import surgery as command
from tests.support.kit import ROOT, make_base, make_lora


def same(one: Path, two: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reversible", [True, False], ids=["kept", "estimate"])
def test_it_is_what_the_two_commands_give(dtype: torch.dtype, reversible: bool, tmp_path: Path):
    base = make_base(tmp_path / "base", dtype)
    old = make_lora(tmp_path / "old", targets=("self_attn.q_proj", "self_attn.v_proj"))
    new = make_lora(tmp_path / "new", strength=0.3, targets=("self_attn.v_proj", "self_attn.o_proj"))
    merged = surgery.merge(base, (old, 0.5), output=tmp_path / "merged", reversible=reversible).output
    back = surgery.unmerge(merged, (old, 0.5), output=tmp_path / "back").output
    surgery.merge(back, new, output=tmp_path / "two")
    result = surgery.merge(merged, new, replace=(old, 0.5), output=tmp_path / "one")
    assert same(tmp_path / "one", tmp_path / "two")
    assert ("are an estimate" in " ".join(result.warnings)) is not reversible
    if reversible:
        surgery.merge(base, new, output=tmp_path / "fresh")
        assert same(tmp_path / "one", tmp_path / "fresh")
    surgery.verify(tmp_path / "one")


@pytest.mark.parametrize(("old", "new"), [("lora", "dora"), ("dora", "lora")])
def test_a_dora_is_replaced_with_what_the_merge_kept(old: str, new: str, tmp_path: Path):
    base, old_path, new_path = (ROOT / "examples" / name for name in ("base", old, new))
    surgery.merge(base, old_path, output=tmp_path / "merged", reversible=True)
    surgery.merge(tmp_path / "merged", new_path, replace=old_path, output=tmp_path / "one", workers=2)
    surgery.merge(base, new_path, output=tmp_path / "fresh")
    assert same(tmp_path / "one", tmp_path / "fresh")


def test_another_adapter_than_the_merged_one_is_refused(tmp_path: Path):
    base = make_base(tmp_path / "base")
    old, new = make_lora(tmp_path / "old"), make_lora(tmp_path / "new", strength=0.3)
    merged = surgery.merge(base, old, output=tmp_path / "merged").output
    with pytest.raises(surgery.FitError, match="another adapter was merged"):
        surgery.merge(merged, old, replace=new, output=tmp_path / "out")
    with pytest.raises(surgery.FitError, match=r"was merged with the weight 1, not 0\.5"):
        surgery.merge(merged, new, replace=(old, 0.5), output=tmp_path / "out")
    with pytest.raises(surgery.UsageError, match="replaced in plain weights"):
        surgery.merge(merged, new, replace=old, output=tmp_path / "out", reversible=True)
    assert not (tmp_path / "out").exists()


def test_another_weight_is_refused_where_no_file_records_it(tmp_path: Path):
    """0.7 was taken for 1, and the values before were wrong by a quarter of the update."""
    base = make_base(tmp_path / "base")
    old, new = make_lora(tmp_path / "old"), make_lora(tmp_path / "new", strength=0.3)
    merged = surgery.merge(base, old, output=tmp_path / "merged").output
    (merged / "surgery_manifest.json").unlink()
    for weight in (0.7, 1.4):
        with pytest.raises(surgery.FitError, match="times its update: 1 if it was merged"):
            surgery.merge(merged, new, replace=(old, weight), output=tmp_path / "out")
    surgery.merge(merged, new, replace=old, output=tmp_path / "out")


def test_a_base_of_another_type_is_refused(tmp_path: Path):
    base = make_base(tmp_path / "base")
    old, new = make_lora(tmp_path / "old"), make_lora(tmp_path / "new", strength=0.3)
    merged = surgery.merge(base, old, output=tmp_path / "merged", dtype="fp32", reversible=True).output
    with pytest.raises(surgery.FitError, match="its base had other tensors, or another type"):
        surgery.merge(merged, new, replace=old, output=tmp_path / "out")


def test_the_command_takes_pairs(tmp_path: Path):
    base = make_base(tmp_path / "base")
    old, new = make_lora(tmp_path / "old"), make_lora(tmp_path / "new", strength=0.3)
    merged = surgery.merge(base, {old: 0.5}, output=tmp_path / "merged", reversible=True).output
    words = ["merge", str(merged), "--replace", f"{old}=0.5={new}=0.7", "-o", str(tmp_path / "out")]
    ran = CliRunner().invoke(command, words, prog_name="surgery")
    assert ran.exit_code == 0, ran.output
    surgery.merge(base, {new: 0.7}, output=tmp_path / "fresh")
    assert same(tmp_path / "out", tmp_path / "fresh")
    for wrong in (f"{old}", f"{old}=", f"{old}={new}={new}"):
        ran = CliRunner().invoke(command, ["merge", str(merged), "--replace", wrong, "-o", str(tmp_path / "never")])
        assert ran.exit_code == 2
    assert CliRunner().invoke(command, ["merge", str(merged), "-o", str(tmp_path / "never")]).exit_code == 2
