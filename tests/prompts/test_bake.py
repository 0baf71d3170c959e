# SPDX-License-Identifier: Apache-2.0
"""A baked prompt gives PEFT's logits in transformers that know nothing of it: as tokens, and as keys and values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery.prompts.vocabulary import recipe_of
from surgery_formats.errors import FitError, ProofError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import peft_oracle, recipes
from tests.support.baked_prompts import KINDS, TOKENS, attached
from tests.support.kit import ROOT
from tests.support.prompts import write_prompt
from tests.support.quantised_folders import FORMATS, quantise_folder

PROMPT, BASE = ROOT / "examples" / "prompt", ROOT / "examples" / "base"
IDS = torch.tensor([[5, 17, 40, 8, 33, 61, 9]])
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "p-tuning-lstm", "cpt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_give_pefts_logits(name: str, kind: str, tmp_path: Path) -> None:
    model = attached(name, kind, tmp_path)
    result = surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out")
    assert result.ids == tuple(range(recipes.VOCAB, recipes.VOCAB + result.tokens))
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        logits = baked(torch.cat([torch.tensor([result.ids]), IDS], 1)).logits
    last = IDS.shape[1] if kind == "cpt" else result.tokens + IDS.shape[1]
    assert (logits[:, -last:, : recipes.VOCAB] - expected[:, -last:]).abs().max() < 1e-5
    assert result.rounding < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_virtual_tokens_are_never_said(name: str, tmp_path: Path) -> None:
    """Their logit is the mean of all others: below the greatest at every position; transformers removes them altogether."""
    model = attached(name, "prompt", tmp_path)
    result = surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(3, recipes.VOCAB, (4, 12), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.tensor([result.ids]).expand(4, -1), ids], 1)
    with torch.no_grad():
        logits = baked(ids).logits
    old, new = logits[..., : recipes.VOCAB], logits[..., recipes.VOCAB :]
    if getattr(baked.config, "final_logit_softcapping", None) is None:
        torch.testing.assert_close(new, old.mean(-1, keepdim=True).expand_as(new), rtol=0, atol=1e-4)
    assert (new.amax(-1) < old.amax(-1)).all()
    assert torch.softmax(logits, -1)[..., recipes.VOCAB :].max() <= 1.001 / recipes.VOCAB
    assert not baked.config.tie_word_embeddings
    with torch.no_grad(), peft_oracle.quiet():
        wanted = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
        got = baked.generate(torch.cat([torch.tensor([result.ids]), IDS], 1), max_new_tokens=8, do_sample=False)
        assert torch.equal(got[:, result.tokens + IDS.shape[1] :], wanted[:, IDS.shape[1] :])
        torch.manual_seed(0)
        drawn = baked.generate(ids, max_new_tokens=24, do_sample=True, temperature=5.0, top_k=0)
    assert int(drawn[:, ids.shape[1] :].max()) < recipes.VOCAB


@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2"])
def test_a_tie_can_be_kept(name: str, tmp_path: Path) -> None:
    fields = {"tie_word_embeddings": True} if name == "qwen2_tied" else {}
    model = attached(name.partition("_")[0], "prompt", tmp_path, **fields)
    result = surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out", keep_tie=True)
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert baked.get_output_embeddings().weight is baked.get_input_embeddings().weight
    assert "only generation_config.json" in result.head
    with torch.no_grad():
        logits = baked(torch.cat([torch.tensor([result.ids]), IDS], 1)).logits[..., : recipes.VOCAB]
        assert (logits - model(input_ids=IDS).logits).abs().max() < 1e-5
    assert (
        not (tmp_path / "out" / "model.safetensors").stat().st_size
        > 1.2 * (tmp_path / "base" / "model.safetensors").stat().st_size
    )


def test_a_bf16_base_rounds_as_peft_does(tmp_path: Path) -> None:
    attached("llama", "prompt", tmp_path, dtype=torch.bfloat16)
    result = surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out")
    with peft_oracle.quiet():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(plain, tmp_path / "prompt").eval()
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = baked(torch.cat([torch.tensor([result.ids]), IDS], 1)).logits[..., : recipes.VOCAB]
        assert torch.equal(logits, model(input_ids=IDS).logits)
    assert 0 < result.rounding < 2**-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_keys_and_values_give_pefts_logits(name: str, kind: str, tmp_path: Path) -> None:
    model = attached(name, kind, tmp_path)
    surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out", form="kv")
    plain = recipes.load(name, tmp_path / "base")
    past = load_file(tmp_path / "out" / "past.safetensors")
    cache = transformers.DynamicCache([(past[f"key.{i}"], past[f"value.{i}"]) for i in range(len(past) // 2)])
    with torch.no_grad():
        logits = plain(input_ids=IDS, past_key_values=cache).logits
        expected = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    assert (logits - expected).abs().max() < 1e-5


def test_a_text_is_baked_as_keys_and_values(tmp_path: Path) -> None:
    result = surgery.prompt_bake(
        None, BASE, text="The following methods", output=tmp_path / "out", form="kv", dtype="fp32"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    first, rest = tokenizer("The following methods", return_tensors="pt").input_ids, torch.tensor([[40, 50, 60]])
    past = load_file(tmp_path / "out" / "past.safetensors")
    cache = transformers.DynamicCache([(past[f"key.{i}"], past[f"value.{i}"]) for i in range(len(past) // 2)])
    with torch.no_grad():
        whole = model(torch.cat([first, rest], 1)).logits[:, -3:]
        assert (model(input_ids=rest, past_key_values=cache).logits - whole).abs().max() < 2e-5
    assert result.tokens == first.shape[1]
    assert "without special tokens" in result.warnings[0]


def test_the_lines_that_are_shown_load_it(tmp_path: Path) -> None:
    """Word by word, with the imports that the page has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    inputs = tokenizer("The following methods", return_tensors="pt")
    names = ("DynamicCache", "AutoTokenizer", "AutoModelForCausalLM")
    given = {name: getattr(transformers, name) for name in names}
    given |= {"load_file": load_file, "model": model, "inputs": inputs}
    for form in ("kv", "tokens"):
        result = surgery.prompt_bake(PROMPT, BASE, output=tmp_path / form, form=form)
        assert len(result.loading.splitlines()) <= 3
        exec(result.loading, dict(given))


def test_an_opened_model_is_as_it_was(tmp_path: Path) -> None:
    """Also the configuration of the text model inside, which the output has changed."""
    attached("llama", "prompt", tmp_path, tie_word_embeddings=True)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    nested = {key: value for key, value in config.items() if key != "tie_word_embeddings"} | {"text_config": config}
    (tmp_path / "base" / "config.json").write_text(json.dumps(nested))
    base = open_checkpoint(tmp_path / "base")
    surgery.prompt_bake(tmp_path / "prompt", base, output=tmp_path / "out")
    assert base.main.config == nested
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["vocab_size"] == written["vocab_size"] == recipes.VOCAB + TOKENS
    assert written["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_quantised_model_keeps_its_codes(format_name: str, tmp_path: Path) -> None:
    """All other bytes are copied: nothing becomes numbers behind a configuration that says codes."""
    base = quantise_folder(BASE, tmp_path / "base", format_name)
    surgery.prompt_bake(PROMPT, base, output=tmp_path / "out")
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "out"))
    assert before.keys() <= after.keys()
    changed = {
        name
        for name in after
        if name not in before
        or before[name].shape != after[name].shape
        or not torch.equal(before[name].reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
    }
    assert changed == {"lm_head.weight", "model.embed_tokens.weight"}
    old, new = (json.loads((tmp_path / where / "config.json").read_text()) for where in ("base", "out"))
    for key in ("quantization_config", "quantization"):
        assert old.get(key) == new.get(key)


def test_a_vocabulary_of_codes_is_refused(tmp_path: Path) -> None:
    for format_name in ("nf4", "int8", "mlx", "fp8", "packed"):
        base = quantise_folder(BASE, tmp_path / format_name, format_name, ("_proj", "embed_tokens"))
        with pytest.raises(FitError, match="stored as codes"):
            surgery.prompt_bake(PROMPT, base, output=tmp_path / "out")


def test_of_a_gguf_keys_and_values_are_taken_and_not_computed(tmp_path: Path) -> None:
    base = ROOT / "tests" / "golden" / "gguf" / "llama" / "base.gguf"
    attention = recipe_of(open_checkpoint(base).main).layers[0].attention
    layers = len(recipe_of(open_checkpoint(base).main).layers)
    heads, dim = attention.kv_heads, attention.head_dim
    table = np.random.default_rng(0).standard_normal((3, 2 * layers * heads * dim)).astype(np.float32)
    prefix = write_prompt(tmp_path / "prefix", table, prefix=(layers, heads, dim))
    surgery.prompt_bake(prefix, base, output=tmp_path / "out", form="kv", dtype="fp32")
    past = load_file(tmp_path / "out" / "past.safetensors")
    wanted = table.reshape(3, layers, 2, heads, dim).transpose(1, 2, 3, 0, 4)
    assert all(np.array_equal(past[f"value.{n}"][0].numpy(), wanted[n, 1]) for n in range(layers))
    rows = write_prompt(tmp_path / "rows", np.ones((3, 32), np.float32))
    with pytest.raises(FitError, match="only to safetensors files"):
        surgery.prompt_bake(rows, base, output=tmp_path / "other", form="kv")
    with pytest.raises(FitError, match="configuration lies in the weight file"):
        surgery.prompt_bake(rows, base, output=tmp_path / "other")


def test_the_onnx_adapter_is_a_past_of_an_exported_graph(tmp_path: Path) -> None:
    surgery.prompt_bake(PROMPT, BASE, output=tmp_path / "kv", form="kv", dtype="fp32")
    surgery.export_onnx(BASE, prefix=PROMPT, output=tmp_path / "own", dtype="fp32")
    wanted = surgery.run(tmp_path / "own", [0, 40, 50], device="cpu", max_new=8).texts[0]
    got = surgery.run(
        tmp_path / "own", [0, 40, 50], device="cpu", max_new=8, prompt_adapter=tmp_path / "kv" / "past.onnx_adapter"
    ).texts[0]
    assert got.tokens == wanted.tokens


def test_what_cannot_be_baked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 12 * 64), np.float32), prefix=(6, 2, 32))
    out = tmp_path / "out"
    with pytest.raises(FitError, match="no token of a vocabulary has"):
        surgery.prompt_bake(prefix, BASE, output=out)
    with pytest.raises(UsageError, match="made of tokens that the vocabulary has"):
        surgery.prompt_bake(None, BASE, text="a", output=out)
    with pytest.raises(UsageError, match="a prompt or a text is baked"):
        surgery.prompt_bake(None, BASE, output=out)
    with pytest.raises(FitError, match="no name for tokens"):
        surgery.prompt_bake(PROMPT, BASE, output=out, name="a b")
    for options in ({"keep_tie": True}, {"name": "q"}):
        with pytest.raises(UsageError, match="neither a head nor names"):
            surgery.prompt_bake(PROMPT, BASE, output=out, form="kv", **options)
    with pytest.raises(FitError, match="LORA has no virtual tokens"):
        surgery.prompt_bake(ROOT / "examples" / "lora", BASE, output=out)
    recipes.build("bert_sentence", tmp_path / "bert")
    with pytest.raises(FitError, match="baked for decoders"):
        surgery.prompt_bake(write_prompt(tmp_path / "p", np.ones((2, 32), np.float32)), tmp_path / "bert", output=out)
    surgery.prompt_bake(PROMPT, BASE, output=out)
    with pytest.raises(FitError, match="has a token '<p_0>'"):
        surgery.prompt_bake(PROMPT, out, output=tmp_path / "twice")
    assert surgery.prompt_bake(PROMPT, out, output=tmp_path / "twice", name="q").ids[0] == 1552
    assert surgery.prompt_bake(PROMPT, BASE, dry_run=True).output is None

    from surgery.prompts import bake_tokens

    monkeypatch.setattr(bake_tokens, "read_rows", lambda *_: np.zeros((16, 128), np.float32))
    with pytest.raises(ProofError, match="not those of the prompt"):
        surgery.prompt_bake(PROMPT, BASE, output=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_the_model_stands_behind_the_prompt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an adapter, and stands where the model does"):
        surgery.prompt_bake(BASE, PROMPT, output=tmp_path / "out")
    with pytest.raises(UsageError, match="no model was named"):
        surgery.prompt_bake(PROMPT, output=tmp_path / "out")
