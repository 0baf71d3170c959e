# SPDX-License-Identifier: Apache-2.0
"""Adapters in graphs compute what PEFT computes: merged, swapped while a session runs, and soft prompts in front."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.onnx.export import export_onnx
from surgery_formats.errors import FitError, NothingChangedError
from tests.onnx.sessions import Plain, feed_encoder, open_session
from tests.oracles import recipes

IDS = np.array([[5, 17, 3, 88, 42, 9]])
MASK = np.ones_like(IDS)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK = {"task_type": "CAUSAL_LM"}

MERGED = {
    "lora on q and v": lambda: peft.LoraConfig(**TASK, r=4, target_modules=["q_proj", "v_proj"]),
    "lora on all": lambda: peft.LoraConfig(**TASK, r=4, lora_alpha=9, target_modules=ALL),
    "rslora": lambda: peft.LoraConfig(**TASK, r=4, use_rslora=True, target_modules=ALL),
    "dora": lambda: peft.LoraConfig(**TASK, r=4, use_dora=True, target_modules=ALL),
    "lora bias": lambda: peft.LoraConfig(**TASK, r=4, lora_bias=True, target_modules=["q_proj", "k_proj"]),
    "embedding": lambda: peft.LoraConfig(**TASK, r=4, target_modules=["embed_tokens", "q_proj"]),
    "head": lambda: peft.LoraConfig(**TASK, r=4, target_modules=["lm_head", "q_proj"]),
    "modules to save": lambda: peft.LoraConfig(
        **TASK, r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "token rows": lambda: peft.LoraConfig(**TASK, r=4, target_modules=["q_proj"], trainable_token_indices=[3, 17]),
    "loha": lambda: peft.LoHaConfig(**TASK, r=4, target_modules=ALL),
    "lokr": lambda: peft.LoKrConfig(**TASK, r=4, target_modules=ALL),
    "oft": lambda: peft.OFTConfig(**TASK, oft_block_size=8, target_modules=["q_proj", "up_proj"]),
    "ia3": lambda: peft.IA3Config(
        **TASK, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": lambda: peft.VeraConfig(**TASK, r=4, target_modules=["q_proj", "v_proj"]),
}
PROMPTS = {
    "prefix": lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=5),
    "prefix through a projection": lambda: peft.PrefixTuningConfig(
        **TASK, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": lambda: peft.PromptTuningConfig(**TASK, num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(**TASK, num_virtual_tokens=5, encoder_hidden_size=16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("model") / "base", hidden_size=64)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model whose queries, keys and values have biases: without one, a trained bias has no place to go."""
    return recipes.build("qwen2", tmp_path_factory.mktemp("model") / "base", hidden_size=64)


def trained(base, folder, config, seed=0, name="llama"):
    """An adapter of random values, saved, and PEFT's model with it."""
    model = peft.get_peft_model(recipes.load(name, base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * (0.02 if "oft" in name else 0.2))
    model.save_pretrained(folder)
    return model.eval()


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits[:, -ids.shape[1] :].numpy()


def copied(base, folder):
    for path in base.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("kind", MERGED)
def test_merged_adapters_of_every_kind_compute_what_peft_computes(base, biased, tmp_path, kind):
    name, base = ("qwen2", biased) if kind == "lora bias" else ("llama", base)
    expected = logits_of(trained(base, tmp_path / "adapter", MERGED[kind](), name=name))
    assert np.abs(expected - logits_of(recipes.load(name, base))).max() > 1e-2  # it does something
    here = copied(base, tmp_path / "base")
    before = (here / "model.safetensors").read_bytes()
    beside = export_onnx(here, output=here, merge=[(tmp_path / "adapter", 1.0)])
    assert (here / "model.safetensors").read_bytes() == before
    assert {one.name for one in beside.contract.weights} == {"model.safetensors", "delta.safetensors"}
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]
    export_onnx(base, output=tmp_path / "whole", merge=[(tmp_path / "adapter", 1.0)])
    for folder in (here, tmp_path / "whole"):
        found = Plain(folder / "model.onnx").step(IDS, MASK)
        assert np.abs(found - expected).max() <= 1e-4


def test_a_list_of_adapters_with_weights(base, tmp_path):
    factors = {}
    for number, name in enumerate(("one", "two")):
        trained(base, tmp_path / name, MERGED["lora on all"](), number)
        factors[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    model = recipes.load("llama", base)
    for name, weight in (("one", 0.7), ("two", -0.4)):
        for key, down in factors[name].items():
            if ".lora_A." in key:
                target = model.get_parameter(key.removeprefix("base_model.model.").replace(".lora_A", ""))
                target.data += weight * 9 / 4 * factors[name][key.replace("lora_A", "lora_B")] @ down
    export_onnx(base, output=tmp_path / "out", merge=[(tmp_path / "one", 0.7), (tmp_path / "two", -0.4)])
    assert np.abs(Plain(tmp_path / "out/model.onnx").step(IDS, MASK) - logits_of(model)).max() <= 1e-4


def test_a_merge_that_changes_nothing_leaves_nothing(base, tmp_path):
    trained(base, tmp_path / "adapter", MERGED["lora on all"]())
    here = copied(base, tmp_path / "base")
    for output, mode in ((here, "auto"), (tmp_path / "whole", "copy"), (tmp_path / "linked", "link")):
        with pytest.raises(NothingChangedError):
            export_onnx(here, output=output, weights=mode, merge=[(tmp_path / "adapter", 0.0)])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    assert {path.name for path in here.iterdir()} == {path.name for path in base.iterdir()}


def test_three_adapters_in_one_session(base, tmp_path):
    kinds = {"first": "lora on q and v", "second": "lora on all", "third": "rslora"}
    expected = {
        name: logits_of(trained(base, tmp_path / name, MERGED[kind](), seed))
        for seed, (name, kind) in enumerate(kinds.items())
    }
    result = export_onnx(base, output=tmp_path / "out", swap=[tmp_path / name for name in kinds])
    assert {f"{name}.onnx_adapter" for name in kinds} <= set(result.files)
    assert len(result.contract.slots) == 7 * 3
    session, contract = open_session(tmp_path / "out/model.onnx")
    feed = {"input_ids": IDS, "attention_mask": MASK}
    for number in range(contract.layers):
        for part in ("key", "value"):
            empty = np.zeros((1, contract.kv_heads, 0, contract.head_dim), np.float32)
            feed[f"past_key_values.{number}.{part}"] = empty
    found = session.run(["logits"], feed)[0]
    assert np.abs(found - logits_of(recipes.load("llama", base))).max() <= 1e-5
    for name in kinds:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(tmp_path / "out" / f"{name}.onnx_adapter"))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        assert np.abs(session.run(["logits"], feed, options)[0] - expected[name]).max() <= 1e-4


@pytest.mark.parametrize("kind", ["dora", "embedding", "modules to save", "loha", "oft", "ia3", "vera"])
def test_what_no_slot_can_hold_is_refused(base, tmp_path, kind):
    trained(base, tmp_path / "adapter", MERGED[kind]())
    with pytest.raises(FitError, match="cannot be swapped"):
        export_onnx(base, output=tmp_path / "out", swap=[tmp_path / "adapter"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_soft_prompts_compute_what_peft_computes_and_cost_no_prefill(base, tmp_path, kind, target):
    model = trained(base, tmp_path / "adapter", PROMPTS[kind]())
    result = export_onnx(base, output=tmp_path / "out", target=target, prefix=[tmp_path / "adapter"])
    assert result.contract.virtual_tokens == 5
    assert ("genai_config.json" in result.files) == ("rows.onnx" in result.files) == (not kind.startswith("prefix"))
    session, contract = open_session(tmp_path / "out/model.onnx")
    assert contract.prompt_kind
    counted = 0 if target == "portable" else 5  # there the graph counts virtual tokens by itself
    names = [one.name for one in session.get_outputs()]
    tokens, new, past = IDS, IDS, {}
    for step in range(4):  # the prompt without any past of the caller's, then one token after the other
        feed = {"input_ids": new, "attention_mask": np.ones((1, counted + tokens.shape[1]), np.int64), **past}
        found = dict(zip(names, session.run(None, feed), strict=True))
        expected = logits_of(model, tokens)[:, -new.shape[1] :]
        assert np.abs(found["logits"] - expected).max() <= 1e-4, step
        past = {name.replace("present", "past_key_values"): found[name] for name in names if name != "logits"}
        new = found["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], 1)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_soft_prompts_are_ids_behind_the_vocabulary_where_a_runtime_has_a_past_of_its_own(base, tmp_path, kind):
    expected = logits_of(trained(base, tmp_path / "adapter", PROMPTS[kind]()))
    export_onnx(base, output=tmp_path / "out", prefix=[tmp_path / "adapter"])
    graph = Plain(tmp_path / "out/rows.onnx")
    assert graph.contract.vocabulary_rows == (recipes.VOCAB, 5)
    ids = np.concatenate([np.arange(recipes.VOCAB, recipes.VOCAB + 5)[None], IDS], 1)
    found = graph.step(ids, np.ones_like(ids))
    assert np.abs(found[:, 5:] - expected).max() <= 1e-4
    assert json.loads((tmp_path / "out/genai_config.json").read_text())["model"]["decoder"]["filename"] == "rows.onnx"


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert_sequence", "SEQ_CLS"),
        ("bert_token", "TOKEN_CLS"),
        ("roberta_sequence", "SEQ_CLS"),
        ("distilbert_sequence", "SEQ_CLS"),
    ],
)
def test_prompt_tuned_classifiers_with_the_head_that_peft_saved(tmp_path, name, task, target):
    folder = recipes.build(name, tmp_path / "base")
    sizes = {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4}
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, **sizes)
    model = trained(folder, tmp_path / "adapter", config, name=name)
    export_onnx(folder, output=tmp_path / "out", target=target, prefix=[tmp_path / "adapter"])
    session, contract = open_session(tmp_path / "out/model.onnx")
    pad = model.config.pad_token_id if hasattr(model, "config") else 0
    ids = np.array([[5, 17, 23, 88, 42], [29, 8, 77, pad, pad]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = feed_encoder(session, ids, mask)["logits"]
    extra = {}
    if any(one.name == "token_type_ids" for one in session.get_inputs()):
        extra["token_type_ids"] = torch.arange(ids.size).reshape(ids.shape) % 2
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **extra).logits.numpy()
    if task == "TOKEN_CLS":
        expected, found = expected[:, -5:][mask.astype(bool)], found[mask.astype(bool)]
    assert np.abs(found - expected).max() <= 1e-4
    assert contract.prompt_kind == "PROMPT_TUNING"


def test_all_three_ways_at_once(base, tmp_path):
    trained(base, tmp_path / "merged", MERGED["dora"](), 1)
    trained(base, tmp_path / "swapped", MERGED["lora on all"](), 2)
    trained(base, tmp_path / "prompt", PROMPTS["prompt"](), 3)
    result = export_onnx(
        base,
        output=tmp_path / "out",
        merge=[(tmp_path / "merged", 1.0)],
        swap=[tmp_path / "swapped"],
        prefix=[tmp_path / "prompt"],
    )
    assert [(one["name"], one["mode"]) for one in result.contract.adapters] == [
        ("merged", "merged"),
        ("swapped", "swapped"),
        ("prompt", "prefix"),
    ]
    merged = peft.PeftModel.from_pretrained(recipes.load("llama", base), tmp_path / "merged").merge_and_unload()
    model = peft.PeftModel.from_pretrained(merged, tmp_path / "prompt").eval()
    session, _ = open_session(tmp_path / "out/model.onnx")
    feed = {"input_ids": IDS, "attention_mask": np.ones((1, 5 + IDS.shape[1]), np.int64)}
    assert np.abs(session.run(["logits"], feed)[0] - logits_of(model)).max() <= 1e-4


def test_an_adapter_of_another_base_is_refused_by_name(base, tmp_path):
    trained(base, tmp_path / "adapter", MERGED["lora on all"]())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    broken = {name: torch.zeros(4, 63) if "1.self_attn.q_proj.lora_A" in name else one for name, one in tensors.items()}
    save_file(broken, tmp_path / "adapter/adapter_model.safetensors")
    for ways in ({"merge": [(tmp_path / "adapter", 1.0)]}, {"swap": [tmp_path / "adapter"]}):
        with pytest.raises(FitError, match=r"layers\.1\.self_attn\.q_proj"):
            export_onnx(base, output=tmp_path / "out", **ways)
    with pytest.raises(FitError, match="no soft prompt"):
        export_onnx(base, output=tmp_path / "out", prefix=[tmp_path / "adapter"])
    assert not (tmp_path / "out").exists()
