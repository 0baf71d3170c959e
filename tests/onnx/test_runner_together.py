# SPDX-License-Identifier: Apache-2.0
"""Rows on top of a soft prompt are prefilled at once where there is a graph for it, and get what each gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import surgery
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS
from surgery.onnx.run.decoder import make_decoder, text_past
from surgery.onnx.run.opening import open_graph, open_prefill
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT

BASE = ROOT / "examples" / "base"
ROWS = [[5, 17, 3, 88, 42, 9, 61], [29, 8], [7, 7, 7, 30]]
AHEAD = [3, 99, 12, 45, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("together") / "out"
    surgery.export_onnx(BASE, output=out, target="cpu")
    return out


def logits(decoder, rows):
    first = decoder.prefill(rows)
    return np.stack([first, *(decoder.step([10 + step] * len(rows)) for step in range(6))])


def test_a_batch_on_top_of_a_past_is_one_run(folder, monkeypatch):
    opened = open_graph(folder, device="cpu", threads=1)
    assert not opened.contract.prefill_batch
    past = text_past(opened, AHEAD)
    together = make_decoder(opened, batch=3, max_length=40, past=past)
    ran = []
    monkeypatch.setattr(together, "_feed", lambda *_: ran.append("row by row"))
    alone = make_decoder(opened, max_length=40, past=past)
    for rows in (ROWS, [row[::-1] for row in ROWS]):  # the second time over a cache that is not empty
        found = logits(together, rows)
        for number, row in enumerate(rows):
            assert np.abs(found[:, number] - logits(alone, [row])[:, 0]).max() < 1e-4
            whole = make_decoder(opened, max_length=40)
            assert np.abs(found[:, number] - logits(whole, [AHEAD + row])[:, 0]).max() < 1e-4
    assert not ran
    assert together.lengths.tolist() == [len(AHEAD) + len(row) + 6 for row in ROWS]


def test_without_a_prefill_graph_rows_run_one_by_one(folder, tmp_path):
    for name in ("model.onnx", "model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    opened = open_graph(tmp_path, device="cpu", threads=1)
    assert open_prefill(opened) is None
    past = text_past(opened, AHEAD)
    found = logits(make_decoder(opened, batch=3, max_length=40, past=past), ROWS)
    other = open_graph(folder, device="cpu", threads=1)
    assert np.abs(found - logits(make_decoder(other, batch=3, max_length=40, past=past), ROWS)).max() < 1e-4


def test_a_prefill_graph_of_another_model_is_refused(folder, tmp_path):
    for name in ("model.onnx", "prefill.onnx", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    component = open_checkpoint(BASE).main
    slotted = frozenset({"model.layers.0.self_attn.q_proj.weight"})
    other = build(component, GraphOptions(TARGETS["portable"], DType.F32, slotted=slotted)).graphs["model.onnx"]
    (tmp_path / "prefill.onnx").write_bytes(other.data)
    opened = open_graph(tmp_path, device="cpu", threads=1)
    with pytest.raises(MalformedError, match="slots differs"):
        open_prefill(opened)
    with pytest.raises(MalformedError, match="refers to"):
        open_prefill(replace(opened, contract=replace(opened.contract, prefill="../prefill.onnx")))
