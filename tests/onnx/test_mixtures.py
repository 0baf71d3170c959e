# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: adapters on every part of them, only chosen experts count, and weights are read where they lie."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.verbs.export_onnx import export_onnx
from surgery.verbs.run import run
from surgery.verbs.verify import verify
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support import trained
from tests.support.published import dequantised, published_gpt_oss
from tests.support.sessions import Plain

IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])
TOLERANCE = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADAPTERS = {
    "mixtral attention": ("mixtral", {"target_modules": ATTENTION}),
    "mixtral router": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"]}),
    "mixtral experts": ("mixtral", {"target_modules": [], **EXPERTS}),
    "qwen2 shared": ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj", "shared_expert_gate"]}),
    "gpt_oss attention": ("gpt_oss", {"target_modules": ATTENTION}),
    "deepseek attention": ("deepseek_v3", {"target_modules": LATENT}),
    "deepseek experts": ("deepseek_v3", {"target_modules": ["o_proj"], **EXPERTS}),
    "granite router": ("granitemoe", {"target_modules": [], "target_parameters": ["router.weight"]}),
}
STACKED = {
    "gpt_oss experts": ("gpt_oss", EXPERTS),
    "granite experts": ("granitemoe", EXPERTS),
}
"""Of which a slot holds none."""


def _adapter(name, tmp_path):
    model, fields = {**ADAPTERS, **STACKED}[name]
    base = recipes.build(model, tmp_path / "base")
    adapter = trained.train(model, base, trained._lora(**fields), tmp_path / "adapter")
    expected = trained.logits(trained.attached(model, base, (adapter, 1.0)), IDS)
    assert np.abs(expected - trained.logits(recipes.load(model, base), IDS)).max() > 0.05
    return base, adapter, expected


@pytest.mark.parametrize("target", ["cuda", "portable"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_in_slots_gives_the_logits_of_peft(name, target, tmp_path):
    base, adapter, expected = _adapter(name, tmp_path)
    out = tmp_path / "out"
    export_onnx(base, swap=[adapter], output=out, target=target, dtype="fp32")
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(out / "adapters" / "adapter.onnx_adapter"))
    options.add_active_adapter(loaded)
    plain = Plain(out / "model.onnx")
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    assert np.abs(plain.session.run(["logits"], feed, options)[0] - expected).max() <= TOLERANCE
    verify(out)


@pytest.mark.parametrize("name", [*ADAPTERS, *STACKED])
def test_a_merged_adapter_gives_the_logits_of_peft(name, tmp_path):
    base, adapter, expected = _adapter(name, tmp_path)
    export_onnx(base, [adapter], output=tmp_path / "out", target="cpu")
    assert np.abs(Plain(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS)) - expected).max() <= TOLERANCE


def test_stacked_experts_have_no_slots(tmp_path):
    base = recipes.build("gpt_oss", tmp_path / "base")
    adapter = trained.train("gpt_oss", base, trained._lora(target_modules=[], **EXPERTS), tmp_path / "adapter")
    with pytest.raises(FitError, match=r"an update of stacked experts .* a slot holds a low-rank addition only"):
        export_onnx(base, swap=[adapter], output=tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_weights_lie_where_they_lay(name, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", target="cpu")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert max(len(one.raw_data) for one in graph.initializer) <= 1024
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("target", ["cuda", "cpu", "portable"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_that_nobody_chose_is_not_computed(name, target, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    path, ids = base / "model.safetensors", IDS[:, :1]
    tensors, chosen = load_file(path), set()
    model = recipes.load(name, base)
    for layer in model.model.layers:
        router = getattr(layer.mlp, "gate", None) or layer.mlp.router
        router.register_forward_hook(lambda *args: chosen.add(tuple(args[2][2].flatten().tolist())))
    expected = trained.logits(model, ids)
    for layer, numbers in enumerate(chosen):
        assert len(numbers) == 2, layer
    unused = set(range(5)) - {number for numbers in chosen for number in numbers}
    assert unused
    for key, values in tensors.items():
        if ".experts." not in key:
            continue
        for number in unused:
            if name == "gpt_oss":
                values[number] = torch.nan
            elif f".experts.{number}." in key:
                values.fill_(torch.nan)
    save_file(tensors, path, {"format": "pt"})
    export_onnx(base, output=tmp_path / "out", target=target, dtype="fp32")
    found = Plain(tmp_path / "out" / "model.onnx").step(ids, np.ones_like(ids))
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_stacks_as_transformers_holds_them_and_torn_shards(name, tmp_path):
    """Experts of one layer in several files, and all experts of a layer in one tensor."""
    base = recipes.build(name, tmp_path / "base")
    model = recipes.load(name, base)
    expected = trained.logits(model, IDS)
    model.save_pretrained(tmp_path / "torn", max_shard_size="20KB")
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(values, stacked / "model.safetensors", {"format": "pt"})
    (stacked / "config.json").write_bytes((base / "config.json").read_bytes())
    for folder in (tmp_path / "torn", stacked):
        export_onnx(folder, output=tmp_path / f"{folder.name}-out", target="cpu")
        found = Plain(tmp_path / f"{folder.name}-out" / "model.onnx").step(IDS, np.ones_like(IDS))
        assert np.abs(found - expected).max() <= TOLERANCE


def test_layers_that_predict_several_tokens_are_left_out(tmp_path):
    base = recipes.build("deepseek_v3", tmp_path / "base")
    path = base / "model.safetensors"
    further = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.enorm.weight": torch.ones(32)}
    save_file({**load_file(path), **further}, path, {"format": "pt"})
    export_onnx(base, output=tmp_path / "out", target="cpu")
    prompt = IDS[0].tolist()
    expected = trained.generated(recipes.load("deepseek_v3", recipes.build("deepseek_v3", tmp_path / "same")), IDS, 5)
    assert list(run(tmp_path / "out", [prompt], max_new=5).texts[0].tokens) == expected


def test_gpt_oss_as_it_ispublished_gpt_oss(tmp_path):
    """Experts in MXFP4, as OpenAI publishes them, are written as floats."""
    base = published_gpt_oss(tmp_path / "base")
    export_onnx(base, output=tmp_path / "out", target="portable")
    plain = Plain(tmp_path / "out" / "model.onnx")
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    found = plain.session.run(["logits"], feed)[0]
    assert np.abs(found - trained.logits(dequantised(base), IDS)).max() <= TOLERANCE
    verify(tmp_path / "out", against=base)


@pytest.mark.parametrize(
    ("name", "fields", "fault"),
    [
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "other"}, "topk_method is 'other'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is softmax"),
        ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("mixtral", {"num_experts_per_tok": 6}, "6 experts are chosen of 5"),
    ],
)
def test_what_no_recipe_covers_is_refused(name, fields, fault, tmp_path):
    base = recipes.build(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | fields
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(FitError, match=fault):
        export_onnx(base, output=tmp_path / "out")


def test_the_contract_says_that_no_cuda_graph_can_be_recorded(tmp_path):
    graphs = {}
    for name in ("mixtral", "llama"):
        base = recipes.build(name, tmp_path / name)
        graphs[name] = export_onnx(base, output=tmp_path / f"{name}-out", target="cuda", dtype="fp16").contract
    assert graphs["mixtral"].sized_late
    assert not graphs["llama"].sized_late
    assert "sized_late" in graphs["mixtral"].as_metadata()["surgery.contract"]
    assert "sized_late" not in graphs["llama"].as_metadata()["surgery.contract"]  # runners of before take it
