# SPDX-License-Identifier: Apache-2.0
"""What a virtual token does is what transformers says it does: with it, without it, and with a real token in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import surgery
from surgery.progress import Progress
from surgery.prompts.texts import spread, token_rows
from surgery_formats.errors import FitError, UsageError
from tests.oracles import recipes
from tests.support.kit import ROOT
from tests.support.prompts import write_prompt

PROMPT, BASE = ROOT / "examples" / "prompt", ROOT / "examples" / "base"
TEXTS = [[5, 17, 40, 8, 33], [61, 2, 2, 9]]
TOKENS = 3


def log_probabilities(model: Any, ids: list[int], front: int, hidden: int | None = None, **inputs: Any) -> Any:
    """Of the text, behind `front` virtual positions, one of which nobody sees."""
    mask = torch.ones(1, front + len(ids), dtype=torch.long)
    if hidden is not None:
        mask[0, hidden] = 0
    length = front if "past_key_values" in inputs else 0
    positions = torch.arange(length, front + len(ids))[None]
    with torch.no_grad():
        output = model(attention_mask=mask, position_ids=positions, output_attentions=True, **inputs)
    return torch.log_softmax(output.logits[0, -len(ids) :].double(), -1), output.attentions


def embedded(model: Any, rows: Any, ids: list[int]) -> dict[str, Any]:
    table = model.get_input_embeddings()
    return {"inputs_embeds": torch.cat([torch.as_tensor(rows), table(torch.tensor(ids))])[None]}


def figures(whole: Any, other: Any, ids: list[int]) -> tuple[float, float, int]:
    divergence = float((whole.exp() * (whole - other)).sum())
    loss = -float(sum(other[at, ids[at + 1]] for at in range(len(ids) - 1)))
    return divergence, loss, len(ids)


def mean(found: list[tuple[float, float, int]]) -> tuple[float, float]:
    positions = sum(count for _, _, count in found)
    return sum(one[0] for one in found) / positions, sum(one[1] for one in found) / (positions - len(found))


def assert_measures(measured: Any, found: list[tuple[float, float, int]]) -> None:
    divergence, loss = mean(found)
    assert measured.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    assert measured.loss == pytest.approx(loss, rel=1e-5)


def eager(name: str, folder: Path) -> Any:
    model = recipes.load(name, folder)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_embeddings_do_what_transformers_says(name: str, tmp_path: Path) -> None:
    recipes.build(name, tmp_path)
    model = eager(name, tmp_path)
    width = model.get_input_embeddings().embedding_dim
    rows = np.random.default_rng(1).standard_normal((TOKENS, width)).astype(np.float32)
    prompt = write_prompt(tmp_path / "prompt", rows)
    report = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=TEXTS)
    near = surgery.prompt_nearest(prompt, tmp_path)
    assert (report.texts, report.positions) == (2, 9)
    with torch.no_grad():
        table = model.get_input_embeddings()(torch.arange(recipes.VOCAB))
    nearest = [token.nearest["cosine"][0].id for token in near.tokens]
    assert [token.nearest for token in report.tokens] == nearest

    whole = {tuple(ids): log_probabilities(model, ids, TOKENS, **embedded(model, rows, ids)) for ids in TEXTS}
    bare = [log_probabilities(model, ids, 0, input_ids=torch.tensor([ids]))[0] for ids in TEXTS]
    assert_measures(report.whole, [figures(whole[tuple(ids)][0], whole[tuple(ids)][0], ids) for ids in TEXTS])
    assert_measures(
        report.without, [figures(whole[tuple(ids)][0], one, ids) for ids, one in zip(TEXTS, bare, strict=True)]
    )
    for number, token in enumerate(report.tokens):
        hidden, swapped, change, paid = [], [], 0.0, 0.0
        for ids in TEXTS:
            expected, attentions = whole[tuple(ids)]
            one = log_probabilities(model, ids, TOKENS, number, **embedded(model, rows, ids))[0]
            hidden.append(figures(expected, one, ids))
            change = change + (expected.exp() - one.exp()).sum(0) / report.positions
            paid += sum(float(layer[0, :, -len(ids) :, number].mean(0).sum()) for layer in attentions)
            other = torch.as_tensor(rows).clone()
            other[number] = table[nearest[number]]
            one = log_probabilities(model, ids, TOKENS, **embedded(model, other, ids))[0]
            swapped.append(figures(expected, one, ids))
        assert_measures(token.without, hidden)
        assert_measures(token.as_nearest, swapped)
        assert token.attention == pytest.approx(paid / report.positions / model.config.num_hidden_layers, rel=1e-4)
        raised, by = token.raises[0]
        assert (raised, by) == (int(change.argmax()), pytest.approx(float(change.max()), rel=1e-3))
        assert token.lowers[0][1] == pytest.approx(float(change.min()), rel=1e-3)
    swapped = [
        figures(
            whole[tuple(ids)][0], log_probabilities(model, ids, TOKENS, **embedded(model, table[nearest], ids))[0], ids
        )
        for ids in TEXTS
    ]
    assert_measures(report.all_nearest, swapped)
    assert report.kept(report.whole) == (1.0 if report.gain > 0 else None)


def test_a_prefix_does_what_transformers_says(tmp_path: Path) -> None:
    recipes.build("llama", tmp_path)
    model = eager("llama", tmp_path)
    config = model.config
    heads, dim, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    flat = np.random.default_rng(2).standard_normal((TOKENS, 2 * layers * heads * dim)).astype(np.float32)
    prompt = write_prompt(tmp_path / "prefix", flat, prefix=(layers, heads, dim))
    report = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=TEXTS)
    pairs = torch.from_numpy(flat).reshape(TOKENS, layers, 2, heads, dim).permute(1, 2, 3, 0, 4)

    def run(ids: list[int], hidden: int | None = None) -> Any:
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key[None].clone(), value[None].clone(), layer)
        return log_probabilities(model, ids, TOKENS, hidden, input_ids=torch.tensor([ids]), past_key_values=cache)[0]

    whole = [run(ids) for ids in TEXTS]
    for number, token in enumerate(report.tokens):
        found = [figures(one, run(ids, number), ids) for one, ids in zip(whole, TEXTS, strict=True)]
        assert_measures(token.without, found)
        assert (token.nearest, token.as_nearest, report.all_nearest) == (None, None, None)
    assert "KL as nearest" not in str(report)


def test_the_rows_of_tokens_read_as_what_they_are(tmp_path: Path) -> None:
    """A prompt that is a text keeps all of its gain as its nearest tokens: the control of the control."""
    recipes.build("qwen2", tmp_path)
    rows = recipes.load("qwen2", tmp_path).get_input_embeddings().weight[[7, 9, 11]].detach().numpy()
    report = surgery.prompt_nearest(write_prompt(tmp_path / "p", rows), tmp_path, by="effect", texts=TEXTS)
    assert [token.nearest for token in report.tokens] == [7, 9, 11]
    assert report.all_nearest.divergence == pytest.approx(0, abs=1e-9)
    assert report.all_drawn.divergence > 1e-4
    assert all(token.as_nearest.divergence == pytest.approx(0, abs=1e-9) for token in report.tokens)


def test_many_virtual_tokens_are_measured_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.prompts import effects

    recipes.build("llama", tmp_path)
    width = recipes.load("llama", tmp_path).config.hidden_size
    rows = np.random.default_rng(1).standard_normal((5, width)).astype(np.float32)
    prompt = write_prompt(tmp_path / "prompt", rows)
    whole = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=TEXTS)
    monkeypatch.setattr(effects, "_LOGITS", 2 * 10 * recipes.VOCAB)
    parts = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=TEXTS)
    for one, other in zip(whole.tokens, parts.tokens, strict=True):
        assert one.without.divergence == pytest.approx(other.without.divergence, rel=1e-4)
        assert one.as_drawn.loss == pytest.approx(other.as_drawn.loss, rel=1e-5)


def test_of_many_texts_a_part_is_measured_and_said(tmp_path: Path) -> None:
    texts = [[number, 5, 17, 40] for number in range(20)]
    parts = spread(texts, 21)
    assert [part[0] for part in parts] == [2, 6, 10, 14, 18]
    assert spread(texts, 80) == spread(texts, 1000) == texts
    assert spread(texts, 2) == [texts[10]]
    assert [len(part) for part in spread([[1, 2]] * 9 + [[1] * 100], 30)] == [2, 2]
    recipes.build("llama", tmp_path)
    prompt = write_prompt(tmp_path / "prompt", np.ones((2, recipes.load("llama", tmp_path).config.hidden_size)))
    report = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=texts, max_tokens=21)
    same = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=parts)
    assert (report.texts, report.positions, report.given, same.given) == (5, 20, 80, 20)
    assert report.tokens == same.tokens
    assert "5 texts, 20 tokens of 80, spread evenly" in str(report)
    assert "spread" not in str(same)
    whole = surgery.prompt_nearest(prompt, tmp_path, by="effect", texts=texts, max_tokens=None)
    assert (whole.positions, whole.given) == (80, 80)


def test_texts_are_cut_and_begun_as_the_tokenizer_begins_them(tmp_path: Path) -> None:
    inner = transformers.PreTrainedTokenizerFast(tokenizer_file=str(BASE / "tokenizer.json"))
    ids = inner("The following methods can be defined to emulate numeric objects.", add_special_tokens=False).input_ids
    begins = inner("").input_ids
    rows = token_rows("The following methods can be defined to emulate numeric objects.", BASE, 8)
    assert all(row[: len(begins)] == begins for row in rows)
    assert [token for row in rows for token in row[len(begins) :]] == ids
    assert max(map(len, rows)) == 8
    assert token_rows([1, 2, 3], BASE, 8) == [[1, 2, 3]]
    assert token_rows([[1, 2, 3], [4, 5]], BASE, 2) == [[1, 2], [4, 5]]
    with pytest.raises(FitError, match="not two tokens in a row"):
        token_rows([[1]], BASE, 8)
    with pytest.raises(UsageError, match="texts is a text or token ids"):
        token_rows([1.5], BASE, 8)
    for beyond in (-1, 2**70):
        with pytest.raises(FitError, match="beyond every vocabulary"):
            token_rows([1, beyond], BASE, 8)
    with pytest.raises(FitError, match="surrogate"):
        token_rows("half \ud800", BASE, 8)


def test_pieces_have_room_for_the_text_behind_what_begins_it(tmp_path: Path) -> None:
    """A baked tokenizer begins every text with its virtual tokens: shorter pieces would have none of the text, or too much."""
    surgery.prompt_bake(PROMPT, BASE, output=tmp_path / "baked")
    text = "The following methods can be defined to emulate numeric objects."
    for length in (2, 10, 17):
        with pytest.raises(FitError, match="begins a text with 17 tokens"):
            token_rows(text, tmp_path / "baked", length)
    rows = token_rows(text, tmp_path / "baked", 18)
    assert {len(row) for row in rows} == {18}
    assert [row[-1] for row in rows] == [row[-1] for row in token_rows(text, BASE, 2)]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="measured on texts"):
        surgery.prompt_nearest(PROMPT, BASE, by="effect")
    with pytest.raises(UsageError, match="measured without texts"):
        surgery.prompt_nearest(PROMPT, BASE, texts="a text")
    with pytest.raises(UsageError, match="'distance' or 'effect', not 'feel'"):
        surgery.prompt_nearest(PROMPT, BASE, by="feel")
    recipes.build("bert_sequence", tmp_path)
    rows = np.ones((2, 32), np.float32)
    with pytest.raises(FitError, match="an encoder has none"):
        surgery.prompt_nearest(write_prompt(tmp_path / "p", rows), tmp_path, by="effect", texts=[[1, 2]])


def test_progress_counts_the_tokens_and_another_base_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    shutil.copytree(BASE, tmp_path / "other")
    done = surgery.prompt_nearest(PROMPT, tmp_path / "other", by="effect", texts=TEXTS, progress=told.append)
    assert [(step.done, step.total) for step in told] == [(5, 9), (9, 9)]
    assert done.warnings == surgery.prompt_nearest(PROMPT, tmp_path / "other").warnings
    assert "the base given is 'other'" in done.warnings[0]
    assert surgery.prompt_nearest(PROMPT, BASE).warnings == ()
