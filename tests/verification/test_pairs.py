# SPDX-License-Identifier: Apache-2.0
"""A fault in any graph of an encoder-decoder is found, and so is a file that is not there."""

from __future__ import annotations

import shutil

import onnx
import pytest

import surgery
from surgery.onnx.graph.pair_names import BEGUN, ENCODER, FIRST, MERGED
from surgery_formats.errors import ProofError
from tests.oracles import recipes


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pair of 16 bits, of which verify computes a twin in float32."""
    folder = tmp_path_factory.mktemp("pair")
    recipes.build("t5_flan", folder / "base")
    surgery.export_onnx(folder / "base", output=folder / "out", target="cuda", dtype="fp16")
    return folder / "out"


def nodes_of(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def test_every_graph_is_named_and_passes(exported):
    found = surgery.verify(exported)
    named = [check.name for check in found.checks if check.difference is not None]
    for name in (ENCODER, FIRST, BEGUN):
        assert sum(check.startswith(f"{name}: ") for check in named) == 3  # without padding, and on either side
    assert sum("later runs" in check for check in named) == 3
    assert found.difference < 1e-4


@pytest.mark.parametrize(
    ("file", "at"),
    [
        (ENCODER, "encoder.block.1.layer.0.SelfAttention"),
        (FIRST, "decoder.block.1.layer.1.EncDecAttention"),
        (BEGUN, "decoder.block.0.layer.0.SelfAttention"),
        (MERGED, "first/decoder.block.1.layer.1.EncDecAttention"),
        (MERGED, "begun/decoder.block.0.layer.1.EncDecAttention"),
    ],
)
def test_another_scale_of_one_attention_is_found(exported, tmp_path, file, at):
    shutil.copytree(exported, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / file, load_external_data=False)
    (node,) = (node for node in nodes_of(model.graph) if node.name == f"{at}/Attention")
    (scale,) = (attribute for attribute in node.attribute if attribute.name == "scale")
    scale.f = 0.7
    data = model.SerializeToString()
    (tmp_path / "out" / file).write_bytes(data)
    (tmp_path / "out" / "surgery_manifest.json").unlink()  # which knows the bytes of each file
    with pytest.raises(ProofError, match="differs by"):
        surgery.verify(tmp_path / "out")


def test_a_decoder_without_its_encoder_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / ENCODER).unlink()
    (tmp_path / "out" / "surgery_manifest.json").unlink()
    with pytest.raises(ProofError, match="encoder that is not there"):
        surgery.verify(tmp_path / "out")


def test_weights_written_anew_inside_the_graphs_of_a_pair_are_those_of_both_halves(tmp_path):
    base = recipes.build("t5", tmp_path / "base")
    for options in ({"linear": "matmul"}, {"weights_type": "int8"}):
        out = tmp_path / next(iter(options))
        surgery.export_onnx(base, output=out, weights="embed", target="portable", **options)
        assert surgery.verify(out, against=base).difference < 1e-4
