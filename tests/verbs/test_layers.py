# SPDX-License-Identifier: Apache-2.0
"""A model with other layers is what transformers makes of the same modules in memory, to the bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from tests.support.kit import ROOT
from tests.support.layered_models import FAMILIES, in_memory, load, logits, make
from tests.support.quantised_folders import FORMATS, quantise_folder

ORDERS: Mapping[str, tuple[Mapping[str, str], tuple[int, ...]]] = {
    "keep": ({"keep": "0-1,4-5"}, (0, 1, 4, 5)),
    "drop": ({"drop": "2"}, (0, 1, 3, 4, 5)),
    "repeat": ({"repeat": "1-2x3"}, (0, 1, 2, 1, 2, 1, 2, 3, 4, 5)),
    "any order": ({"keep": "5,0,3-,0"}, (5, 0, 3, 4, 5, 0)),
}


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_its_modules_do_in_this_order(family: str, how: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    options, order = ORDERS[how]
    result = surgery.layers(base, output=tmp_path / "out", **options)
    model = load(tmp_path / "out")
    assert model.config.num_hidden_layers == len(order)
    assert torch.equal(logits(model), in_memory(base, FAMILIES[family][2], order))
    assert set(result.ledger.classes) <= {"copied", "dropped"}
    surgery.verify(tmp_path / "out", against=base)


def test_layers_that_differ_by_no_known_rule_are_refused(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(surgery.FitError, match="layers 0 and 2 consist of different tensors"):
        surgery.layers(base, output=tmp_path / "out", keep="0-3")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep": "0-6"}, "there is no layer 6"),
        ({"keep": "3-1"}, "ends before it begins"),
        ({"keep": "first"}, "is no range of layers"),
        ({"keep": "0-5"}, "these are all 6 layers"),
        ({"keep": "0-1x9999"}, "is no range of layers"),
        ({"keep": "0-5x999"}, "are more than 4096"),
        ({"drop": "0-5"}, "no layer would be left"),
        ({"drop": "1x2"}, "a layer is dropped once"),
        ({"repeat": "1-2,2-3"}, "names a layer in two ranges"),
        ({"repeat": "1-2x1"}, "repeats nothing"),
        ({}, "nothing to change was named"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: Mapping[str, str], error: str, tmp_path: Path):
    base = make("llama", tmp_path / "base")
    with pytest.raises(surgery.FitError, match=error):
        surgery.layers(base, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_lose_their_layers_and_are_numbered_anew(tmp_path: Path):
    base = make("llama", tmp_path / "base", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 4
    surgery.layers(base, output=tmp_path / "out", keep="0,5")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    assert torch.equal(logits(load(tmp_path / "out")), in_memory(base, "model.layers", (0, 5)))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = sum(
        tensor.numel() * 4 for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert index["metadata"]["total_size"] == sizes


def test_a_pickle_becomes_safetensors_and_a_type_is_cast(tmp_path: Path):
    base = make("llama tied", tmp_path / "base")
    model = load(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    surgery.layers(base, output=tmp_path / "out", drop="1", dtype="bf16")
    made = load(tmp_path / "out")
    assert made.dtype == torch.bfloat16
    assert made.lm_head.weight.data_ptr() == made.model.embed_tokens.weight.data_ptr()
    del model.model.layers[1]
    for name, parameter in model.to(torch.bfloat16).named_parameters():
        assert torch.equal(parameter, made.get_parameter(name)), name


def test_the_same_command_gives_the_same_bytes_and_a_dry_run_none(tmp_path: Path):
    base = make("llama", tmp_path / "base")
    copied = shutil.copytree(base, tmp_path / "other place" / "base")
    for number, folder in enumerate((base, copied)):
        surgery.layers(folder, output=tmp_path / f"out{number}", repeat="1-2", workers=number + 1)
    names = sorted(path.name for path in (tmp_path / "out0").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out1").iterdir())
    for name in names:
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes(), name
    planned = surgery.layers(base, output=tmp_path / "none", repeat="1-2", dry_run=True)
    assert not (tmp_path / "none").exists()
    assert planned.nbytes == surgery.layers(base, output=tmp_path / "again", repeat="1-2").nbytes


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"vocab": "pad=0"}, surgery.UsageError, "is no change of a vocabulary"),
        ({"vocab": "trim="}, surgery.UsageError, "is no change of a vocabulary"),
        ({"vocab": "trim"}, surgery.FitError, "has no tokenizer.json"),
        ({"vocab": "trim=nowhere"}, surgery.NotFoundError, "nowhere"),
        ({"split": "qkv", "fuse": "qkv"}, surgery.UsageError, "split and fuse are given together"),
        ({"keep": "1", "drop": "2"}, surgery.UsageError, "keep and drop say the same"),
        ({"fuse": "everything"}, surgery.FitError, "no projection 'everything'"),
    ],
)
def test_changes_that_mean_nothing_are_refused(options: Any, error: type[Exception], text: str, tmp_path: Path):
    base = make("llama", tmp_path / "base")
    with pytest.raises(error, match=text):
        surgery.layers(base, output=tmp_path / "out", **options)


def test_what_has_no_folder_of_its_own_is_refused(tmp_path: Path):
    with pytest.raises(surgery.FitError, match="an adapter where a full model was expected"):
        surgery.layers(ROOT / "examples" / "lora", output=tmp_path / "out", keep="0")
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    save_file({"a.0.weight": torch.ones(2, 2)}, tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text(
        '{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(surgery.FitError, match="a pipeline of several models"):
        surgery.layers(tmp_path / "pipe", output=tmp_path / "out", keep="0")


@pytest.mark.parametrize("format_name", FORMATS)
def test_codes_are_copied(format_name: str, tmp_path: Path):
    base = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", format_name)
    surgery.layers(base, output=tmp_path / "out", keep="1,0,1")
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "out"))
    places = {"0": "1", "1": "0", "2": "1"}
    origins = {name: re.sub(r"layers\.(\d+)", lambda found: f"layers.{places[found[1]]}", name) for name in after}
    assert set(origins.values()) == {name for name in before if not re.search(r"layers\.[2-9]", name)}
    for name, origin in origins.items():
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), before[origin].reshape(-1).view(torch.uint8))
    with pytest.raises(surgery.FitError, match="codes are copied"):
        surgery.layers(base, output=tmp_path / "cast", keep="1,0", dtype="fp32")


def test_a_file_that_carries_its_configuration_is_refused(tmp_path: Path):
    """GGUF: its header says how many layers there are."""
    file = ROOT / "tests" / "containers" / "golden" / "smollm3.gguf"
    with pytest.raises(surgery.FitError, match="its configuration lies in the weight file"):
        surgery.layers(file, output=tmp_path / "out", keep="0")
