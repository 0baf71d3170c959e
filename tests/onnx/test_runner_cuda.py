"""On a CUDA device: the same tokens, from buffers that stay, with steps replayed from a recording."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.target import TARGETS, choose
from surgery.onnx.run.decoder import make_decoder, text_past
from surgery.onnx.run.generate import generate
from surgery.onnx.run.opening import open_graph
from surgery.onnx.run.sampling import Sampling
from surgery.onnx.run.timed_graph import floor_seconds, measure_all, open_timed
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT

pytestmark = pytest.mark.gpu
ROWS = [[5, 17, 3, 88, 42, 9, 61], [29, 8, 77, 50], [7]]
TYPES = {"fp16": DType.F16, "bf16": DType.BF16}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def graph(request, tmp_path_factory):
    """The example in 16 bits, its weights stored in bf16."""
    out = tmp_path_factory.mktemp("cuda") / request.param
    shutil.copytree(ROOT / "examples" / "base", out)
    io = TYPES[request.param]
    built = build(open_checkpoint(out).main, GraphOptions(choose("cuda", io), io, prefill=False))
    (out / "model.onnx").write_bytes(built.graphs["model.onnx"].data)
    twin = build(open_checkpoint(out).main, GraphOptions(TARGETS["portable"], DType.F32))
    (out / "twin.onnx").write_bytes(twin.graphs["model.onnx"].data)
    return out


def logits(decoder, rows, steps):
    """Along fixed tokens, so that all see the same."""
    first = decoder.prefill(rows)
    return np.stack([first, *(decoder.step([10 + step] * len(rows)) for step in range(steps))]).astype(np.float32)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "three lengths"])
def test_recorded_steps_match_the_float32_twin(graph, rows):
    twin = logits(make_decoder(open_graph(graph / "twin.onnx", device="cpu"), batch=len(rows)), rows, 8)
    for recorded in (True, False):
        decoder = make_decoder(open_graph(graph, device="cuda", cuda_graph=recorded), batch=len(rows), max_length=64)
        for _ in range(2):  # the second time everything is replayed
            error = np.abs(logits(decoder, rows, 8) - twin).max() / np.abs(twin).max()
            assert error < (1e-2 if "fp16" in graph.name else 4e-2)


def test_a_graph_opens_without_a_word(graph, capfd):
    """onnxruntime 1.31 warns of the option `device_id` wherever it is given."""
    open_graph(graph, device="cuda")
    assert "".join(capfd.readouterr()) == ""


def test_a_text_read_once_stands_before_every_row_of_recorded_steps(graph):
    ahead = [3, 99, 12, 45]
    twin = make_decoder(open_graph(graph / "twin.onnx", device="cpu"), batch=3)
    wanted = logits(twin, [ahead + row for row in ROWS], 5)
    opened = open_graph(graph, device="cuda")
    decoder = make_decoder(opened, batch=3, max_length=64, past=text_past(opened, ahead))
    assert np.abs(logits(decoder, ROWS, 5) - wanted).max() / np.abs(wanted).max() < 4e-2


def test_two_decoders_of_one_session_do_not_replay_each_other(graph):
    opened = open_graph(graph, device="cuda")
    one, two = (make_decoder(opened, max_length=64) for _ in range(2))
    alone = [generate(one, [row], max_new=9, sampling=Sampling())[0].tokens for row in ROWS[:2]]
    one.prefill(ROWS[:1])
    two.prefill(ROWS[1:2])
    found = [[], []]
    tokens = [alone[0][0], alone[1][0]]
    for _ in range(8):
        for number, decoder in enumerate((one, two)):
            found[number].append(tokens[number])
            tokens[number] = int(decoder.step([tokens[number]]).astype(np.float32).argmax())
    assert [tuple(ids) for ids in found] == [ids[:8] for ids in alone]


def test_no_step_is_faster_than_reading_its_weights(graph):
    side = open_timed(graph, batch=1, max_length=64, device="cuda")
    (timing,) = measure_all([side], ROWS[:1], 20)
    assert timing.token is not None
    assert 0 < floor_seconds(side) < timing.token
