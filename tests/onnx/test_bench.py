# SPDX-License-Identifier: Apache-2.0
"""Bench: graphs of other exporters by their own tables, and adapters in the slots of one side."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

import surgery
from surgery.onnx.run.token_tables import TokenTables, token_tables
from surgery_formats.errors import FitError, NotFoundError, SurgeryError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "onnx_graphs"
BASE, LORA = "examples/base", "examples/lora"
TABLES = {
    "optimum-bert": TokenTables(80, 32),
    "quantized-bert": TokenTables(80, 32),
    "fused-bert": TokenTables(80, 32),
    "optimum-gpt2": TokenTables(80, 32, cached=True),
    "mobius-llama": TokenTables(80, 64, cached=True),
    "optimum-llama": TokenTables(80, 0, cached=True),
}


def alone(graph: str, folder: Path) -> Path:
    """A golden graph with its weights, and nothing that says more of it."""
    for file in (GOLDEN / graph).glob("model.onnx*"):
        shutil.copy(file, folder / file.name)
    return folder / "model.onnx"


@pytest.mark.parametrize("graph", TABLES)
def test_a_graph_of_another_exporter_needs_no_config(graph: str, tmp_path: Path) -> None:
    path = alone(graph, tmp_path)
    assert token_tables(path) == TABLES[graph]
    result = surgery.bench(path, new_tokens=1, device="cpu", threads=1)
    places = TABLES[graph].places
    assert result.prompt_length == (places - (9 if TABLES[graph].cached else 0) if places else 512)
    assert result.sides[0].prefill_seconds > 0


def test_a_graph_without_a_table_of_tokens_says_what_it_lacks(tmp_path: Path) -> None:
    model = onnx.load(alone("optimum-bert", tmp_path))
    (gather,) = [node for node in model.graph.node if node.op_type == "Gather" and "input_ids" in node.input]
    table = gather.input[0]
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [table], [f"{table}/hidden"]))
    gather.input[0] = f"{table}/hidden"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        FitError, match=r"neither the graph nor a config\.json beside it tells the size of the vocabulary"
    ):
        surgery.bench(tmp_path / "model.onnx", device="cpu")


def test_adapters_fill_the_slots_of_the_first_graph_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.export_onnx(BASE, output=out, swap=[LORA])
    for adapter in ("lora=0.5", out / "adapters" / "lora.onnx_adapter"):
        result = surgery.bench(out, out, adapters=adapter, prompt_length=3, new_tokens=1, device="cpu", threads=1)
        assert result.token_ratio is not None
    plain = tmp_path / "plain"
    surgery.export_onnx(BASE, output=plain)
    surgery.bench(out, plain, adapters="lora", prompt_length=3, new_tokens=1, device="cpu", threads=1)
    with pytest.raises(SurgeryError):
        surgery.bench(plain, out, adapters=out / "adapters" / "lora.onnx_adapter", prompt_length=3, device="cpu")
    with pytest.raises(NotFoundError):
        surgery.bench(out, adapters="other", prompt_length=3, device="cpu")


def test_an_encoders_adapters_are_in_every_run(tmp_path: Path) -> None:
    from tests.oracles import recipes

    base = recipes.build("bert_sequence", tmp_path / "base")
    import peft

    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(recipes.load("bert_sequence", base), config).save_pretrained(tmp_path / "lora")
    surgery.export_onnx(base, output=tmp_path / "out", swap=[tmp_path / "lora"])
    result = surgery.bench(tmp_path / "out", tmp_path / "out", adapters="lora", device="cpu", threads=1)
    assert result.prefill_ratio is not None
    assert result.token_ratio is None
    assert "per run" in str(result)
