# SPDX-License-Identifier: Apache-2.0
"""Weights of a graph under the names of its base: a checkpoint again, and what two graphs differ in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery
from surgery.engine.execute import Run
from surgery.onnx.recover.graph_checkpoint import write_checkpoint
from surgery_formats import open_checkpoint
from surgery_formats.errors import FitError, ResourceError, UsageError
from tests.support.graphs_by_value import base_of, graph_of, initializer, located, nbits, random_weights

SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    **{f"model.layers.{n}.self_attn.{x}_proj.weight": (rows, 24) for n in range(2) for x, rows in (("q", 32), ("k", 16), ("v", 16))},
    **{f"model.layers.{n}.self_attn.o_proj.weight": (24, 32) for n in range(2)},
    **{f"model.layers.{n}.input_layernorm.weight": (24,) for n in range(2)},
}  # fmt: skip
WEIGHTS = random_weights(SHAPES)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("b") / "my-base", WEIGHTS, CONFIG)


def graph(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Attention packed and transposed, the output in two slices, a norm folded into nothing."""
    tensors = [initializer("embed", weights["model.embed_tokens.weight"])]
    for n in range(2):
        attention = [weights[f"model.layers.{n}.self_attn.{x}_proj.weight"] for x in "qkv"]
        out = weights[f"model.layers.{n}.self_attn.o_proj.weight"]
        tensors.append(initializer(f"qkv_{n}", np.concatenate(attention).T))
        tensors.append(initializer(f"o_{n}", out.T))
        tensors.append(initializer(f"norm_{n}", weights[f"model.layers.{n}.input_layernorm.weight"]))
    return graph_of(path, tensors)


def written(path: Path, base: Path, folder: Path) -> tuple[str, ...]:
    found = located(path, base)
    return write_checkpoint(found, open_checkpoint(base), folder, Run())[1]


def test_a_checkpoint_comes_back_to_the_byte(tmp_path: Path, base: Path) -> None:
    written(graph(tmp_path / "in" / "g.onnx", WEIGHTS), base, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == WEIGHTS.keys()
    assert all(np.array_equal(found[name], value) for name, value in WEIGHTS.items())
    assert (tmp_path / "out" / "config.json").exists()
    assert surgery.diff(base, tmp_path / "out").equal


def test_pieces_factors_and_orders_are_undone(tmp_path: Path, base: Path) -> None:
    q, k, v, out = (WEIGHTS[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkvo")
    norm = WEIGHTS["model.layers.0.input_layernorm.weight"]
    order = np.random.default_rng(0).permutation(16)
    special = [q * np.float32(0.3), (k * norm).T, v[order], out[:, :9].T, out[:, 9:]]
    rest = {name: value for name, value in WEIGHTS.items() if "layers.0.self_attn" not in name}
    tensors = [initializer(f"s{n}", value) for n, value in enumerate([*special, *rest.values()])]
    written(graph_of(tmp_path / "in" / "g.onnx", tensors), base, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in WEIGHTS.items():
        np.testing.assert_allclose(found[name], value, rtol=5e-7)


def test_codes_become_what_they_stand_for(tmp_path: Path, base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors, node = nbits("a", WEIGHTS[name], 8, 24)
    tensors += [initializer(f"s{n}", value.T) for n, (other, value) in enumerate(WEIGHTS.items()) if other != name]
    remarks = written(graph_of(tmp_path / "in" / "g.onnx", tensors, [node]), base, tmp_path / "out")
    assert "what codes stand for" in remarks[0]
    np.testing.assert_allclose(load_file(tmp_path / "out" / "model.safetensors")[name], WEIGHTS[name], atol=0.02)


def test_a_graph_that_lacks_a_weight_is_refused(tmp_path: Path, base: Path) -> None:
    few = [initializer("embed", WEIGHTS["model.embed_tokens.weight"])]
    with pytest.raises(FitError, match="10 weights of the base are not in the graph"):
        written(graph_of(tmp_path / "in" / "g.onnx", few), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("both", [False, True])
def test_the_difference_of_two_graphs_is_the_lora_of_their_checkpoints(tmp_path: Path, base: Path, both: bool) -> None:
    rng = np.random.default_rng(2)
    tuned = dict(WEIGHTS)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        rows, cols = tuned[name].shape
        tuned[name] = tuned[name] + 0.05 * (rng.standard_normal((rows, 2)) @ rng.standard_normal((2, cols))).astype(
            "f4"
        )
    norm = "model.layers.1.input_layernorm.weight"
    tuned[norm] = tuned[norm] * np.float32(1.01)
    after = graph(tmp_path / "tuned" / "t.onnx", tuned)
    before = graph(tmp_path / "in" / "g.onnx", WEIGHTS) if both else base
    surgery.extract_lora(before, after, rank=2, output=tmp_path / "lora", **({"graph_of": base} if both else {}))
    surgery.merge(base, tmp_path / "lora", output=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(np.allclose(merged[name], value, atol=2e-6) for name, value in tuned.items())
    assert '"my-base"' in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert {one.name for one in tmp_path.iterdir()} == {"tuned", "lora", "merged"} | ({"in"} if both else set())


def test_two_graphs_need_a_checkpoint_for_names(tmp_path: Path, base: Path) -> None:
    path = graph(tmp_path / "in" / "g.onnx", WEIGHTS)
    with pytest.raises(UsageError, match="whose names say nothing"):
        surgery.extract_lora(path, path, output=tmp_path / "lora")


def test_a_folder_that_cannot_be_written_to_is_told(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graph(tmp_path / "g.onnx", WEIGHTS)

    def refuse(*given: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("surgery_formats.files.output.scratch.os.mkdir", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        surgery.extract_lora(path, path, graph_of=base, output=tmp_path / "out")
