# SPDX-License-Identifier: Apache-2.0
"""Every encoder family and head, on every target, computes what transformers computes, padded batches included."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import surgery
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes
from tests.support.sessions import feed_encoder, open_session


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", recipes.ENCODERS)
def test_outputs_match_transformers(tmp_path, name, target):
    folder = recipes.build(name, tmp_path)
    built = build(open_checkpoint(folder).main, GraphOptions(TARGETS[target], DType.F32))
    (folder / "model.onnx").write_bytes(built.graphs["model.onnx"].data)
    session, contract = open_session(folder / "model.onnx")
    model = recipes.load(name, folder)
    pad = model.config.pad_token_id or 0
    rows = [5, 17, 3, 88, 42, 9, 61, 30, 77, 12, 54], [29, 8, 77, 50, 33, 91, 14]
    fill = len(rows[0]) - len(rows[1])
    for side in ("right", "left") if contract.padding == "any" else ("right",):
        ends = ([], [pad] * fill) if side == "right" else ([pad] * fill, [])
        ids = np.array([rows[0], [*ends[0], *rows[1], *ends[1]]])
        mask = np.array([[1] * len(rows[0]), [*([0] * len(ends[0])), *([1] * len(rows[1])), *([0] * len(ends[1]))]])
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        found = feed_encoder(session, ids, mask)
        if any(one.name == "token_type_ids" for one in session.get_inputs()):
            inputs["token_type_ids"] = torch.arange(ids.size).reshape(ids.shape) % 2
        with torch.no_grad():
            expected = model(**inputs)
        assert set(found) == {key for key in expected if key != "loss"}
        for key, value in found.items():
            wanted = expected[key].numpy()
            assert value.shape == wanted.shape
            where = mask.astype(bool) if value.ndim == 3 else slice(None)
            assert np.abs(value - wanted)[where].max() <= 1e-4
    assert contract.kind == "encoder"
    assert contract.cache == "none"


def test_checkpoints_of_nomics_own_code_are_read(tmp_path):
    """Other names of the configuration's keys, another prefix of the tensors: the same numbers."""
    folder = recipes.build("nomic_bert_mask", tmp_path)
    model = recipes.load("nomic_bert_mask", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.replace("nomic_bert.", "bert."): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    own = {"model_type": "nomic_bert", "architectures": ["NomicBertForPreTraining"], "vocab_size": recipes.VOCAB}
    own |= {"n_embd": 32, "n_inner": 56, "n_layer": 3, "n_head": 4, "n_positions": 64, "type_vocab_size": 2}
    own |= {
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_base": 1000,
    }
    (folder / "config.json").write_text(json.dumps(own))
    surgery.export_onnx(folder, output=folder, task="fill-mask")
    session, _ = open_session(folder / "model.onnx")
    ids = np.array([[5, 17, 3, 88, 42, 9, 61]])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), token_type_ids=torch.from_numpy(np.arange(7)[None] % 2)).logits.numpy()
    assert np.abs(feed_encoder(session, ids, np.ones_like(ids))["logits"] - expected).max() <= 1e-4
