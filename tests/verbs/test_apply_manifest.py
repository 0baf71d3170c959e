# SPDX-License-Identifier: Apache-2.0
"""A manifest, applied, gives the same bytes again, wherever its inputs lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.verbs.layers import rebuild
from tests.support.applied_recipes import CHAIN, again, files_of, write
from tests.support.kit import make_base, make_lora

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


def test_a_card_calls_the_results_of_steps_as_the_recipe_does(kitchen: Path):
    """Wherever they lie: one is in a folder of its own at first, and in a hidden one when the last is made again."""
    surgery.apply(
        write("""\
steps:
  - {verb: merge, base: examples/base, adapters: examples/lora, output: first, as: merged}
  - {verb: layers, base: merged, drop: 2, output: last}
""")
    )
    assert Path("last/README.md").read_text().count("`merged`") == 2  # in the title and in the table
    assert "first" not in Path("last/README.md").read_text()
    assert again("last", base="examples/base", adapters="examples/lora")


def test_a_card_that_calls_an_input_by_another_name_is_told(kitchen: Path):
    surgery.layers("examples/base", drop="2", output="out")
    (kitchen / "examples" / "base").rename(kitchen / "examples" / "renamed")
    result = surgery.apply("out/surgery_manifest.json", output="again", inputs={"base": "examples/renamed"})
    assert not result.same
    assert result.warnings == ("not all is what the manifest says: README.md",)
    old, new = files_of(Path("out")), files_of(Path("again"))
    assert {name for name in old if old[name] != new[name]} == {"README.md", "surgery_manifest.json"}


def test_what_was_in_memory_cannot_be_applied_again(kitchen: Path):
    shallow = rebuild(surgery.open("examples/base"), drop="4-").checkpoint
    lora = surgery.open("examples/lora")
    surgery.merge(shallow, lora.only(s for s in lora.updates if ".0." in s.path), output="out")
    with pytest.raises(surgery.FitError, match="was in memory and not in a file"):
        surgery.apply("out/surgery_manifest.json", output="again")


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
