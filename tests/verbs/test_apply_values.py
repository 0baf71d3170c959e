# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say, and what is wrong with one, by step and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.support.applied_recipes import largest, write

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
    "a number for an output": (
        "steps:\n  - {verb: merge, base: x, adapters: y, output: 3}\n",
        "output (line 2) is a path, and '3' is none",
    ),
    "yes for an output": ("steps:\n  - {verb: merge, base: x, adapters: y, output: yes}\n", "'yes' is none"),
    "a list for an output": (
        "steps:\n  - {verb: merge, base: x, adapters: y, output: [a]}\n",
        "is a path, and what stands there is none",
    ),
    "nothing for an output": (
        "steps:\n  - {verb: merge, base: x, adapters: y, output: ''}\n",
        "what stands there is none",
    ),
    "a dash for an output": ("steps:\n  - {verb: merge, base: x, adapters: y, output: '-'}\n", "'-' is no path"),
    "a dash for the last output": (
        "output: '-'\nsteps:\n  - {verb: merge, base: x, adapters: y}\n",
        "output (line 1): '-'",
    ),
    "a number for an output beside": (
        "steps:\n  - {verb: layers, base: x, keep: 1, adapter: a, adapter_output: 5, output: o}\n",
        "adapter_output (line 2) is a path, and '5' is none",
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


def test_numbers_of_layers_are_texts_where_a_text_is_meant(kitchen: Path):
    surgery.apply(write("steps:\n  - {verb: layers, base: examples/base, keep: 3, output: o}\n"))
    assert json.loads(Path("o/config.json").read_text())["num_hidden_layers"] == 1
    assert torch.equal(
        load_file("o/model.safetensors")["model.layers.0.mlp.up_proj.weight"],
        load_file("examples/base/model.safetensors")["model.layers.3.mlp.up_proj.weight"],
    )


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
