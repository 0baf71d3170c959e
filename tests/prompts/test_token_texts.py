# SPDX-License-Identifier: Apache-2.0
"""Tokens as people read them are what the tokenizers library decodes, whatever marks the vocabulary has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import surgery
from surgery.prompts.token_texts import read_as, token_texts
from surgery.prompts.vocabulary import spelt_tokens
from tests.support.kit import ROOT

BASE = ROOT / "examples" / "base"


def test_byte_level_tokens_are_what_the_tokenizer_decodes() -> None:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    spelt, decoded = token_texts(BASE, range(tokenizer.get_vocab_size()))
    assert len(spelt) == len(decoded) == tokenizer.get_vocab_size()
    whole = 0
    for row in spelt:
        text = tokenizer.decode([row], skip_special_tokens=False)
        if "\ufffd" in text or spelt[row] == text == decoded[row]:  # a part of a character, or a special token
            continue
        whole += 1
        escaped = (
            text.replace("\\", "\\\\")
            .replace('"', '\\"')
            .replace("\n", "\\n")
            .replace("\t", "\\t")
            .replace("\r", "\\r")
        )
        assert decoded[row] == f'"{escaped}"'
    assert whole > 1200


BYTES = {"decoder": {"type": "ByteLevel"}}
METASPACE = {"decoder": {"type": "Metaspace", "replacement": "▁"}}
LLAMA: dict[str, Any] = {
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
}
WORDPIECE = {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
SPLIT = {"decoder": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}}


@pytest.mark.parametrize(
    ("tokenizer", "token", "text"),
    [
        (BYTES, "Ġassert", '" assert"'),
        (BYTES, "ĊĊ", r'"\n\n"'),
        (BYTES, 'Ġ"', r'" \""'),
        (BYTES, "Ã©", '"é"'),
        (BYTES, "âĤ", r'"\xe2\x82"'),
        (BYTES, "▁a", '"▁a"'),
        (SPLIT, "Ġa", '" a"'),
        (METASPACE, "▁the", '" the"'),
        (METASPACE, "<0x0A>", '"<0x0A>"'),
        (LLAMA, "▁the", '" the"'),
        (LLAMA, "<0x0A>", r'"\n"'),
        (LLAMA, "<0xE2>", r'"\xe2"'),
        (WORDPIECE, "##ing", '"##ing"'),
        ({}, "a\\b", r'"a\\b"'),
        ({"decoder": {"type": "Replace", "pattern": 3, "content": " "}}, "▁a", '"▁a"'),
        ({"decoder": [1]}, "Ġa", '"Ġa"'),
        ({"added_tokens": [{"id": 0, "content": "<s>", "special": True}, 3], **BYTES}, "<s>", "<s>"),
        ({"added_tokens": [{"id": 0, "content": "Ġ", "special": False}], **BYTES}, "Ġ", '"Ġ"'),
    ],
)
def test_marks_are_read_as_what_they_stand_for(tokenizer: dict[str, Any], token: str, text: str) -> None:
    assert read_as(tokenizer, {0: token}) == {0: text}


@pytest.mark.parametrize("wrong", [[0], {"a": 0}, None, "0", 0.5])
@pytest.mark.parametrize(
    "place",
    [
        lambda wrong: {"added_tokens": [{"id": wrong, "content": "a", "special": True}, wrong]},
        lambda wrong: {"added_tokens": wrong, "decoder": wrong, "pre_tokenizer": wrong},
        lambda wrong: {"decoder": {"type": wrong, "pattern": wrong, "content": wrong}},
        lambda wrong: {"decoder": {"type": "Sequence", "decoders": [{"type": wrong}, wrong]}},
        lambda wrong: {"decoder": {"type": "Replace", "content": " ", "pattern": {"String": wrong}}},
    ],
    ids=["id", "whole", "type", "part", "mark"],
)
def test_a_tokenizer_with_values_of_other_kinds_is_read_as_spelt(place: Callable[[Any], Any], wrong: Any) -> None:
    assert read_as(place(wrong), {0: "a"}) == {0: '"a"'}


def test_llamas_tokens_are_what_the_tokenizers_library_makes_of_them(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "a": 1, "▁the": 2, "<0x0A>": 3, "é": 4, "▁": 5}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "added_tokens": [], **LLAMA})
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    decoded = read_as(LLAMA, spelt_tokens({"model": model}))
    for row in (1, 2, 3, 4, 5):
        behind = tokenizer.decode([1, row]).removeprefix("a")  # a space at the beginning is stripped
        assert decoded[row] == f'"{behind}"'.replace("\n", "\\n")


def test_a_report_shows_text_and_keeps_the_vocabularys_spelling_in_json() -> None:
    report = surgery.prompt_nearest(ROOT / "examples" / "prompt", BASE)
    text = report.summary().as_text()
    assert '" assert"' in text or '"assert"' in text
    assert "Ġ" not in text
    assert "Ċ" not in text
    assert r'"\n\n"' in text
    assert "\\\\" not in text
    assert any("Ġ" in spelt for spelt in report.as_json()["texts"].values())
    assert report.as_json()["texts"].keys() == report.as_json()["decoded"].keys()
