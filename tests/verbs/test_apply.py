# SPDX-License-Identifier: Apache-2.0
"""A recipe gives what its commands give, and writes nothing between them that nobody keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import surgery
from surgery.verbs.layers import rebuild
from surgery_cli.group import surgery as command
from tests.support.applied_recipes import CHAIN, again, files_of, largest, write


def test_what_is_between_two_steps_is_not_written(kitchen: Path):
    result = surgery.apply(write(CHAIN))
    surgery.combine({"examples/lora": 0.75, "examples/dora": 0}, method="svd", rank=6, output="both")
    surgery.merge("examples/base", "both", output="two", dtype="fp32")
    assert largest(kitchen / "merged", kitchen / "two") < 1e-6  # factors of the command are rounded to float32
    assert [step.place for step in result.steps] == ["memory", "output"]
    assert result.output == Path("merged")
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml", "merged", "both", "two"}


def test_a_dry_run_writes_nothing_and_says_where(kitchen: Path):
    result = surgery.apply(write(CHAIN), dry_run=True)
    assert result.output is None
    assert "not written: its user takes it from memory" in str(result)
    assert not (kitchen / "merged").exists()


def test_layers_their_adapter_and_a_merge_are_one_pass(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: layers, base: examples/base, drop: 2, adapter: examples/lora, as: shallow}
  - {verb: merge, base: shallow, adapters: shallow.adapter, output: merged}
  - {verb: verify, output: merged}
""")
    result = surgery.apply(recipe)
    surgery.layers("examples/base", drop="2", output="a", adapter="examples/lora", adapter_output="b")
    surgery.merge("a", "b", output="two")
    assert largest(kitchen / "merged", kitchen / "two") == 0
    assert json.loads(Path("merged/config.json").read_text()) == json.loads(Path("two/config.json").read_text())
    assert [step.place for step in result.steps] == ["memory", "output", "check"]


def test_layers_in_memory_take_what_the_command_takes(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: layers, base: examples/base, fuse: gate-up, workers: 2, as: joined}
  - {verb: merge, base: joined, adapters: examples/lora, without: ["*.gate_proj", "*.up_proj"], output: merged}
""")
    result = surgery.apply(recipe)
    surgery.layers("examples/base", fuse="gate-up", output="a")
    surgery.merge("a", "examples/lora", without=["*.gate_proj", "*.up_proj"], output="two")
    assert largest(kitchen / "merged", kitchen / "two") == 0
    assert [step.place for step in result.steps] == ["memory", "output"]


def test_an_adapter_that_is_kept_beside_layers_that_are_not_is_written(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: layers, base: examples/base, drop: 2, adapter: examples/lora, adapter-out: kept, as: shallow}
  - {verb: merge, base: shallow, adapters: shallow.adapter, output: merged}
""")
    for overwrite in (False, True):
        result = surgery.apply(recipe, overwrite=overwrite)
        assert [step.place for step in result.steps] == ["temporary", "output"]
    surgery.layers("examples/base", drop="2", output="a", adapter="examples/lora", adapter_output="b")
    assert files_of(Path("kept")).keys() == files_of(Path("b")).keys()
    assert Path("kept/adapter_model.safetensors").read_bytes() == Path("b/adapter_model.safetensors").read_bytes()
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml", "merged", "kept", "a", "b"}


def test_a_merge_in_front_of_an_export_is_the_exports(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: resize, adapter: examples/lora, rank: 4, as: small}
  - {verb: merge, base: examples/base, adapters: [{small: 0.5}], as: merged}
  - {verb: export-onnx, base: merged, target: cpu, output: graph}
""")
    result = surgery.apply(recipe)
    assert [step.place for step in result.steps] == ["memory", "folded", "output"]
    surgery.resize("examples/lora", rank=4, output="small")
    surgery.verify("graph", against="examples/base", adapters={"small": 0.5})


def test_a_graph_of_other_layers_is_of_files(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: layers, base: examples/base, repeat: 1, adapter: examples/lora, as: deep}
  - {verb: export-onnx, base: deep, merge: deep.adapter, target: cpu, output: graph}
  - {verb: verify, output: graph}
""")
    result = surgery.apply(recipe)
    assert [step.place for step in result.steps] == ["temporary", "output", "check"]
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml", "graph"}
    unwritten = rebuild(surgery.open("examples/base"), repeat="1").checkpoint
    with pytest.raises(surgery.FitError, match="is not written yet"):
        surgery.export_onnx(unwritten, output="never")
    with pytest.raises(surgery.UsageError, match="a base that is not written cannot come back"):
        surgery.merge(unwritten, "examples/lora", output="never", reversible=True)


def test_what_has_to_be_a_file_is_temporary(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: merge, base: examples/base, adapters: examples/lora, as: merged}
  - {verb: extract-lora, base: examples/base, tuned: merged, rank: 8, as: found}
  - {verb: convert, adapter: found, to: mlx, as: flat}
  - {verb: convert, adapter: flat, to: peft, base: examples/base, output: again}
""")
    result = surgery.apply(recipe)
    assert [step.place for step in result.steps] == ["temporary", "temporary", "temporary", "output"]
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml", "again"}
    assert surgery.open("again").parameters == surgery.open("examples/lora").parameters


def test_the_command_says_what_it_did(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    ran = CliRunner().invoke(command, ["apply", write(CHAIN), "-o", "here"], prog_name="surgery")
    assert ran.exit_code == 0, ran.output
    assert "combine" in ran.output
    shutil.move(kitchen / "here", kitchen / "examples" / "here")
    monkeypatch.chdir(kitchen / "examples")
    ran = CliRunner().invoke(command, ["apply", "here/surgery_manifest.json", "-o", "again", "--input", "base=base"])
    assert ran.exit_code == 0, ran.output
    assert "every file is what it was" in ran.output
    monkeypatch.chdir(kitchen)
    ran = CliRunner().invoke(command, ["apply", "recipe.yaml", "--input", "base"])
    assert ran.exit_code == 2
    ran = CliRunner().invoke(
        command, ["apply", write("steps:\n\n  - {verb: layers, base: examples/base, keep: 99, output: o}\n")]
    )
    assert ran.exit_code == 4
    assert "step 1 (layers), line 3" in ran.output


@pytest.mark.parametrize("how", ["output: shallow", "dtype: fp32", "output: shallow, adapter-out: moved"])
def test_an_adapter_is_moved_with_layers_that_are_written_too(how: str, kitchen: Path):
    surgery.apply(
        write(f"""\
steps:
  - {{verb: layers, base: examples/base, drop: 2, adapter: examples/lora, {how}, as: shallow}}
  - {{verb: merge, base: shallow, adapters: shallow.adapter, output: merged}}
""")
    )
    dtype = "fp32" if "dtype" in how else "keep"
    surgery.layers("examples/base", drop="2", output="a", adapter="examples/lora", adapter_output="b", dtype=dtype)
    surgery.merge("a", "b", output="two")
    assert largest(kitchen / "merged", kitchen / "two") == 0
    assert Path("moved").exists() == ("adapter-out" in how)
    assert not list(kitchen.glob(".surgery*"))
    same = again("merged", base="examples/base", adapter="examples/lora")
    assert same or "adapter-out" in how  # the model card names the folder of the adapter
    assert Path("merged/model.safetensors").read_bytes() == Path("merged again/model.safetensors").read_bytes()
