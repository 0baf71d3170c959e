# SPDX-License-Identifier: Apache-2.0
"""A soft prompt read from its file is what PEFT puts in front of the model: every kind, several architectures, and heads beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from surgery import convert
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.errors import FitError
from surgery_formats.updates import Replacement
from tests.oracles import disk, models, peft_oracle

TOKENS = 5
EMBEDDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
}
KEYS_AND_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "cartridge": ("CartridgeConfig", {}),
}
CPT = {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}


def trained(arch: str, kind: str, folder: Path, task: str = "CAUSAL_LM", **fields: Any) -> Any:
    """A random soft prompt, saved; returns the model PEFT loads from the file."""
    base = models.build_base(arch, folder / "base")
    sized = {} if kind == "CPTConfig" else {"num_virtual_tokens": TOKENS}
    with peft_oracle.quiet():
        config = getattr(peft, kind)(task_type=task, **sized, **fields)
        wrapped = peft.get_peft_model(models.load(arch, base, "float32"), config)
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(4))
        wrapped.eval().save_pretrained(folder / "adapter")
        return peft.PeftModel.from_pretrained(models.load(arch, base, "float32"), folder / "adapter").eval()


def prompt_of(folder: Path) -> SoftPrompt:
    adapter = read_adapter(folder / "adapter")
    assert adapter.prompt is not None
    assert adapter.unconsumed() == ()
    return adapter.prompt


def assert_same_logits(actual: Tensor, expected: Tensor, last: int) -> None:
    torch.testing.assert_close(actual[:, -last:], expected[:, -last:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_those_peft_puts_before_the_input(arch: str, name: str, tmp_path: Path) -> None:
    kind, fields = EMBEDDINGS[name]
    model = trained(arch, kind, tmp_path, **fields)
    prompt = prompt_of(tmp_path)
    assert (prompt.virtual_tokens, prompt.dim, prompt.submodules) == (TOKENS, models.HIDDEN, 1)
    rows = torch.from_numpy(prompt.embeddings())
    assert torch.equal(rows, model.get_prompt(1)[0])
    assert rows.std() > 0.01  # not the zeros of an untrained one

    ids = models.inputs_of(arch)["input_ids"]
    plain = models.load(arch, tmp_path / "base", "float32")
    embedded = torch.cat([rows.expand(len(ids), -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        assert_same_logits(plain(inputs_embeds=embedded).logits, model(input_ids=ids).logits, ids.shape[1])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", KEYS_AND_VALUES)
def test_keys_and_values_are_those_in_pefts_cache(arch: str, name: str, tmp_path: Path) -> None:
    kind, fields = KEYS_AND_VALUES[name]
    model = trained(arch, kind, tmp_path, **fields)
    prompt = prompt_of(tmp_path)
    heads = 4 if arch == "gpt2" else 2  # grouped-query attention: heads of keys, not of queries
    assert prompt.prefix is not None
    assert (prompt.prefix.layers, prompt.prefix.kv_heads, prompt.prefix.head_dim) == (2, heads, 8)
    cache = model.get_prompt(1)
    mine = transformers.DynamicCache()
    for layer, entry in enumerate(cache.layers):
        key, value = map(torch.from_numpy, prompt.key_values(layer))
        assert key.shape == (heads, TOKENS, 8)
        assert torch.equal(key, entry.keys[0])
        assert torch.equal(value, entry.values[0])
        mine.update(key[None], value[None], layer)

    ids = models.inputs_of(arch)["input_ids"][:1]
    plain = models.load(arch, tmp_path / "base", "float32")
    mask = torch.ones(1, TOKENS + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        logits = plain(input_ids=ids, past_key_values=mine, attention_mask=mask).logits
        assert_same_logits(logits, model(input_ids=ids).logits, ids.shape[1])


@pytest.mark.parametrize("name", [*EMBEDDINGS, *KEYS_AND_VALUES, "cpt"])
def test_a_converted_prompt_is_proved_and_is_pefts(name: str, tmp_path: Path) -> None:
    kind, fields = {**EMBEDDINGS, **KEYS_AND_VALUES, "cpt": ("CPTConfig", CPT)}[name]
    model = trained("llama", kind, tmp_path, **fields)
    result = convert(tmp_path / "adapter", to="peft", output=tmp_path / "again")
    assert result.errors == {prompt_of(tmp_path).table.name: 0.0}
    with peft_oracle.quiet():
        plain = models.load("llama", tmp_path / "base", "float32")
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    ids = models.inputs_of("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_cpt_holds_the_whole_rows(tmp_path: Path) -> None:
    model = trained("llama", "CPTConfig", tmp_path, **CPT)
    prompt = prompt_of(tmp_path)
    assert prompt.virtual_tokens == 3
    assert torch.equal(torch.from_numpy(prompt.embeddings()), model.get_prompt(1)[0])


def test_an_encoder_and_its_decoder_have_half_of_the_rows_each(tmp_path: Path) -> None:
    model = trained("t5", "PromptTuningConfig", tmp_path, "SEQ_2_SEQ_LM")
    prompt = prompt_of(tmp_path)
    assert (prompt.submodules, prompt.virtual_tokens) == (2, TOKENS)
    assert torch.equal(
        torch.cat([torch.from_numpy(prompt.embeddings(part)) for part in (0, 1)]), model.get_prompt(1)[0]
    )


def test_a_prefix_of_a_decoder_takes_the_entries_peft_takes(tmp_path: Path) -> None:
    model = trained("t5", "PrefixTuningConfig", tmp_path, "SEQ_2_SEQ_LM")
    prompt = prompt_of(tmp_path)
    for layer, entry in enumerate(model.get_prompt(1).self_attention_cache.layers):
        key, value = map(torch.from_numpy, prompt.key_values(layer))
        assert torch.equal(key, entry.keys[0])
        assert torch.equal(value, entry.values[0])


@pytest.mark.parametrize(
    ("arch", "heads"), [("llama_cls", {"score.weight"}), ("bert", {"classifier.weight", "classifier.bias"})]
)
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_the_head_of_a_classifier_is_a_replacement(arch: str, heads: set[str], kind: str, tmp_path: Path) -> None:
    trained(arch, kind, tmp_path, "SEQ_CLS")
    adapter = read_adapter(tmp_path / "adapter")
    assert {site.path for site in adapter.updates} == heads
    assert all(isinstance(update, Replacement) for chain in adapter.updates.values() for update in chain)
    assert adapter.unconsumed() == ()


def test_each_kind_has_one_of_the_two(tmp_path: Path) -> None:
    trained("llama", "PromptTuningConfig", tmp_path / "one")
    trained("llama", "PrefixTuningConfig", tmp_path / "other")
    with pytest.raises(FitError, match="no keys and values"):
        prompt_of(tmp_path / "one").key_values(0)
    with pytest.raises(FitError, match="no embeddings"):
        prompt_of(tmp_path / "other").embeddings()


def test_values_that_are_no_numbers_are_refused_when_read(tmp_path: Path) -> None:
    trained("llama", "PromptTuningConfig", tmp_path)
    config, tensors = disk.adapter(tmp_path / "adapter")
    tensors["prompt_embeddings"][2, 3] = float("nan")
    disk.write_adapter(tmp_path / "adapter", config, tensors)
    with pytest.raises(FitError, match="NaN"):
        prompt_of(tmp_path).embeddings()
