# SPDX-License-Identifier: Apache-2.0
"""Adapters on every family of encoders, merged and in slots, compute what PEFT's attached ones do; and exports verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from tests.oracles import recipes
from tests.support import trained
from tests.support.sessions import open_session

LIMIT = 1e-4
IDS = np.array([[5, 17, 9, 88, 42, 61, 7], [29, 8, 77, 54, 33, 12, 90]])
TYPES = np.arange(IDS.size).reshape(IDS.shape) % 2
TARGETS: dict[str, list[str] | str] = {  # PEFT's defaults where it has them, else all linear layers
    "xlm_roberta_sequence": ["query", "value"],
    "electra_sequence": ["query", "value"],
    "albert_sequence": "all-linear",
    "mpnet_sequence": "all-linear",
    "deberta_v2_sequence": ["query_proj", "value_proj"],
    "deberta_v2_all": "all-linear",
    "deberta_sequence": ["in_proj"],
    "modernbert_sequence": ["attn.Wqkv", "attn.Wo"],
    "modernbert_mean": "all-linear",
    "nomic_bert_sequence": "all-linear",
    "jina_v3_sequence": ["q_proj", "v_proj"],
    "eurobert_late": "all-linear",
    "gte_sequence": ["q_proj", "v_proj", "gate_proj", "up_proj"],
}


@pytest.fixture(params=TARGETS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Base, adapter, and what PEFT gives with it attached."""
    targets, name = TARGETS[request.param], request.param.replace("_v2_all", "_v2_sequence")
    base = recipes.build(name, tmp_path / "base")
    config = ("LoraConfig", {"r": 3, "lora_alpha": 6, "target_modules": targets})
    adapter = trained.train(name, base, config, tmp_path / "adapter", task="SEQ_CLS")
    model = trained.attached(name, base, (adapter, 1.0))
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.ones(IDS.shape, dtype=torch.long)}
    if getattr(model.config, "type_vocab_size", 0) > 1 and not name.startswith("mpnet"):
        inputs["token_type_ids"] = torch.from_numpy(TYPES)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
        plain = recipes.load(name, base)(**inputs).logits.numpy()
    assert np.abs(expected - plain).max() > 100 * LIMIT
    return base, adapter, {"with": expected, "without": plain}


def outputs(folder: Path, adapter: str = "") -> np.ndarray[Any, Any]:
    """The graph's logits, with an adapter active as onnxruntime does it."""
    session, _ = open_session(folder / "model.onnx")
    options = onnxruntime.RunOptions()
    if adapter:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(folder / "adapters" / f"{adapter}.onnx_adapter"))
        options.add_active_adapter(loaded)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": TYPES}
    given = {port.name: feed[port.name] for port in session.get_inputs() if port.name in feed}
    return np.asarray(session.run(["logits"], given, options)[0])


def test_merged_adapters_equal_attached_ones_and_verify(case: Any, tmp_path: Path) -> None:
    base, adapter, wanted = case
    surgery.export_onnx(base, [adapter], output=tmp_path / "out")
    assert np.abs(outputs(tmp_path / "out") - wanted["with"]).max() <= LIMIT
    surgery.verify(tmp_path / "out")


def test_slots_equal_attached_adapters_and_verify(case: Any, tmp_path: Path) -> None:
    base, adapter, wanted = case
    surgery.export_onnx(base, swap=[adapter], output=tmp_path / "out", target="portable")
    assert np.abs(outputs(tmp_path / "out") - wanted["without"]).max() <= LIMIT
    assert np.abs(outputs(tmp_path / "out", "adapter") - wanted["with"]).max() <= LIMIT
    surgery.verify(tmp_path / "out")


def test_packed_slots_equal_attached_adapters_and_verify(case: Any, tmp_path: Path) -> None:
    base, adapter, wanted = case
    surgery.export_onnx(base, swap=[adapter], output=tmp_path / "out", packed=True)
    assert np.abs(outputs(tmp_path / "out", "adapter") - wanted["with"]).max() <= LIMIT
    surgery.verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["modernbert_mask", "modernbert_mean", "eurobert_late", "deberta_v2_sequence"])
def test_a_head_can_be_left_out(name: str, tmp_path: Path) -> None:
    base = recipes.build(name, tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "out", task="feature-extraction")
    session, _ = open_session(tmp_path / "out" / "model.onnx")
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    (found,) = session.run(["last_hidden_state"], feed)
    with torch.no_grad():
        wanted = recipes.load(name, base).base_model(**{key: torch.from_numpy(value) for key, value in feed.items()})
    assert np.abs(found - wanted.last_hidden_state.numpy()).max() <= LIMIT
