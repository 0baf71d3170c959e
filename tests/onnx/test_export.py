# SPDX-License-Identifier: Apache-2.0
"""Exports: weights stay in place, every tensor is used, and a failing export leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.merge import merge
from surgery_formats.errors import FitError, MalformedError, OutputExistsError
from tests.oracles import recipes
from tests.support import header_only
from tests.support.checked_graphs import check_graph
from tests.support.sessions import Plain, open_session

IDS = np.array([[5, 17, 3, 88]])


@pytest.fixture
def base(tmp_path):
    return recipes.build("llama", tmp_path / "base", hidden_size=64)


def files_of(folder):
    return {path.name: (path.stat().st_size, path.stat().st_ino) for path in folder.iterdir()}


def logits(folder):
    return Plain(folder / "model.onnx").step(IDS, np.ones_like(IDS))


def rewrite(folder, change):
    """The weights of `folder` after `change` of the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_export_into_the_weights_folder_only_adds_files(base):
    before = files_of(base)
    result = export_onnx(base, output=base)
    after = files_of(base)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"model.onnx", "prefill.onnx", "genai_config.json"}
    assert result.weights == "reference"
    assert result.nbytes == sum(after[name][0] for name in set(after) - set(before))
    with torch.no_grad():
        expected = recipes.load("llama", base)(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(logits(base) - expected).max() <= 1e-4


@pytest.mark.parametrize("taken", ["model.onnx", "prefill.onnx", "genai_config.json"])
def test_existing_files_are_never_replaced(base, taken):
    (base / taken).write_text("mine")
    before = files_of(base)
    with pytest.raises(OutputExistsError) as caught:
        export_onnx(base, output=base)
    assert caught.value.file == str(base / taken)
    assert files_of(base) == before


def test_initializers_are_byte_ranges_of_the_checkpoint(base):
    export_onnx(base, output=base)
    model = onnx.load(base / "model.onnx", load_external_data=False)
    stored = load_file(base / "model.safetensors")
    raw = (base / "model.safetensors").read_bytes()
    seen = set()
    for one in model.graph.initializer:
        if one.external_data:
            entry = {item.key: item.value for item in one.external_data}
            assert entry["location"] == "model.safetensors"
            where = slice(int(entry["offset"]), int(entry["offset"]) + int(entry["length"]))
            names = [
                name for name in stored if raw.find(stored[name].numpy().tobytes(), *where.indices(len(raw))[:2]) >= 0
            ]
            assert np.frombuffer(raw[where], np.float32).size == np.prod(one.dims)
            seen.update(names)
    assert seen == set(stored)
    assert "gate_proj+up_proj" in str(
        [one.name for one in model.graph.initializer]
    )  # adjacent as transformers stores them


@pytest.mark.parametrize("mode", ["copy", "link", "embed", "auto"])
def test_every_way_to_place_weights_computes_the_same(base, tmp_path, mode):
    export_onnx(base, output=base)
    expected = logits(base)
    result = export_onnx(base, output=tmp_path / "out", weights=mode)
    out = files_of(tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out"), expected)
    assert result.weights == ("copy" if mode == "auto" else mode)
    assert {"config.json", "genai_config.json", "surgery_manifest.json"} <= set(out)
    if mode == "embed":
        assert "model.safetensors" not in out
        check_graph(tmp_path / "out/model.onnx")
    else:
        same = out["model.safetensors"][1] == (base / "model.safetensors").stat().st_ino
        assert same == (mode == "link")
    assert ("onnx.load refuses" in str(result.warnings)) == (mode == "link")


def test_sharded_checkpoints_are_referenced_shard_by_shard(tmp_path):
    whole = recipes.build("qwen2", tmp_path / "whole")
    recipes.load("qwen2", whole).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for folder in ("whole", "sharded"):
        export_onnx(tmp_path / folder, output=tmp_path / folder)
    assert len(open_session(tmp_path / "sharded/model.onnx")[1].weights) > 1
    assert np.array_equal(logits(tmp_path / "sharded"), logits(tmp_path / "whole"))


def test_a_folder_made_elsewhere_is_replaced_only_when_asked(base, tmp_path):
    out = tmp_path / "out"
    export_onnx(base, output=out)
    with pytest.raises(OutputExistsError):
        export_onnx(base, output=out)
    export_onnx(base, output=out, target="portable", overwrite=True)
    assert not (out / "prefill.onnx").exists()


def test_the_graph_names_no_folder_of_this_machine(base, tmp_path):
    export_onnx(base, output=tmp_path / "out")
    for path in (tmp_path / "out").glob("*.onnx"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert not [one for one in onnx.load(path, load_external_data=False).graph.node if one.doc_string]


@pytest.mark.parametrize("mode", ["copy", "link", "embed"])
def test_copies_of_the_same_base_give_the_same_bytes(base, tmp_path, mode):
    elsewhere = tmp_path / "elsewhere" / base.name  # the manifest names its inputs, without the folders above them
    copies = [base, shutil.copytree(base, elsewhere, copy_function=shutil.copyfile)]
    outputs = [tmp_path / f"out{number}" for number in range(2)]
    for copy, output in zip(copies, outputs, strict=True):
        export_onnx(copy, output=output, weights=mode)
    first, second = ({path.name: path.read_bytes() for path in output.iterdir()} for output in outputs)
    assert {"model.onnx", "prefill.onnx", "genai_config.json", "surgery_manifest.json"} <= first.keys()
    assert first == second


def test_other_values_in_the_base_give_another_plan(base, tmp_path):
    def plan(name):
        export_onnx(base, output=tmp_path / name)
        return json.loads((tmp_path / name / "surgery_manifest.json").read_text())["plan"]

    before = plan("before")
    rewrite(base, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert plan("after") != before


def test_the_contract_identifies_the_weight_file(base):
    result = export_onnx(base, output=base)
    (found,) = result.contract.weights
    assert (found.name, found.size) == ("model.safetensors", (base / "model.safetensors").stat().st_size)
    rewrite(base, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].double()}))
    for name in ("model.onnx", "prefill.onnx", "genai_config.json"):
        os.unlink(base / name)
    assert export_onnx(base, output=base).contract.weights[0].header != found.header


# --- what does not fit -----------------------------------------------------------------------------------------------

NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda tensors: tensors.pop(NORM), NORM),
        (lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}), "model.extra.weight"),
        (lambda tensors: tensors.update({NORM: torch.ones(63)}), NORM),
        (lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}), NORM),
        (lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)}), "layers.3"),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "q_proj.bias"),
    ],
    ids=["missing", "extra", "misshapen", "quantised", "a layer too many", "a bias nobody asked for"],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(base, tmp_path, change, names):
    rewrite(base, change)
    before = files_of(base)
    for output in (base, tmp_path / "out"):
        with pytest.raises(FitError) as caught:
            export_onnx(base, output=output)
        assert names in str(caught.value)
    assert files_of(base) == before
    assert not (tmp_path / "out").exists()


def test_derivable_tensors_of_old_files_may_be_unused(base, tmp_path):
    export_onnx(base, output=tmp_path / "without")
    rewrite(base, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    export_onnx(base, output=base)
    assert np.array_equal(logits(base), logits(tmp_path / "without"))


def configured(base, **fields):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "said",
    [{"temperature": "x"}, {"top_k": [1]}, {"top_p": {}}, {"eos_token_id": {"a": 1}}, {"eos_token_id": ["2"]}],
    ids=str,
)
def test_an_invalid_generation_config_is_named_and_nothing_is_written(base, tmp_path, said):
    (base / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(MalformedError, match=next(iter(said))):
        export_onnx(base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "search"),
    [
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"do_sample": True, "top_k": 0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False, "temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"do_sample": True, "temperature": 0.6, "top_k": 20}),
        ({"top_p": 0.9}, {"do_sample": False, "temperature": 1.0, "top_k": 50}),
    ],
    ids=str,
)
def test_the_search_of_onnxruntime_genai_is_that_of_generation_config(base, tmp_path, said, search):
    (base / "generation_config.json").write_text(json.dumps(said))
    export_onnx(base, output=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())["search"]
    assert {key: written[key] for key in search} == search


def test_minus_one_in_old_configurations_means_no_padding_token(base, tmp_path):
    (base / "generation_config.json").write_text('{"pad_token_id": -1, "eos_token_id": [7, 9]}')
    export_onnx(base, output=tmp_path / "out")
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (model["pad_token_id"], model["eos_token_id"]) == (7, [7, 9])


def test_an_unknown_architecture_is_named(base):
    configured(base, model_type="mamba9")
    with pytest.raises(FitError, match="mamba9"):
        export_onnx(base, output=base)


@pytest.mark.parametrize(("target", "dtype"), [("cpu", "bf16"), ("cpu", "fp16")])
def test_a_type_the_target_cannot_run_is_refused(base, target, dtype):
    with pytest.raises(FitError, match=f"{target} cannot run {dtype}"):
        export_onnx(base, output=base, target=target, dtype=dtype)
    assert not (base / "model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "tpu"}, "no target 'tpu'"),
        ({"dtype": "fp8"}, "no type 'fp8'"),
        ({"weights": "steal"}, "'steal' is not a way"),
        ({"max_length": 0}, "max_length is 0"),
        ({"weights": "copy"}, "already in this folder"),
    ],
)
def test_invalid_options_are_refused(base, options, says):
    with pytest.raises(FitError, match=says):
        export_onnx(base, output=base, **options)


def test_a_graph_cannot_refer_to_weights_of_another_folder(base, tmp_path):
    with pytest.raises(FitError, match="only to weights in its own folder"):
        export_onnx(base, output=tmp_path / "out", weights="reference")


def test_weights_behind_a_link_out_of_the_folder_are_refused(base, tmp_path):
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for path in base.iterdir():
        os.rename(path, tmp_path / "blobs" / path.name)
        os.symlink(tmp_path / "blobs" / path.name, tmp_path / "snapshots/abc" / path.name)
    cached = tmp_path / "snapshots/abc"
    with pytest.raises(FitError, match="link out of its folder"):
        export_onnx(cached, output=cached)
    export_onnx(cached, output=tmp_path / "out")
    assert logits(tmp_path / "out").shape == (1, 4, recipes.VOCAB)


def test_positions_end_where_the_model_ends(tmp_path):
    gpt2 = recipes.build("gpt2", tmp_path / "gpt2")
    with pytest.raises(FitError, match="64 positions, but 65 were requested"):
        export_onnx(gpt2, output=gpt2, max_length=65)
    dynamic = recipes.build("llama_dynamic", tmp_path / "dynamic")
    with pytest.raises(FitError, match="dynamic rotary positions"):
        export_onnx(dynamic, output=dynamic, max_length=11)


def test_rotary_tables_beyond_memory_need_a_max_length(tmp_path):
    """Tables of cosines are made when a graph is loaded: 2 ** 31 rows of them would take all memory there is."""
    base = recipes.build("llama", tmp_path / "base", hidden_size=64, max_position_embeddings=(1 << 31) - 1)
    with pytest.raises(FitError, match="max_length"):
        export_onnx(base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_onnx(base, output=tmp_path / "out", max_length=100).contract.max_length == 100


def test_pickled_weights_are_not_referenced(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    os.unlink(base / "model.safetensors")
    with pytest.raises(FitError, match="only to safetensors files"):
        export_onnx(base, output=base)


# --- types, sizes, layout --------------------------------------------------------------------------------------------


def test_a_bf16_checkpoint_in_fp32_is_the_same_model(tmp_path):
    base = recipes.build("llama", tmp_path / "base", dtype=torch.bfloat16)
    export_onnx(base, output=base)
    with torch.no_grad():
        expected = recipes.load("llama", base)(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(logits(base) - expected).max() <= 1e-4


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "bf16"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_graphs_for_cuda_have_the_requested_type(tmp_path, dtype, kind):
    base = recipes.build("gemma2", tmp_path / "base", dtype=torch.bfloat16)
    result = export_onnx(base, output=base, target="cuda", dtype=dtype)
    assert result.contract.dtype == kind
    check_graph(base / "model.onnx")


def test_a_packed_merge_replaces_three_multiplications_by_one(tmp_path):
    plain = merge("examples/base", "examples/lora", output=tmp_path / "plain")
    packed = merge("examples/base", "examples/lora", output=tmp_path / "packed", layout="packed")
    assert (
        load_file(tmp_path / "plain/model.safetensors").keys()
        == load_file(tmp_path / "packed/model.safetensors").keys()
    )
    for name, tensor in load_file(tmp_path / "plain/model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "packed/model.safetensors")[name])
    assert packed.ledger.plan.files[0].tensors[0].offset % 4096 == 0
    assert plain.ledger.plan.id != packed.ledger.plan.id
    nodes = {}
    for name in ("plain", "packed"):
        nodes[name] = export_onnx(tmp_path / name, output=tmp_path / name, target="cuda").nodes
    assert nodes["plain"] - nodes["packed"] == 2 * 6
    for name in ("plain", "packed"):
        export_onnx(tmp_path / name, output=tmp_path / f"{name}-cpu")
    assert np.abs(logits(tmp_path / "plain-cpu") - logits(tmp_path / "packed-cpu")).max() <= 1e-4


def test_70_billion_parameters_take_no_longer_than_their_header(tmp_path):
    base = header_only.llama(tmp_path / "base", "70b", tied=False)
    began = time.process_time()
    result = export_onnx(base, output=base, target="cuda")
    assert time.process_time() - began < 2
    assert result.contract.layers == 80
    assert result.nbytes < 10_000_000
