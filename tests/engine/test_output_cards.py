# SPDX-License-Identifier: Apache-2.0
"""The card of every folder that a command makes: what it says of its base, and whose card it leaves alone (ADR 71)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx.parser
import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery.onnx.edit.graph_card import folded_relation
from tests.support.cards import check_card
from tests.support.kit import ROOT
from tests.support.quantised_folders import quantise_folder
from tests.verbs.test_merge_gguf import GOLDEN, adapter, apart, main

EXAMPLES = ROOT / "examples"
BASE = "models--org--base/snapshots/0123"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- code\nbase_model: its/own\n---\n# Mine\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as the hub's cache has it, with its owner's card; a graph of it, a merge, and a prompt."""
    folder = tmp_path_factory.mktemp("world")
    base = folder / BASE
    shutil.copytree(EXAMPLES / "base", base)
    (base / "README.md").write_text(CARD)
    (folder / "lora").symlink_to(EXAMPLES / "lora")
    surgery.export_onnx(base, output=folder / "graph")
    surgery.merge(base, EXAMPLES / "lora", output=folder / "merged")
    surgery.insert(base, new="prompt", rank=4, output=folder / "fresh")
    return folder


def delta(world: Path, out: Path) -> None:
    """A base with the biases of a fine-tune, which is that fine-tune."""
    tuned = out.with_name("tuned")
    shutil.copytree(world / BASE, tuned)
    tensors = load_file(tuned / "model.safetensors")
    norm = "model.norm.weight"
    save_file(tensors | {norm: tensors[norm] * 2}, tuned / "model.safetensors", {"format": "pt"})
    surgery.extract_lora(world / BASE, tuned, output=out.with_name("delta"), matrices="full")
    surgery.insert(world / BASE, out.with_name("delta"), output=out)


def folded(world: Path, out: Path) -> None:
    slots = out.with_name("slots")
    surgery.insert(world / "graph" / "model.onnx", world / "lora", base=world / BASE, output=slots)
    surgery.fold(slots, slots / "adapters" / "lora.onnx_adapter", output=out)


MADE: dict[str, tuple[Callable[[Path, Path], object], str | None, str, list[str]]] = {
    "graph": (lambda w, o: surgery.export_onnx(w / BASE, output=o), None, "onnx", ["onnx"]),
    "graph of codes": (
        lambda w, o: surgery.export_onnx(w / BASE, w / "lora", weights_type="int8", output=o),
        "quantized",
        "onnx",
        ["onnx"],
    ),
    "merged graph": (
        lambda w, o: surgery.export_onnx(w / BASE, w / "lora", output=o),
        "merge",
        "onnx",
        ["onnx", "merge"],
    ),
    "graph with slots": (lambda w, o: surgery.export_onnx(w / BASE, swap=w / "lora", output=o), None, "onnx", ["onnx"]),
    "transformers.js": (
        lambda w, o: surgery.export_onnx(w / BASE, layout="transformers.js", output=o),
        None,
        "transformers.js",
        ["onnx"],
    ),
    "merge into a graph": (
        lambda w, o: surgery.merge(w / "graph/model.onnx", w / "lora", graph_of=w / BASE, output=o),
        "merge",
        "onnx",
        ["onnx", "merge"],
    ),
    "slots in a graph": (
        lambda w, o: surgery.insert(w / "graph/model.onnx", w / "lora", base=w / BASE, output=o),
        None,
        "onnx",
        ["onnx"],
    ),
    "gated": (
        lambda w, o: surgery.insert(w / "graph/model.onnx", w / "lora", base=w / BASE, gated=True, output=o),
        "merge",
        "onnx",
        ["onnx", "merge"],
    ),
    "folded": (folded, None, "onnx", ["onnx"]),
    "weights of a graph": (
        lambda w, o: surgery.convert(w / "graph/model.onnx", "safetensors", output=o),
        None,
        "transformers",
        [],
    ),
    "layers": (lambda w, o: surgery.layers(w / BASE, drop="1", output=o), None, "transformers", []),
    "layers of a merge": (lambda w, o: surgery.layers(w / "merged", drop="1", output=o), None, "transformers", ["merge"]),
    "unmerge": (lambda w, o: surgery.unmerge(w / "merged", w / "lora", output=o), None, "transformers", []),
    "delta": (delta, "finetune", "transformers", []),
    "unmerged": (
        lambda w, o: surgery.insert(w / BASE, w / "lora", unmerged=True, output=o),
        "adapter",
        "transformers",
        ["lora"],
    ),
    "fresh": (lambda w, o: surgery.insert(w / BASE, new="lora", rank=4, output=o), "adapter", "peft", ["lora"]),
    "fresh in AdapterHub's form": (
        lambda w, o: surgery.insert(w / BASE, new="bottleneck", rank=4, output=o),
        "adapter",
        "adapter-transformers",
        ["bottleneck"],
    ),
    "tokens": (lambda w, o: surgery.prompt_bake(w / "fresh", w / BASE, output=o), "merge", "transformers", ["merge"]),
    "keys and values": (
        lambda w, o: surgery.prompt_bake(w / "fresh", w / BASE, form="kv", output=o),
        "adapter",
        "transformers",
        ["prompt_tuning"],
    ),
    "prefix": (
        lambda w, o: surgery.prompt_convert(w / "fresh", "prefix", base=w / BASE, output=o),
        "adapter",
        "peft",
        ["prompt_tuning", "prompt"],
    ),
    "compact": (
        lambda w, o: surgery.convert(w / "lora", "compact", base=w / BASE, output=o),
        "adapter",
        "model-surgery",
        ["lora"],
    ),
    "extracted for MLX": (
        lambda w, o: surgery.extract_lora(w / BASE, w / "merged", rank=4, to="mlx", allow_loss=True, output=o),
        "adapter",
        "mlx",
        ["lora"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_a_card_says_what_its_folder_is_of_its_base(name: str, world: Path, tmp_path: Path) -> None:
    make, relation, library, tags = MADE[name]
    make(world, tmp_path / "out")
    data = check_card(tmp_path / "out" / "README.md")
    assert data.get("base_model_relation") == relation
    assert data.library_name == library
    assert data.base_model == "org/base"
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert data.tags == [*tags, "code"]
    if name != "gated":  # verify knows no strengths
        surgery.verify(tmp_path / "out")


FOLDED = {
    "": ("", ""),
    "merge": ("merge", "merge"),
    "quantized": ("quantized", "quantized"),
    "finetune": ("finetune", ""),
}


@pytest.mark.parametrize("told", FOLDED)
def test_a_folded_graph_says_of_its_base_what_is_known_without_it(told: str, tmp_path: Path) -> None:
    """A graph of a fine-tune of org/base that lies on this disk: with an adapter it is no merge of org/base."""
    alone, with_adapters = FOLDED[told]
    head = f"base_model: org/base\nbase_model_relation: {told}\n" if told else "base_model: org/base\n"
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    assert folded_relation(tmp_path / "model.onnx", added=False) == alone
    assert folded_relation(tmp_path / "model.onnx", added=True) == with_adapters


def test_a_graph_whose_card_names_no_base_is_itself_the_base(tmp_path: Path) -> None:
    assert folded_relation(tmp_path / "model.onnx", added=True) == "merge"
    assert folded_relation(tmp_path / "model.onnx", added=False) == ""


@pytest.mark.parametrize(
    ("way", "relation"), [("dequantize", "merge"), ("requantize", "quantized"), ("residual", "quantized")]
)
def test_codes_make_a_merge_a_quantised_model(way: str, relation: str, tmp_path: Path) -> None:
    base = quantise_folder(EXAMPLES / "base", tmp_path / "base", "nf4")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/base"}))
    surgery.merge(base, EXAMPLES / "lora", output=tmp_path / "out", quantized=way, accept_loss=way == "requantize")
    data = check_card(tmp_path / "out" / "README.md")
    assert (data.base_model, data.get("base_model_relation")) == ("org/base", relation)


LATER: dict[str, Callable[[Path, Path], object]] = {
    "graph of codes": lambda w, o: surgery.export_onnx(w / "mine", weights_type="int8", output=o),
    "graph with a prompt": lambda w, o: surgery.export_onnx(w / "mine", EXAMPLES / "prompt", output=o),
    "tokens": lambda w, o: surgery.prompt_bake(w / "fresh", w / "mine", output=o),
    "unmerged": lambda w, o: surgery.insert(w / "mine", w / "lora", unmerged=True, output=o),
    "merge into a graph": lambda w, o: surgery.merge(w / "plain/model.onnx", w / "lora", graph_of=w / "mine", output=o),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_what_is_made_of_a_fine_tune_is_nothing_of_its_base(name: str, world: Path, tmp_path: Path) -> None:
    """The card of the fine-tune names what it was tuned from; in codes it is no quantised copy of that."""
    (tmp_path / "fresh").symlink_to(world / "fresh")
    (tmp_path / "lora").symlink_to(world / "lora")
    shutil.copytree(EXAMPLES / "base", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: org/other\n---\n# Mine\n")
    if name == "merge into a graph":
        surgery.export_onnx(tmp_path / "mine", output=tmp_path / "plain")
    LATER[name](tmp_path, tmp_path / "out")
    data = check_card(tmp_path / "out" / "README.md")
    assert (data.base_model, data.get("base_model_relation")) == ("org/other", None)


def test_a_graph_beside_its_weights_leaves_their_card_alone(world: Path, tmp_path: Path) -> None:
    for name, card in {"own": CARD, "none": None}.items():
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / "base", folder)
        if card is not None:
            (folder / "README.md").write_text(card)
        surgery.export_onnx(folder, output=folder)
        assert (folder / "model.onnx").exists()
        assert ((folder / "README.md").read_text() if (folder / "README.md").exists() else None) == card


def test_a_stripped_graph_keeps_the_card_that_lies_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File model.py, line 3")
    onnx.save(model, folder / "model.onnx")
    surgery.strip(folder, output=tmp_path / "without")
    assert not (tmp_path / "without" / "README.md").exists()
    (folder / "README.md").write_text(CARD)
    surgery.strip(folder, output=tmp_path / "with")
    assert (tmp_path / "with" / "README.md").read_text() == CARD


def test_a_base_that_comes_back_has_the_card_it_had(world: Path, tmp_path: Path) -> None:
    for name, base in {"own": world / BASE, "none": EXAMPLES / "base"}.items():
        surgery.merge(base, world / "lora", output=tmp_path / f"{name} merged", reversible=True)
        surgery.unmerge(tmp_path / f"{name} merged", world / "lora", output=tmp_path / name)
    assert (tmp_path / "own" / "README.md").read_text() == CARD
    assert not (tmp_path / "none" / "README.md").exists()


def test_a_transferred_prompt_is_not_said_to_be_for_the_model_it_came_from(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "models--org--other" / "snapshots" / "0123"
    shutil.copytree(EXAMPLES / "tuned", other)
    surgery.prompt_transfer(world / "fresh", world / BASE, onto=other, output=tmp_path / "out", accept_loss=True)
    assert check_card(tmp_path / "out" / "README.md").base_model == "org/other"


def test_the_title_of_a_conversion_names_both_formats(world: Path, tmp_path: Path) -> None:
    titles = {"mlx": "mlx", "compact": "compact (int8)", "peft": "peft"}
    for target, named in titles.items():
        surgery.convert(world / "lora", target, base=world / BASE, output=tmp_path / target)
        assert f"# `lora`, converted from peft to {named}\n" in (tmp_path / target / "README.md").read_text()
    surgery.convert(world / "lora", "compact", factors="int4", output=tmp_path / "int4")
    assert "to compact (int4)\n" in (tmp_path / "int4" / "README.md").read_text()
    surgery.convert(EXAMPLES / "dora", "peft", as_lora=True, rank=8, base=world / BASE, output=tmp_path / "as lora")
    assert "# `dora`, in the place of peft, as peft\n" in (tmp_path / "as lora" / "README.md").read_text()


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("dequantize", None),
        ("requantize", "chosen again: 42 in `NF4`"),
        ("residual", "as they were: 42 in `NF4`"),
    ],
)
def test_a_card_names_the_codes_that_its_model_is_stored_in(way: str, told: str | None, tmp_path: Path) -> None:
    base = quantise_folder(EXAMPLES / "base", tmp_path / "base", "nf4")
    surgery.merge(base, EXAMPLES / "lora", output=tmp_path / "out", quantized=way, accept_loss=way == "requantize")
    rows = [
        row
        for row in (tmp_path / "out" / "README.md").read_text().split("\n")
        if row.startswith("| weights in codes |")
    ]
    assert rows == ([] if told is None else [f"| weights in codes | {told} |"])


def test_a_card_names_the_codes_of_a_gguf_and_of_a_graph(world: Path, tmp_path: Path) -> None:
    wide = GOLDEN / "wide.gguf"
    surgery.merge(wide, adapter(tmp_path / "style", apart(main(wide))), output=tmp_path / "out", quantized="requantize")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| weights in codes | chosen again: 5 in `Q4_K`, 2 in `Q6_K`, 1 in `Q5_0`, 1 in `Q8_0` |" in text
    surgery.export_onnx(world / BASE, weights_type="int4", output=tmp_path / "graph")
    assert "| codes | 43 in int4 |" in (tmp_path / "graph" / "README.md").read_text()


def test_the_lora_beside_a_quantised_model_has_a_card(tmp_path: Path) -> None:
    base = quantise_folder(EXAMPLES / "base", tmp_path / "models--org--base" / "snapshots" / "0123", "nf4")
    surgery.merge(base, EXAMPLES / "lora", output=tmp_path / "out", quantized="residual")
    card = tmp_path / "out" / "adapter" / "README.md"
    data = check_card(card)
    assert (data.library_name, data.base_model, data.tags) == ("peft", "org/base", ["lora"])
    assert data.get("base_model_relation") is None  # it is for the model above it
    text = card.read_text()
    assert "# What the codes of `org/base` do not hold of `lora`\n" in text
    assert "| greatest rank | 8 |" in text
    assert "no adapter of the base" in text
    surgery.verify(tmp_path / "out")
    card.write_text(text + "more\n")
    with pytest.raises(surgery.ProofError, match=r"adapter/README\.md"):
        surgery.verify(tmp_path / "out")


def test_a_gguf_of_plain_numbers_is_no_quantised_model(tmp_path: Path) -> None:
    base = tmp_path / "models--org--base" / "snapshots" / "0123" / "llama.gguf"
    base.parent.mkdir(parents=True)
    shutil.copy(GOLDEN / "llama.gguf", base)
    surgery.merge(base, adapter(tmp_path / "style", apart(main(base))), output=tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    assert check_card(card).get("base_model_relation") == "merge"
    assert "in codes" not in card.read_text()
