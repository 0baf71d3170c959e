# SPDX-License-Identifier: Apache-2.0
"""A vocabulary that is padded or cut: rows that stay answer as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import surgery
from tests.support.kit import ROOT
from tests.support.layered_models import SMALL, load, logits, make, tokenizer


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "bert", "gemma2", "qwen2"])
def test_a_vocabulary_is_padded_with_the_mean(family: str, tmp_path: Path):
    base = make(family, tmp_path / "base")
    surgery.layers(base, output=tmp_path / "out", vocab="pad=64")
    model, before = load(tmp_path / "out"), load(base)
    assert model.config.vocab_size == 128
    old, new = logits(before), logits(model)
    assert torch.equal(new[..., :101], old)
    if family != "gemma2":  # whose logits are capped behind the mean
        assert torch.allclose(new[..., 101:], old.mean(-1, keepdim=True).expand(-1, -1, 27), atol=1e-5)
    assert torch.equal(new.argmax(-1), old.argmax(-1))
    assert torch.equal(model.get_input_embeddings().weight[:101], before.get_input_embeddings().weight)
    with pytest.raises(surgery.NothingChangedError, match="has these 128 rows already"):
        surgery.layers(tmp_path / "out", output=tmp_path / "more", vocab="pad=64")


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_a_vocabulary_is_cut_to_the_tokens_that_are_used(kind: str, tmp_path: Path):
    text = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))[:8]]
    fields = {**SMALL, "vocab_size": 640, "eos_token_id": 2, "pad_token_id": None}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    base = tmp_path / "base"
    model.save_pretrained(base)
    before = tokenizer(kind, base, text)
    lines = [line for page in text[:2] for line in page.splitlines()[:40] if line.strip()]
    used = sorted({number for line in lines for number in before(line).input_ids})
    (tmp_path / "used.json").write_text(json.dumps(used))
    result = surgery.layers(base, output=tmp_path / "out", vocab=f"trim={tmp_path / 'used.json'}")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    made = load(tmp_path / "out")
    rows = result.facts["vocabulary"]["after"]
    assert rows == len(after) == made.config.vocab_size < len(before)
    for line in lines:
        old, new = before(line).input_ids, after(line).input_ids
        assert before.convert_ids_to_tokens(old) == after.convert_ids_to_tokens(new)
        kept = torch.tensor(before.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(rows)))))
    with torch.no_grad():
        one = model(torch.tensor([before(lines[3]).input_ids])).logits
        two = made(torch.tensor([after(lines[3]).input_ids])).logits
    assert torch.equal(one[..., kept], two)
    assert made.generation_config.eos_token_id == after.eos_token_id == made.config.eos_token_id
    assert kind == "Unigram" or after.decode(after("ÿ new wörds").input_ids) is not None


def test_a_vocabulary_is_cut_to_the_tokenizers_size(tmp_path: Path):
    base = tmp_path / "base"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 704, "pad_token_id": None})
    )
    model.save_pretrained(base)
    size = len(tokenizer("BPE", base, [(ROOT / "README.md").read_text()]))
    surgery.layers(base, output=tmp_path / "out", vocab="trim")
    made = load(tmp_path / "out")
    assert made.config.vocab_size == size < 704
    assert torch.equal(logits(made), logits(model)[..., :size])
    with pytest.raises(surgery.NothingChangedError):
        surgery.layers(tmp_path / "out", output=tmp_path / "again", vocab="trim")


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_token_that_a_configuration_names_keeps_its_row(where: str, tmp_path: Path):
    """A model whose padding lies behind its rows does not load."""
    base = make("llama", tmp_path / "base")
    size = len(tokenizer("BPE", base, [(ROOT / "README.md").read_text()]))
    surgery.layers(base, output=tmp_path / "wide", vocab=f"pad={size + 50}")
    told = json.loads((tmp_path / "wide" / where).read_text()) | {"pad_token_id": size}
    (tmp_path / "wide" / where).write_text(json.dumps(told))
    with pytest.raises(surgery.FitError, match=f"{where} names the token {size}, and the tokenizer has {size}"):
        surgery.layers(tmp_path / "wide", output=tmp_path / "out", vocab="trim")
