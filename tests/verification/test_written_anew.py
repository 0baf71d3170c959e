# SPDX-License-Identifier: Apache-2.0
"""Weights that an export wrote anew, as codes or with their axes exchanged, are compared with the base, each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import ProofError
from surgery_formats.files.output.manifest import MANIFEST
from tests.oracles import recipes
from tests.support import trained
from tests.support.quantised_folders import quantise_folder

NORM, TABLE = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
MATRIX = "model.layers.1.mlp.up_proj.weight"
FORMS = {
    "codes": {"weights_type": "int4"},
    "codes in the graph": {"weights_type": "int4", "weights": "embed"},
    "codes for transformers.js": {"weights_type": "int4", "layout": "transformers.js"},
    "matmul": {"linear": "matmul"},
    "matmul in the graph": {"linear": "matmul", "weights": "embed"},
    "matmul of 16 bits": {"linear": "matmul", "target": "cuda", "dtype": "fp16"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("base") / "base", hidden_size=64, intermediate_size=192)


@pytest.fixture(scope="module", params=FORMS)
def exported(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("graph") / "out"
    surgery.export_onnx(base, output=out, **FORMS[request.param])
    return out


def test_all_weights_of_the_recipe_are_compared(base, exported):
    verified = surgery.verify(exported, against=base)
    numbers = [int(check.detail.split()[0]) for check in verified.checks if check.name.endswith(" weights")]
    assert sum(numbers) == len(load_file(base / "model.safetensors"))
    assert not verified.notes
    assert any("not compared with the base" in note for note in surgery.verify(exported).notes)


def half_a_step(values: torch.Tensor) -> None:
    values.view(torch.int32)[3] ^= 1 << 14  # a bit that float16 keeps


@pytest.mark.parametrize(
    ("name", "change"),
    [(NORM, half_a_step), (TABLE, half_a_step), (MATRIX, torch.Tensor.zero_), (MATRIX, lambda t: t.mul_(1.05))],
)
def test_another_base_is_refused(base, exported, tmp_path, name, change):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    change(tensors[name])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=name):
        surgery.verify(exported, against=other)


def test_a_merge_by_another_weight_is_refused(base, tmp_path):
    adapter = trained.train("llama", base, ("LoraConfig", {"r": 4, "target_modules": ["q_proj"]}), tmp_path / "adapter")
    surgery.export_onnx(base, [adapter], output=tmp_path / "out", linear="matmul")
    surgery.verify(tmp_path / "out", against=base, adapters=adapter)
    for adapters in ((), (adapter, 0.999)):
        with pytest.raises(ProofError, match="q_proj"):
            surgery.verify(tmp_path / "out", against=base, adapters=adapters)


def test_codes_of_a_merge_are_compared_with_what_they_were_made_of_and_not_with_what_a_merge_stores(tmp_path):
    """A merge into this base stores bf16, whose rounding adds to an error of codes in part, and not only as chance would."""
    plain = recipes.build("llama", tmp_path / "plain", intermediate_size=32)
    adapter = trained.train(
        "llama", plain, ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}), tmp_path / "adapter"
    )
    base = quantise_folder(plain, tmp_path / "base", "fp8 tensor")
    surgery.export_onnx(base, [adapter], output=tmp_path / "out", weights_type="int4")
    assert surgery.verify(tmp_path / "out", against=base, adapters=adapter).difference < 1e-4
    with pytest.raises(ProofError, match="q_proj"):
        surgery.verify(tmp_path / "out", against=base, adapters=(adapter, 0.9))


@pytest.mark.parametrize(
    ("options", "name", "change"),
    [
        ({"linear": "matmul"}, "down_proj", half_a_step),
        # Codes are as far from the base as was written down: they tell another weight, and no bit that is lost in rounding.
        ({"weights_type": "int4"}, "down_proj", lambda t: t.mul_(1.05)),
        ({"weights_type": "int4"}, "down_proj", lambda t: t[1].zero_()),
        ({"weights_type": "int4"}, "down_proj_bias", half_a_step),
    ],
)
def test_stacks_of_experts_inside_the_graph_are_compared_too(tmp_path, options, name, change):
    base = recipes.build("gpt_oss", tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "out", weights="embed", **options)
    assert surgery.verify(tmp_path / "out", against=base).difference < 1e-4
    stored = f"model.layers.1.mlp.experts.{name}"
    tensors = load_file(base / "model.safetensors")
    change(tensors[stored])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=stored):
        surgery.verify(tmp_path / "out", against=base)


def test_codes_that_no_weight_of_the_model_has_are_not_counted(base, tmp_path):
    out = tmp_path / "out"
    surgery.export_onnx(base, output=out, **FORMS["codes in the graph"])
    (out / MANIFEST).unlink()
    model = onnx.load(out / "model.onnx")
    (prop,) = [prop for prop in model.metadata_props if prop.key == "surgery.contract"]
    contract = json.loads(prop.value)
    contract["quantised"][0]["weights"].append("model.layers.9.mlp.down_proj.weight")
    prop.value = json.dumps(contract)
    for tensor in list(model.graph.initializer):
        if tensor.name.startswith("model.layers.0.mlp.down_proj.weight."):
            model.graph.initializer.add().CopyFrom(tensor)
            model.graph.initializer[-1].name = tensor.name.replace("layers.0", "layers.9")
    onnx.save(model, out / "model.onnx")
    with pytest.raises(ProofError, match=r"codes that the model does not read: model\.layers\.9\.mlp\.down_proj"):
        surgery.verify(out, against=base)
