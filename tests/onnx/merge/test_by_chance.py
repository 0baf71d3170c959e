# SPDX-License-Identifier: Apache-2.0
"""A weight that several tensors could hold is told apart, or refused; it is never located, or left out, by chance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.support.graphs_by_value import base_of, graph_of, initializer, located, nbits
from tests.support.merged_graphs import PLACES, WEIGHTS, lora, merged_weights, values_in

FIRST, SECOND = PLACES["q"], "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 40, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TABLE = np.random.default_rng(5).standard_normal((40, 24)).astype("f4")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return base_of(tmp_path / "base", {**WEIGHTS, EMBEDDING: TABLE}, TIED)


def factors_for(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    """A LoRA of rank 1 on modules of ``(out, in)``, as PEFT writes it."""
    rng = np.random.default_rng(2)
    tensors: dict[str, np.ndarray] = {}
    for name, (rows, cols) in modules.items():
        table = name.endswith("embed_tokens")
        a, b = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        sizes = ((1, rows), (cols, 1)) if table else ((1, cols), (rows, 1))
        for side, size in zip((a, b), sizes, strict=True):
            tensors[f"base_model.model.{name}.{side}"] = rng.standard_normal(size).astype("f4")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name.split(".")[-1] for name in modules]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("how", ["codes", "factor", "rows"])
def test_equal_weights_that_are_not_there_bit_for_bit_are_not_both_changed(tmp_path: Path, how: str) -> None:
    """Layers that were repeated: an adapter changes the first one alone, and names tell nothing."""
    base = base_of(tmp_path / "base", {**WEIGHTS, SECOND: WEIGHTS[FIRST]})
    nodes: list[Any] = []
    if how == "codes":
        tensors = []
        for name in ("a", "b"):
            some, node = nbits(name, WEIGHTS[FIRST])
            tensors += some
            nodes.append(node)
    else:
        scale = np.float32(0.3) if how == "factor" else np.linspace(2, 0.5, 32, dtype="f4")[:, None]
        tensors = [initializer(name, WEIGHTS[FIRST] * scale) for name in "ab"]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, nodes)
    with pytest.raises(FitError, match=r"equal values|by the order of the graph alone"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


def test_names_tell_equal_weights_in_codes(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {**WEIGHTS, SECOND: WEIGHTS[FIRST]})
    tensors, nodes = [], []
    for layer in (1, 0):
        some, node = nbits(f"model.layers.{layer}.self_attn.q_proj.MatMul", WEIGHTS[FIRST])
        tensors += some
        nodes.append(node)
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, nodes)
    surgery.merge(path, lora(tmp_path / "adapter", "q", size=0.3), graph_of=base, output=tmp_path / "out")
    before, after = values_in(path), values_in(tmp_path / "out" / "g.onnx")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {name.split(".")[2] for name in changed} == {"0"}


def test_weights_nearer_than_a_step_are_not_told_by_their_codes(tmp_path: Path) -> None:
    """Of two weights that round to the same codes, the nearer one is not the one that was rounded."""
    near = WEIGHTS[FIRST] * np.float32(1 + 1e-6)
    tensors, node = nbits("a", WEIGHTS[FIRST])
    base = base_of(tmp_path / "base", {**WEIGHTS, SECOND: near})
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, [node])
    with pytest.raises(FitError, match="equal values"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


def two_copies(path: Path, how: str, more: list[Any]) -> Path:
    """A table of numbers, and a head that is codes of it, scaled, padded, or other values by another quantiser."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"])]
    if how == "codes":
        tensors, node = nbits("head", TABLE)
        nodes.append(node)
    else:
        moved = np.random.default_rng(1).normal(0, 0.05, (24, 40)).astype("f4")
        padded = np.concatenate([TABLE, np.zeros((24, 24), "f4")]).T
        values = {"changed": TABLE.T + moved, "factor": TABLE.T * np.float32(24**0.5), "padded": padded}
        tensors = [initializer("head", values[how])]
        nodes.append(helper.make_node("MatMul", ["x", "head"], ["z"]))
    return graph_of(path, [initializer("table", TABLE), *tensors, *more], nodes)


def changed_tensors(before: Path, after: Path) -> set[str]:
    old, new = values_in(before), values_in(after)
    return {name for name in old if old[name].tobytes() != new[name].tobytes()}


@pytest.mark.parametrize("how", ["codes", "factor", "changed", "padded"])
def test_both_copies_of_a_tied_weight_change_or_none(tmp_path: Path, tied: Path, how: str) -> None:
    """What is found once is looked for elsewhere."""
    path = two_copies(tmp_path / "in" / "g.onnx", how, [initializer("w", WEIGHTS[FIRST])])
    adapter = lora(tmp_path / "adapter", "q")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = TABLE * 2
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if how in ("changed", "padded"):
        with pytest.raises(FitError, match=r"other values of|found as the embedding alone"):
            surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")
        return
    surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")
    changed = changed_tensors(path, tmp_path / "out" / "g.onnx")
    assert changed >= {"w", "table"}
    assert {name[:4] for name in changed} == {"w", "tabl", "head"}


@pytest.mark.parametrize("how", ["codes", "factor", "changed"])
def test_a_head_keeps_its_values_where_the_table_alone_changes(tmp_path: Path, tied: Path, how: str) -> None:
    path = two_copies(tmp_path / "in" / "g.onnx", how, [])
    adapter = factors_for(tmp_path / "adapter", {"model.embed_tokens": (40, 24)})
    surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")
    assert changed_tensors(path, tmp_path / "out" / "g.onnx") == {"table"}


@pytest.mark.parametrize("how", ["codes", "factor", "changed"])
def test_a_table_keeps_its_values_where_the_head_alone_changes(tmp_path: Path, tied: Path, how: str) -> None:
    path = two_copies(tmp_path / "in" / "g.onnx", how, [])
    adapter = factors_for(tmp_path / "adapter", {"lm_head": (40, 24)})
    if how == "changed":
        with pytest.raises(FitError, match="no place in the graph"):
            surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")
        return
    surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")
    assert {name[:4] for name in changed_tensors(path, tmp_path / "out" / "g.onnx")} == {"head"}


@pytest.mark.parametrize("between", ["Identity", "Cast"])
def test_a_table_read_through_other_nodes_is_a_table(tmp_path: Path, tied: Path, between: str) -> None:
    """The adapter is for the head alone, which shares the table's only tensor."""
    kept = {"to": 1} if between == "Cast" else {}
    nodes = [
        helper.make_node(between, ["table"], ["wide"], **kept),
        helper.make_node("Gather", ["wide", "ids"], ["e"]),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["z"]),
    ]
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("table", TABLE)], nodes)
    adapter = factors_for(tmp_path / "adapter", {"lm_head": (40, 24)})
    with pytest.raises(FitError, match=r"embedding and head at once|no place in the graph"):
        surgery.merge(path, adapter, graph_of=tied, output=tmp_path / "out")


@pytest.mark.parametrize("held", [EMBEDDING, HEAD])
def test_a_weight_that_only_samples_take_for_another_is_not_there(tmp_path: Path, held: str) -> None:
    """Head and table differ in a row that no sample has: a graph with one of them has not the other."""
    other = TABLE.copy()
    other[5, 7] += 1
    weights = {**WEIGHTS, EMBEDDING: TABLE, HEAD: other}
    base = base_of(tmp_path / "base", weights, {**TIED, "tie_word_embeddings": False})
    path = graph_of(tmp_path / "g.onnx", [initializer("w", weights[held])])
    found = located(path, base)
    assert found.covered[held] == 1
    assert found.covered[HEAD if held == EMBEDDING else EMBEDDING] < 1


def test_equal_rows_in_another_order_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    weight = WEIGHTS[FIRST].copy()
    weight[7] = weight[3]
    base = base_of(tmp_path / "base", {**WEIGHTS, FIRST: weight})
    order = [4, 5, 6, 3, 0, 1, 2, *range(7, 32)]  # 3 stands behind 6, and 7 behind 2
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", weight[order])])
    adapter = lora(tmp_path / "adapter", "q")
    try:
        surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    except FitError:
        return
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")[FIRST]
    assert np.array_equal(values_in(tmp_path / "out" / "g.onnx")["w"], merged[order])


def test_a_weight_of_one_value_is_not_any_tensor_of_that_value(tmp_path: Path) -> None:
    """A zero kernel, as ControlNets begin, and zeros that are no weight."""
    base = base_of(tmp_path / "base", {**WEIGHTS, FIRST: np.zeros((32, 24), "f4")})
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer(name, np.zeros((32, 24), "f4")) for name in ("w", "past")])
    with pytest.raises(FitError, match="of one value"):
        surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")


@pytest.mark.parametrize("shared", [False, True])
def test_a_slot_is_not_put_beside_the_node_of_an_equal_weight(tmp_path: Path, shared: bool) -> None:
    """Of two repeated layers, in tensors of their own without names, or in one that an optimiser made of both."""
    base = base_of(tmp_path / "base", {**WEIGHTS, SECOND: WEIGHTS[FIRST]})
    names = ["val_1"] if shared else ["val_1", "val_2"]
    nodes = [
        helper.make_node("MatMul", ["x", names[0]], ["a"]),
        helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("MatMul", ["b", names[-1]], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer(name, WEIGHTS[FIRST].T) for name in names], nodes)
    for gated in (False, True):
        with pytest.raises(FitError, match=r"equal values|no name tells"):
            surgery.insert(path, lora(tmp_path / f"a{gated}", "q"), base=base, gated=gated, dry_run=True)


def branches_of(then: list[Any], other: list[Any], own: Any) -> Any:
    """An If whose second branch has a tensor of its own."""
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("t", "o")]
    return helper.make_node(
        "If", ["c"], ["y"], name="If_0",
        then_branch=helper.make_graph(then, "then", [], [outs[0]]),
        else_branch=helper.make_graph(other, "else", [], [outs[1]], [own]),
    )  # fmt: skip


def test_a_copy_in_the_body_of_a_node_is_not_left_without_a_slot(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", WEIGHTS)
    node = branches_of(
        [helper.make_node("MatMul", ["x", "w"], ["t"])],
        [helper.make_node("MatMul", ["x", "v"], ["o"])],
        initializer("v", WEIGHTS[FIRST].T),
    )
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[FIRST].T)], [node])
    with pytest.raises(FitError, match="inside the body of a node"):
        surgery.insert(path, lora(tmp_path / "adapter", "q"), base=base, dry_run=True)
    surgery.merge(path, tmp_path / "adapter", graph_of=base, output=tmp_path / "out")
    merged = merged_weights(base, tmp_path / "adapter", tmp_path / "checkpoint")[FIRST]
    (found,) = onnx.load(tmp_path / "out" / "g.onnx").graph.node
    inner = next(one.g for one in found.attribute if one.name == "else_branch")
    assert np.array_equal(numpy_helper.to_array(inner.initializer[0]), merged.T)
    assert np.array_equal(values_in(tmp_path / "out" / "g.onnx")["w"], merged.T)


def test_a_table_in_the_body_of_a_node_is_not_the_head(tmp_path: Path, tied: Path) -> None:
    node = branches_of(
        [helper.make_node("Gather", ["other", "ids"], ["t"])],
        [helper.make_node("Gather", ["table", "ids"], ["o"])],
        initializer("table", TABLE),
    )
    tensors = [initializer("other", TABLE[::-1] * 7), initializer("head", TABLE.T)]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors, [node, helper.make_node("MatMul", ["x", "head"], ["z"])])
    with pytest.raises(FitError, match="may be the head or the embedding"):
        surgery.merge(path, factors_for(tmp_path / "a", {"lm_head": (40, 24)}), graph_of=tied, output=tmp_path / "out")


def test_a_merge_that_is_killed_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Whenever it ends, there is no output, and the next run writes the same bytes."""
    base = base_of(tmp_path / "base", WEIGHTS)
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[FIRST].T)], external=True)
    adapter = lora(tmp_path / "adapter", "q")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "whole")
    script = (
        "import os, sys, surgery\n"
        "import surgery.engine.execute as e, surgery.verbs.merge_graph as m, surgery_formats.files.output.folder as f\n"
        "room, name = {'write': (e, 'write_weights'), 'prove': (m, 'prove_structure'), 'commit': (f.OutputFolder, 'commit')}[sys.argv[1]]\n"
        "inner = getattr(room, name)\n"
        "def ends(*given, **named):\n"
        "    if sys.argv[1] == 'write': inner(*given, **named)\n"
        "    os._exit(9)\n"
        "setattr(room, name, ends)\n"
        "surgery.merge(sys.argv[2], sys.argv[3], graph_of=sys.argv[4], output=sys.argv[5])\n"
    )
    out = tmp_path / "out"
    for when in ("write", "prove", "commit"):
        given = [sys.executable, "-c", script, when, path, adapter, base, out]
        assert subprocess.run(given, check=False).returncode == 9
        assert not out.exists()
    surgery.merge(path, adapter, graph_of=base, output=out)
    for name in ("g.onnx", "g.onnx.data"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base", "in", "out", "whole"]
