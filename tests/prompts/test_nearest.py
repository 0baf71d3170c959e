# SPDX-License-Identifier: Apache-2.0
"""The nearest tokens are those of brute force, and a match that means nothing reads as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from tests.oracles import recipes
from tests.support.adapter_files import GOLDEN
from tests.support.kit import ROOT
from tests.support.prompts import write_prompt

PROMPT, BASE = ROOT / "examples" / "prompt", ROOT / "examples" / "base"


def by_force(rows: Any, vector: Any) -> dict[str, list[int]]:
    """Token ids by each measure, the nearest first, from the whole table in float64."""
    rows, vector = rows.astype(np.float64), vector.astype(np.float64)
    dots = rows @ vector
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    distances = np.linalg.norm(rows - vector, axis=1)
    orders = {"cosine": -cosines, "distance": distances, "dot": -dots}
    return {measure: np.argsort(values, kind="stable").tolist() for measure, values in orders.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_nearest_are_those_of_brute_force_in_the_space_of_the_input(name: str, tmp_path: Path) -> None:
    recipes.build(name, tmp_path)
    table = recipes.load(name, tmp_path).get_input_embeddings()
    with torch.no_grad():
        rows = table(torch.arange(table.num_embeddings)).float().numpy()  # with Gemma's factor
    vectors = np.random.default_rng(3).standard_normal((4, rows.shape[1])).astype(np.float32) * rows.std()
    vectors[3] = rows[17] + 0.05 * rows[18]
    report = surgery.prompt_nearest(write_prompt(tmp_path / "prompt", vectors), tmp_path, top=7)
    for token, vector in zip(report.tokens, vectors, strict=True):
        wanted = by_force(rows, vector)
        assert {measure: [near.id for near in found] for measure, found in token.nearest.items()} == {
            measure: ids[:7] for measure, ids in wanted.items()
        }
        for near in token.nearest["distance"]:
            assert near.distance == pytest.approx(np.linalg.norm(rows[near.id] - vector), rel=1e-5)
            assert near.dot == pytest.approx(rows[near.id] @ vector, rel=1e-4, abs=1e-5)
    assert report.tokens[3].nearest["cosine"][0].id == 17


def test_the_spacing_is_that_of_brute_force() -> None:
    rows = torch.from_numpy(load_bfloat16(BASE / "model.safetensors", "model.embed_tokens.weight")).double()
    live = rows[rows.norm(dim=1) > 0]
    distances, cosines = (
        torch.cdist(live, live),
        torch.nn.functional.normalize(live) @ torch.nn.functional.normalize(live).T,
    )
    distances.fill_diagonal_(torch.inf), cosines.fill_diagonal_(-torch.inf)
    space = surgery.prompt_nearest(PROMPT, BASE).spacing
    assert (space.tokens, space.size) == (len(live), len(rows))
    assert space.farthest == pytest.approx(float(distances.amin(1).max()), rel=1e-4)
    assert space.distance["0.5"] == pytest.approx(float(distances.amin(1).median()), rel=1e-2)
    assert space.cosine["0.05"] == pytest.approx(float(cosines.amax(1).quantile(0.05)), rel=1e-3)
    some = surgery.prompt_nearest(PROMPT, BASE, sample=100).spacing
    assert some.sampled
    assert some.tokens <= 100
    assert some.farthest <= space.farthest


def test_a_match_reads_as_what_it_is_worth(tmp_path: Path) -> None:
    rows = load_bfloat16(BASE / "model.safetensors", "model.embed_tokens.weight")
    random = np.random.default_rng(5).standard_normal(rows.shape[1]).astype(np.float32)
    vectors = np.stack([rows[400], rows[400] + 0.1 * rows[401], 9 * rows[400], 0.01 * random, 9 * random])
    report = surgery.prompt_nearest(write_prompt(tmp_path / "prompt", vectors), BASE)
    assert [token.reading.verdict for token in report.tokens] == ["itself", "near", "by direction", "none", "none"]
    # Nearer to a short token than tokens are to one another, and meaningless for all that.
    small = report.tokens[3]
    assert small.nearest["distance"][0].distance < report.spacing.farthest
    assert "a random direction comes as close" in small.reading.why
    assert f"{report.tokens[2].reading.ratio:.2f}x the farthest nearest neighbour" in str(report)


def test_tokens_are_spelt_by_the_tokenizer_and_the_rest_has_numbers(tmp_path: Path) -> None:
    spelt = surgery.prompt_nearest(PROMPT, BASE)
    inner = transformers.PreTrainedTokenizerFast(tokenizer_file=str(BASE / "tokenizer.json"))
    assert spelt.texts
    assert all(inner.convert_ids_to_tokens(row) == text for row, text in spelt.texts.items())
    recipes.build("llama", tmp_path)
    width = recipes.load("llama", tmp_path).config.hidden_size
    bare = surgery.prompt_nearest(write_prompt(tmp_path / "prompt", np.ones((1, width), np.float32)), tmp_path)
    assert f"#{bare.tokens[0].nearest['cosine'][0].id}" in str(bare)


def test_keys_and_values_are_near_no_token(tmp_path: Path) -> None:
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 12 * 64), np.float32), prefix=(6, 2, 32))
    with pytest.raises(FitError, match="keys and values of every layer and no tokens"):
        surgery.prompt_nearest(prefix, BASE)
    report = surgery.prompt_show(prefix, base=BASE)
    assert report.parts[0].norms == pytest.approx([np.sqrt(6 * 64)] * 3)
    with pytest.raises(FitError, match="was made for 6 layers with 4 heads of 16"):
        surgery.prompt_show(
            write_prompt(tmp_path / "odd", np.ones((3, 12 * 64), np.float32), prefix=(6, 4, 16)), base=BASE
        )


def test_another_base_is_refused(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "prompt", np.ones((2, 64), np.float32))
    with pytest.raises(FitError, match="have 64 values, but the base's tokens have 128"):
        surgery.prompt_nearest(prompt, BASE)
    with pytest.raises(FitError, match="LORA has no virtual tokens"):
        surgery.prompt_show(ROOT / "examples" / "lora")


def test_what_is_shown_of_the_shipped_prompt() -> None:
    report = surgery.prompt_show(PROMPT, base=BASE)
    (part,) = report.parts
    rows = load_file(PROMPT / "adapter_model.safetensors")["prompt_embeddings"]
    assert (part.tokens, part.dim, part.dtype) == (16, 128, "F32")
    assert part.norms == pytest.approx(np.linalg.norm(rows, axis=1).tolist())
    assert report.told == {"written by": "PEFT 0.21.2", "began as": "random numbers (PEFT says so by default)"}
    assert part.alike is not None
    assert part.alike < 1


def test_a_textual_inversion_is_shown_and_lies_among_the_tokens_of_its_encoder(tmp_path: Path) -> None:
    inversion = GOLDEN / "textual_inversion" / "fluffy.safetensors"
    report = surgery.prompt_show(inversion)
    assert (report.kind, report.parts[0].component) == ("TEXTUAL_INVERSION", "text_encoder")
    encoder = tmp_path / "pipe" / "text_encoder"
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=report.parts[0].dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CLIPTextModel(config).save_pretrained(encoder)
    (tmp_path / "pipe" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}'
    )
    near = surgery.prompt_nearest(inversion, tmp_path / "pipe")
    assert len(near.tokens) == report.parts[0].tokens
    assert near.spacing.size == 40


def load_bfloat16(file: Path, name: str) -> Any:
    from safetensors.torch import load_file as load

    return load(file)[name].float().numpy()


def test_an_embedding_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.prompts import vocabulary

    seen: list[int] = []
    read = vocabulary.read_rows

    def watched(storage: Any, start: int, stop: int) -> Any:
        seen.append(stop - start)
        return read(storage, start, stop)

    whole = surgery.prompt_nearest(PROMPT, BASE, sample=4)
    monkeypatch.setattr(vocabulary, "read_rows", watched)
    monkeypatch.setattr(vocabulary, "_BLOCK", 128 * 100)
    assert surgery.prompt_nearest(PROMPT, BASE, sample=4) == whole
    assert max(seen) == 100


def test_a_table_of_zeros_finds_no_neighbours(tmp_path: Path) -> None:
    """Rows that nobody has trained are no neighbours, and nothing is divided by their norms."""
    recipes.build("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    rows[10:] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    report = surgery.prompt_nearest(write_prompt(tmp_path / "prompt", rows[3:5]), tmp_path)
    assert report.spacing.tokens == 10
    assert [token.nearest["cosine"][0].id for token in report.tokens] == [3, 4]


def test_a_token_is_escaped_once_on_every_screen() -> None:
    report = surgery.prompt_nearest(PROMPT, BASE, top=2)
    assert r'"\n\n"' in report.decoded.values()
    for verbose in (False, True):
        text = str(report.summary(verbose=verbose))
        assert r'"\n\n"' in text
        assert r"\\" not in text
