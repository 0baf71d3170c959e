# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs as checkpoints: a file, a folder or a pipeline of them opens as weights do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import surgery
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT
from tests.support.onnx_files import WEIGHT, elsewhere, model, saved

# ------------------------------------------------------------------------------------------------ as a checkpoint


def test_a_graph_is_a_checkpoint_of_the_weights_in_it(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    nodes = (
        helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(WEIGHT[:2])),
        helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.arange(40))),
        helper.make_node("Constant", [], ["eps"], value=numpy_helper.from_array(np.float32(1e-5))),
    )
    inline = numpy_helper.from_array(WEIGHT, "model.layers.0.mlp.up_proj.weight")
    path = saved(tmp_path, model(inline, elsewhere("head", (40, 30), location="w.data"), nodes=nodes))
    checkpoint = open_checkpoint(path)
    assert checkpoint.is_graph
    assert list(checkpoint.main.parameters) == ["held", inline.name, "head"]  # in the order of files
    assert [shard.path.name for shard in checkpoint.main.shards] == ["model.onnx", "w.data"]
    assert np.array_equal(checkpoint.main.tensors["head"].read(), WEIGHT)
    assert checkpoint.main.role(inline.name) == "mlp"
    checkpoint.check_unchanged()
    os.utime(tmp_path / "w.data", (1, 1))
    with pytest.raises(ProofError, match="changed"):
        checkpoint.check_unchanged()


@pytest.mark.parametrize(
    "others", [(), ("prefill.onnx",), ("model.onnx_data", "tokenizer.json", "config.json")], ids=str
)
def test_a_folder_with_a_graph_opens(others: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "model.onnx_data").write_bytes(WEIGHT.tobytes())
    for name in others:
        saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "v")) if name.endswith(".onnx") else b"{}", name)
    (tmp_path / "model.onnx_data").write_bytes(WEIGHT.tobytes())
    saved(tmp_path, model(elsewhere("w", (40, 30), location="model.onnx_data")))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.main.tensors) == ["w"]
    assert "model.onnx_data" not in {name for name, _ in checkpoint.side_files}


def test_a_folder_with_several_graphs_wants_a_name_and_weights_come_first(tmp_path: Path) -> None:
    for name in ("encoder.onnx", "decoder.onnx"):
        saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "w")), name)
    with pytest.raises(MalformedError, match=r"2 files of weights .*name one of them"):
        open_checkpoint(tmp_path)
    save_file({"a": WEIGHT}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).main.tensors) == ["a"]


LORA = ROOT / "examples" / "lora"


@pytest.mark.parametrize(
    "call",
    [
        lambda path, out: surgery.export_onnx(path, output=out),
        lambda path, out: surgery.convert(LORA, "mlx", base=path, output=out),
        lambda path, out: surgery.check(path, LORA),
    ],
    ids=["export", "convert", "check"],
)
def test_where_a_model_is_wanted_a_graph_is_named_as_one(call: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "model.embed_tokens.weight")))
    with pytest.raises(FitError, match="an ONNX graph where"):
        call(path, tmp_path / "out")
    with pytest.raises(UsageError, match="needs the checkpoint that it was made of"):
        surgery.merge(path, LORA, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_written_one_by_one_are_no_checkpoint(tmp_path: Path) -> None:
    half = WEIGHT.astype(np.float16)
    path = saved(tmp_path, model(helper.make_tensor("h", TensorProto.FLOAT16, half.shape, half.reshape(-1).tolist())))
    with pytest.raises(MalformedError, match=r"1 weights are written value by value .h."):
        open_checkpoint(path)


def test_a_repository_with_graphs_alone_says_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    saved(tmp_path / "onnx", model(numpy_helper.from_array(WEIGHT, "w")), "model_q4.onnx")
    with pytest.raises(NotFoundError, match=r"graphs in 'onnx': name one, such as onnx/model_q4.onnx"):
        open_checkpoint(tmp_path)


def test_a_pipeline_of_graphs_opens(tmp_path: Path) -> None:
    names = {
        "unet": ["diffusers", "OnnxRuntimeModel"],
        "scheduler": ["diffusers", "X"],
        "vae_decoder": ["diffusers", "Y"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OnnxStableDiffusionPipeline", **names}))
    for name in names:
        (tmp_path / name).mkdir()
        if name != "scheduler":
            saved(tmp_path / name, model(numpy_helper.from_array(WEIGHT, f"{name}.conv_in.weight")))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.is_pipeline, checkpoint.is_graph) == (True, True)
    assert {name: list(one.tensors) for name, one in checkpoint.components.items()} == {
        "unet": ["unet.conv_in.weight"],
        "vae_decoder": ["vae_decoder.conv_in.weight"],
    }
    report = surgery.inspect(tmp_path)
    assert report.parameters == 2 * WEIGHT.size
    with pytest.raises(FitError, match="an ONNX graph where"):
        surgery.merge(tmp_path, LORA, output=tmp_path / "out")
