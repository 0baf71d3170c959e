# SPDX-License-Identifier: Apache-2.0
"""Every conversion of a soft prompt does the same in PEFT's forward; what would not is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.oracles import peft_oracle, recipes
from tests.support.adapter_files import GOLDEN
from tests.support.kit import ROOT
from tests.support.prompts import write_prompt

PROMPT, BASE = ROOT / "examples" / "prompt", ROOT / "examples" / "base"
HUB = GOLDEN / "adapterhub_prefix"
IDS = torch.tensor([[3, 7, 11, 2, 30, 9]])


def logits(base: Any, prompt: Path) -> Any:
    """Of the text, as PEFT computes it."""
    with peft_oracle.quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(base, prompt).eval()
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def rows_for(model: Any, count: int = 4, seed: int = 1) -> Any:
    width = model.get_input_embeddings().embedding_dim
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize("to", ["prompt", "p-tuning", "cpt", "prefix"])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "CPT"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_rows_do_the_same_as_every_kind(name: str, kind: str, to: str, tmp_path: Path) -> None:
    recipes.build(name, tmp_path / "base")
    rows = rows_for(recipes.load(name, tmp_path / "base"))
    more = {"cpt_token_ids": [1] * 4, "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1] * 4} if kind == "CPT" else {}
    more |= {"encoder_hidden_size": 8} if kind == "P_TUNING" else {}
    source = write_prompt(tmp_path / "prompt", rows, kind, **more)
    result = surgery.prompt_convert(source, to, base=tmp_path / "base", output=tmp_path / "out")
    assert result.exact
    assert result.tokens == 4
    expected = logits(recipes.load(name, tmp_path / "base"), source)
    assert (logits(recipes.load(name, tmp_path / "base"), tmp_path / "out") - expected).abs().max() < 1e-5
    if to != "prefix":
        assert np.array_equal(load_numpy(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"], rows)


@pytest.mark.parametrize("case", ["prefix", "prefix-mlp"])
def test_a_prefix_of_adapterhub_does_the_same_in_peft(case: str, tmp_path: Path) -> None:
    """Its logits are those of the library's own forward, in which tokens keep their positions."""
    result = surgery.prompt_convert(HUB / case, "prefix", base=HUB / "base", output=tmp_path / "out")
    assert "turned by 3 positions" in result.how
    plain = transformers.AutoModelForCausalLM.from_pretrained(HUB / "base", dtype=torch.float32)
    expected = load_file(HUB / f"{case}.logits.safetensors")["logits"]
    with torch.no_grad():
        assert (plain(IDS).logits - expected).abs().max() > 0.1
    assert (logits(plain, tmp_path / "out") - expected).abs().max() < 1e-5
    surgery.prompt_convert(tmp_path / "out", "adapterhub", base=HUB / "base", output=tmp_path / "back")
    ours, theirs = (surgery.prompt_show(path).parts[0] for path in (tmp_path / "back", HUB / case))
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-6)
    assert ours.value_norms == pytest.approx(theirs.value_norms, rel=1e-6)
    surgery.prompt_convert(tmp_path / "back", "prefix", base=HUB / "base", output=tmp_path / "again")
    plain = transformers.AutoModelForCausalLM.from_pretrained(HUB / "base", dtype=torch.float32)
    assert (logits(plain, tmp_path / "again") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama_llama3", "gpt_neox"])
def test_keys_turn_with_the_models_own_frequencies(name: str, tmp_path: Path) -> None:
    """Scaled ones, and those of a part of each head: turned to and fro they are what they were, and in between they are not."""
    recipes.build(name, tmp_path / "base")
    config = recipes.load(name, tmp_path / "base").config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = config.hidden_size // config.num_attention_heads
    table = np.random.default_rng(0).standard_normal((3, 2 * config.num_hidden_layers * heads * dim)).astype(np.float32)
    source = write_prompt(tmp_path / "prefix", table, prefix=(config.num_hidden_layers, heads, dim))
    surgery.prompt_convert(source, "adapterhub", base=tmp_path / "base", output=tmp_path / "hub")
    surgery.prompt_convert(tmp_path / "hub", "prefix", base=tmp_path / "base", output=tmp_path / "back")
    (hub,) = load_numpy(tmp_path / "hub" / "adapter.safetensors").values()
    back = load_numpy(tmp_path / "back" / "adapter_model.safetensors")["prompt_embeddings"]
    assert np.abs(back - table).max() < 1e-5
    assert np.abs(hub.reshape(table.shape) - table).max() > 0.1


def test_rows_become_a_textual_inversion_and_come_back_with_a_word_on_their_place(tmp_path: Path) -> None:
    inversion = GOLDEN / "textual_inversion" / "fluffy.safetensors"
    result = surgery.prompt_convert(inversion, "prompt", output=tmp_path / "prompt")
    assert not result.exact
    assert "their place is not" in result.warnings[0]
    back = surgery.prompt_convert(tmp_path / "prompt", "embedding", output=tmp_path / "fluffy.safetensors")
    assert not back.exact
    (before,), (after,) = (list(load_numpy(path).values()) for path in (inversion, tmp_path / "fluffy.safetensors"))
    assert np.array_equal(before.reshape(after.shape).astype(np.float32), after)
    same = surgery.prompt_convert(inversion, "learned-embeds", output=tmp_path / "learned_embeds.safetensors")
    assert same.exact
    assert list(load_numpy(tmp_path / "learned_embeds.safetensors")) == ["fluffy"]


def test_what_would_not_do_the_same_is_refused(tmp_path: Path) -> None:
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 12 * 64), np.float32), prefix=(6, 2, 32))
    out = tmp_path / "out"
    for to in ("prompt", "cpt", "embedding"):
        with pytest.raises(FitError, match="no rows before the input"):
            surgery.prompt_convert(prefix, to, output=out)
    with pytest.raises(FitError, match="goes behind the embeddings"):
        surgery.prompt_convert(PROMPT, "adapterhub", output=out)
    with pytest.raises(FitError, match="behind the embeddings, with their positions and norm"):
        surgery.prompt_convert(GOLDEN / "adapterhub" / "bert-prompt", "prompt", output=out)
    with pytest.raises(FitError, match="decides what keys and values"):
        surgery.prompt_convert(PROMPT, "prefix", output=out)
    gpt2 = GOLDEN / "adapterhub" / "gpt2-prefix"
    with pytest.raises(FitError, match="rotary positions"):
        surgery.prompt_convert(gpt2, "prefix", base=GOLDEN / "adapterhub" / "base" / "gpt2", output=out)
    with pytest.raises(FitError, match="was made for 2 layers with keys of 8 values"):
        surgery.prompt_convert(HUB / "prefix", "prefix", base=BASE, output=out)
    with pytest.raises(FitError, match="no kind of soft prompt 'lora'"):
        surgery.prompt_convert(PROMPT, "lora", output=out)
    assert surgery.prompt_convert(PROMPT, "cpt", dry_run=True).output is None
    assert not out.exists()


@pytest.mark.parametrize("kind", ["rows", "prefix"])
def test_prompts_are_put_one_behind_the_other_and_added_up(kind: str, tmp_path: Path) -> None:
    recipes.build("llama", tmp_path / "base")
    config = recipes.load("llama", tmp_path / "base").config
    layout = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    width = 2 * layout[0] * layout[1] * layout[2] if kind == "prefix" else config.hidden_size
    tables = [np.random.default_rng(seed).standard_normal((3, width)).astype(np.float32) for seed in (1, 2)]
    a, b = (
        write_prompt(tmp_path / name, table, prefix=layout if kind == "prefix" else None)
        for name, table in zip("ab", tables, strict=True)
    )
    wanted = {
        "concatenate": ([a, b], np.concatenate(tables)),
        "average": ({a: 3.0, b: 1.0}, 0.75 * tables[0] + 0.25 * tables[1]),
        "mix": ({a: 0.5, b: -1.0}, 0.5 * tables[0] - tables[1]),
    }
    for method, (given, table) in wanted.items():
        result = surgery.prompt_combine(given, method=method, output=tmp_path / method)
        written = load_numpy(tmp_path / method / "adapter_model.safetensors")["prompt_embeddings"]
        np.testing.assert_allclose(written, table, rtol=1e-6, atol=1e-6)
        assert result.tokens == len(table)
        direct = write_prompt(
            tmp_path / f"{method}-direct", table.astype(np.float32), prefix=layout if kind == "prefix" else None
        )
        ours, theirs = (logits(recipes.load("llama", tmp_path / "base"), path) for path in (tmp_path / method, direct))
        assert (ours - theirs).abs().max() < 1e-5


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    three = write_prompt(tmp_path / "three", np.ones((3, 128), np.float32))
    wide = write_prompt(tmp_path / "wide", np.ones((3, 64), np.float32))
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 12 * 64), np.float32), prefix=(6, 2, 32))
    out = tmp_path / "out"
    for other in (wide, prefix):
        with pytest.raises(FitError, match="not of the kind and size"):
            surgery.prompt_combine([three, other], output=out)
    with pytest.raises(FitError, match="has 16 virtual tokens, 'three' 3"):
        surgery.prompt_combine([three, PROMPT], method="average", output=out)
    with pytest.raises(FitError, match="have no weights"):
        surgery.prompt_combine({three: 0.5, PROMPT: 0.5}, output=out)
    same = write_prompt(tmp_path / "same", np.ones((3, 128), np.float32))
    for weights in ((1.0, -1.0), (0.1 + 0.2, -0.3), (1e308, 1e308)):
        with pytest.raises(FitError, match="add up to nothing"):
            surgery.prompt_combine(dict(zip((three, same), weights, strict=True)), method="average", output=out)
    with pytest.raises(FitError, match="two prompts or more"):
        surgery.prompt_combine([three], output=out)
    with pytest.raises(FitError, match="counts positions otherwise"):
        surgery.prompt_combine([HUB / "prefix", HUB / "prefix-mlp"], output=out)
    assert any("different bases" in text for text in surgery.prompt_combine([three, PROMPT], dry_run=True).warnings)


def test_a_projection_whose_sizes_do_not_fit_is_refused(tmp_path: Path) -> None:
    for name, change in (("wte.weight", (3, 15)), ("control_trans.0.bias", (4,)), ("control_trans.2.weight", (32,))):
        folder = tmp_path / name
        shutil.copytree(HUB / "prefix-mlp", folder)
        tensors = torch.load(folder / "pytorch_adapter.bin")
        (folder / "pytorch_adapter.bin").unlink()
        main = {key: value.clone() for key, value in tensors.items() if ".layers." not in key}
        kept = {
            f"model.layers.0.self_attn.prefix_tuning.pool.{key.partition('prefix_tuning.')[2]}": value
            for key, value in main.items()
        }
        key = next(key for key in main if key.endswith(name))
        main[key] = torch.zeros(change)
        save_file({key: value.clone() for key, value in (main | kept).items()}, folder / "adapter.safetensors")
        with pytest.raises(FitError, match="do not fit"):
            surgery.prompt_show(folder)
    for length in (None, "three", -1, 7):
        folder = tmp_path / str(length)
        shutil.copytree(HUB / "prefix", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["config"]["prefix_length"] = length
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(FitError, match="numbers for"):
            surgery.prompt_show(folder)


def test_adapterhubs_own_are_shown_and_not_taken_for_pefts(tmp_path: Path) -> None:
    part = surgery.prompt_show(HUB / "prefix", base=HUB / "base").parts[0]
    assert (part.tokens, part.prefix.layers, part.prefix.kv_heads, part.prefix.head_dim) == (3, 2, 2, 4)
    assert surgery.prompt_show(HUB / "prefix").parts[0].norms == part.norms
    assert surgery.prompt_show(GOLDEN / "adapterhub" / "bert-prompt").parts[0].tokens == 4
    with pytest.raises(FitError, match="counts positions otherwise"):
        surgery.prompt_nearest(HUB / "prefix", HUB / "base", by="effect", texts=[[1, 2, 3]])
    with pytest.raises(FitError, match="counts positions otherwise"):
        surgery.prompt_bake(HUB / "prefix", HUB / "base", form="kv", output=tmp_path / "out")
    with pytest.raises(FitError, match="no tokens"):
        surgery.prompt_nearest(HUB / "prefix", HUB / "base")
    with pytest.raises(FitError, match="behind the embeddings"):
        surgery.prompt_nearest(GOLDEN / "adapterhub" / "bert-prompt", GOLDEN / "adapterhub" / "base" / "bert")
    with pytest.raises(FitError, match="was made for 2 layers"):
        surgery.prompt_show(HUB / "prefix", base=BASE)
    with pytest.raises(FitError, match="the model's states have 128"):
        surgery.prompt_show(GOLDEN / "adapterhub" / "bert-prompt", base=BASE)


def test_a_prompt_is_said_to_fit_where_its_sizes_were_compared(tmp_path: Path) -> None:
    recipes.build("llama", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 6 * 16), np.float32), prefix=(3, 2, 8))
    known = surgery.prompt_show(prefix, base=tmp_path / "base")
    assert known.parts[0].fits
    assert not known.warnings
    assert not surgery.prompt_show(prefix).parts[0].fits
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "never-heard-of"}))
    unknown = surgery.prompt_show(prefix, base=tmp_path / "base")
    assert not unknown.parts[0].fits
    assert "is not known" in unknown.warnings[0]
    assert "\nfits" not in str(unknown)
