# SPDX-License-Identifier: Apache-2.0
"""A recipe gives what its commands give; a manifest gives the same bytes again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import surgery
from surgery.verbs.layers import rebuild
from surgery_cli.group import surgery as command
from tests.support.kit import ROOT, make_base, make_lora

EXAMPLES = ROOT / "examples"


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example, which is the current one."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


CHAIN = """\
# Two styles, one model.
inputs:
  base: examples/base
steps:
  - verb: combine
    adapters: {examples/lora: 0.75, examples/dora: 0}
    method: svd
    rank: 6
    as: both
  - verb: merge
    base: base
    adapters: both
    dtype: fp32
output: merged
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest(one: Path, two: Path) -> float:
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


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


MANIFESTS: Mapping[str, Any] = {
    "merge": lambda out: surgery.merge("examples/base", {"examples/lora": 0.5, "examples/dora": 1}, output=out),
    "merge in fp32": lambda out: surgery.merge(
        "examples/base", "examples/lora", output=out, dtype="fp32", shard_size=9**6
    ),
    "reversible": lambda out: surgery.merge("examples/base", "examples/lora", output=out, reversible=True),
    "layers": lambda out: surgery.layers("examples/base", keep="0,2-3", output=out),
    "combine": lambda out: surgery.combine({"examples/lora": 0.5}, output=out),
    "resize": lambda out: surgery.resize("examples/lora", rank=surgery.Rank(4), output=out),
    "extract": lambda out: surgery.extract_lora(
        "examples/base", "examples/tuned", rank=surgery.Rank.energy(0.9), output=out
    ),
    "fresh": lambda out: surgery.insert("examples/base", new="lora", rank=2, seed=5, output=out),
    "unmerged": lambda out: surgery.insert("examples/base", "examples/lora", unmerged=True, output=out),
    "prompt": lambda out: surgery.prompt_bake("examples/prompt", "examples/base", output=out),
    "convert": lambda out: surgery.convert("examples/lora", "mlx", output=out),
    "export": lambda out: surgery.export_onnx("examples/base", merge="examples/lora", output=out, target="cpu"),
    "recipe": lambda out: surgery.apply(write(CHAIN), output=out),
}


@pytest.mark.parametrize("verb", MANIFESTS)
def test_a_manifest_gives_the_same_bytes_again(verb: str, kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    (kitchen / "there").mkdir()
    MANIFESTS[verb](kitchen / "there" / "out")
    manifest = "there/out/surgery_manifest.json"
    monkeypatch.chdir(kitchen / "examples")
    result = surgery.apply(kitchen / manifest, output=kitchen / "again")
    assert result.same
    assert files_of(kitchen / "there" / "out") == files_of(kitchen / "again")
    assert str(kitchen).encode() not in b"".join(files_of(kitchen / "again").values())


def test_a_manifest_finds_its_inputs_by_their_content(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    base, lora = make_base(kitchen / "base"), make_lora(kitchen / "lora")
    surgery.merge(base, lora, output="out")
    (kitchen / "elsewhere").mkdir()
    monkeypatch.chdir(kitchen / "elsewhere")
    manifest = "../out/surgery_manifest.json"
    assert surgery.apply(manifest, output="beside the folder").same
    lora.rename(kitchen / "under another name")
    surgery.apply(manifest, output="renamed")
    assert Path("renamed/model.safetensors").read_bytes() == Path("../out/model.safetensors").read_bytes()
    (kitchen / "under another name").rename(kitchen / "examples" / "far away")
    with pytest.raises(surgery.NotFoundError, match="the input 'adapters' is neither here nor beside"):
        surgery.apply(manifest, output="never")
    surgery.apply(manifest, output="told", inputs={"adapters": kitchen / "examples" / "far away"})
    assert Path("told/model.safetensors").read_bytes() == Path("../out/model.safetensors").read_bytes()
    with pytest.raises(surgery.UsageError, match="has no input 'adapter'"):
        surgery.apply(manifest, output="never", inputs={"adapter": base})
    other = make_lora(kitchen / "lora", strength=2.0)
    with pytest.raises(surgery.FitError, match="is not the input 'adapters' that the recipe was applied to"):
        surgery.apply(manifest, output="never", inputs={"adapters": other})
    assert not Path("never").exists()


def test_what_was_in_memory_cannot_be_applied_again(kitchen: Path):
    shallow = rebuild(surgery.open("examples/base"), drop="4-").checkpoint
    lora = surgery.open("examples/lora")
    surgery.merge(shallow, lora.only(s for s in lora.updates if ".0." in s.path), output="out")
    with pytest.raises(surgery.FitError, match="was in memory and not in a file"):
        surgery.apply("out/surgery_manifest.json", output="again")


WRONG: Mapping[str, tuple[str, str]] = {
    "no verb": ("steps:\n  - {base: x}\n", "line 2: step 1 has no verb"),
    "verb": ("steps:\n  - verb: mrege\n", "step 1 (mrege), line 2: no step does 'mrege'; did you mean"),
    "option": (
        "steps:\n  - verb: merge\n    bsae: x\n",
        "step 1 (merge), line 2: 'bsae' (line 3) is no option of merge",
    ),
    "place": ("steps:\n  - verb: merge\n    dry-run: yes\n", "'dry-run' (line 3) is no option"),
    "nowhere": ("steps:\n  - {verb: merge, base: x, adapters: y}\n", "its result is written nowhere"),
    "later": (
        "steps:\n  - {verb: merge, base: b, adapters: y, output: o}\n  - {verb: layers, base: x, keep: 1, output: p, as: b}\n",
        "'b' is the result of a later step",
    ),
    "weight": ("steps:\n  - {verb: merge, base: x, adapters: {y: much}, output: o}\n", "the weight of 'y' (line 2)"),
    "twice": ("steps: []\nsteps: []\n", "line 2: 'steps' stands there twice"),
    "none": ("steps: []\n", "has no steps"),
    "other": ("stages: []\n", "line 1: 'stages' is no part of a recipe"),
    "names": (
        "inputs: {a: x}\nsteps:\n  - {verb: merge, base: a, adapters: y, as: a, output: o}\n",
        "is the name of something",
    ),
    "no yaml": ("steps: [\n", "no YAML"),
    "alias": ("a: &x [1]\nsteps: *x\n", "line 1: anchors and aliases are not read"),
    "tag": ("steps: !!python/object/apply:os.system [ls]\n", "line 1: tags are not read"),
    "deep": ("steps: " + "[" * 50 + "]" * 50, "nested deeper than 16"),
    "list": ("- 1\n", "is no mapping"),
    "empty": ("", "is empty"),
    "two": ("steps: []\n---\nsteps: []\n", "holds several documents"),
    "inputs": ("inputs: {1 2: x}\nsteps: [{verb: merge}]\n", "line 1: '1 2' is no name"),
    "no text": ("inputs: {a: [x]}\nsteps: [{verb: merge}]\n", "line 1: 'a' is no reference"),
    "rank": (
        "steps:\n  - {verb: resize, adapter: examples/lora, rank: lots, output: o}\n",
        "step 1 (resize), line 2: rank is a whole number",
    ),
    "several": (
        "steps:\n  - {verb: resize, adapter: [examples/lora, examples/dora], rank: 2, output: o}\n",
        "step 1 (resize), line 2: adapter names 2",
    ),
    "type, in memory": (
        "steps:\n  - {verb: combine, adapters: examples/lora, density: some, as: a}\n"
        "  - {verb: merge, base: examples/base, adapters: a, output: o}\n",
        "step 1 (combine), line 2: density is a number, not str",
    ),
    "list, in memory": (
        "steps:\n  - {verb: layers, base: examples/base, keep: [0, 1], as: b}\n"
        "  - {verb: merge, base: b, adapters: examples/lora, output: o}\n",
        "step 1 (layers), line 2: keep is a text, not list",
    ),
    "kind, in memory": (
        "steps:\n  - {verb: layers, base: examples/base, fuse: kv, as: b}\n"
        "  - {verb: merge, base: b, adapters: examples/lora, output: o}\n",
        "step 1 (layers), line 2: no projection 'kv'",
    ),
    "file": ("steps:\n  - {verb: merge, base: nowhere, adapters: y, output: o}\n", "step 1 (merge), line 2: no such"),
    "fault": (
        "steps:\n\n  - {verb: layers, base: examples/base, keep: 99, output: o}\n",
        "step 1 (layers), line 3: there is no layer 99",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_step_and_line(what: str, kitchen: Path):
    text, error = WRONG[what]
    with pytest.raises(surgery.SurgeryError) as raised:
        surgery.apply(write(text))
    assert error in str(raised.value)
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml"}


def test_a_recipe_is_bounded(kitchen: Path):
    with pytest.raises(surgery.MalformedError, match="at most 1048576 are read"):
        surgery.apply(write("#" * (2 << 20)))
    with pytest.raises(surgery.MalformedError, match="more than 50000 values"):
        surgery.apply(write("steps: [" + "1, " * 60_000 + "]"))
    with pytest.raises(surgery.NotFoundError):
        surgery.apply("nowhere.yaml")


def test_a_failed_step_leaves_nothing_temporary(kitchen: Path):
    recipe = write("""\
steps:
  - {verb: merge, base: examples/base, adapters: examples/lora, as: merged}
  - {verb: extract-lora, base: examples/base, tuned: merged, rank: 8, dtype: int3, output: found}
""")
    with pytest.raises(surgery.SurgeryError, match=r"step 2 \(extract-lora\), line 3"):
        surgery.apply(recipe)
    assert {path.name for path in kitchen.iterdir()} == {"examples", "recipe.yaml"}


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
    ran = CliRunner().invoke(command, ["apply", write(WRONG["fault"][0])])
    assert ran.exit_code == 4
    assert "step 1 (layers), line 3" in ran.output


def test_numbers_of_layers_are_texts_where_a_text_is_meant(kitchen: Path):
    surgery.apply(write("steps:\n  - {verb: layers, base: examples/base, keep: 3, output: o}\n"))
    assert json.loads(Path("o/config.json").read_text())["num_hidden_layers"] == 1
    assert torch.equal(
        load_file("o/model.safetensors")["model.layers.0.mlp.up_proj.weight"],
        load_file("examples/base/model.safetensors")["model.layers.3.mlp.up_proj.weight"],
    )


def again(folder: str, **inputs: str) -> bool | None:
    """Whether the manifest of a folder gives its bytes again."""
    result = surgery.apply(f"{folder}/surgery_manifest.json", output=f"{folder} again", inputs=inputs)
    return result.same and files_of(Path(folder)) == files_of(Path(f"{folder} again"))


def test_the_manifest_of_each_output_holds_the_steps_that_lead_to_it(kitchen: Path):
    """Another output's are not among them, and later ones neither."""
    surgery.apply(
        write("""\
steps:
  - {verb: merge, base: examples/base, adapters: examples/lora, output: first, as: merged}
  - {verb: merge, base: examples/base, adapters: examples/dora, output: other}
  - {verb: layers, base: merged, drop: 2, output: last}
""")
    )
    steps = {
        name: json.loads(Path(name, "surgery_manifest.json").read_text())["recipe"]["steps"]
        for name in ("first", "last")
    }
    assert [[step["verb"] for step in some] for some in steps.values()] == [["merge"], ["merge", "layers"]]
    lora = {"base": "examples/base", "adapters": "examples/lora"}
    assert again("first", **lora)
    assert again("last", **lora)
    assert again("other", base="examples/base", adapters="examples/dora")


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


def test_a_model_whose_adapter_was_moved_is_made_again_and_the_adapter_names_no_recipe(kitchen: Path):
    surgery.layers("examples/base", drop="2", output="out", adapter="examples/lora", adapter_output="moved")
    assert again("out", base="examples/base", adapter="examples/lora")
    with pytest.raises(surgery.FitError, match="does not say which command made it"):
        surgery.apply("moved/surgery_manifest.json", output="never")


@pytest.mark.parametrize("how", ["command", "recipe"])
def test_a_list_of_tokens_is_an_input_by_its_content(how: str, kitchen: Path):
    (kitchen / "deep").mkdir()
    Path("deep/ids.json").write_text(json.dumps(list(range(50))))
    ids = str(kitchen / "deep" / "ids.json")
    if how == "command":
        surgery.layers("examples/base", vocab=f"trim={ids}", output="out")
    else:
        surgery.apply(
            write(f"steps:\n  - {{verb: layers, base: examples/base, vocab: trim={ids}, output: out}}\n"),
        )
    kept = json.loads(Path("out/surgery_manifest.json").read_text())["recipe"]
    assert kept["steps"] == [{"verb": "layers", "base": "base", "vocab": "trim=vocab"}]
    assert str(kitchen).encode() not in b"".join(files_of(kitchen / "out").values())
    assert again("out", base="examples/base", vocab="deep/ids.json")
    Path("deep/ids.json").write_text(json.dumps(list(range(51))))
    with pytest.raises(surgery.FitError, match="is not the input 'vocab'"):
        surgery.apply("out/surgery_manifest.json", output="never", inputs={"base": "examples/base", "vocab": ids})


def test_powers_of_ten_are_numbers_and_times_of_day_are_none(kitchen: Path):
    surgery.apply(write("steps:\n  - {verb: merge, base: examples/base, adapters: {examples/lora: 5e-1}, output: o}\n"))
    surgery.merge("examples/base", {"examples/lora": 0.5}, output="two")
    assert largest(kitchen / "o", kitchen / "two") == 0
    with pytest.raises(surgery.UsageError, match="is no number"):
        surgery.apply(
            write("steps:\n  - {verb: merge, base: examples/base, adapters: {examples/lora: 1:30}, output: p}\n")
        )


@pytest.mark.parametrize("value", ["yes", "[0, 1]", "{a: b}"])
def test_a_text_is_no_list(value: str, kitchen: Path):
    with pytest.raises(surgery.UsageError, match=r"step 1 \(layers\), line 2: keep is a text, not"):
        surgery.apply(write(f"steps:\n  - {{verb: layers, base: examples/base, keep: {value}, output: o}}\n"))


def test_an_option_of_apply_is_said_to_be_one(kitchen: Path):
    with pytest.raises(surgery.UsageError) as raised:
        surgery.apply(write("steps:\n  - {verb: layers, base: examples/base, keep: 1, overwrite: yes, output: o}\n"))
    assert raised.value.hint == "it is an option of apply itself"
