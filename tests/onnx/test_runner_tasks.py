# SPDX-License-Identifier: Apache-2.0
"""What a run says for each task: answers, words for masks, choices, scores of pairs; in text, as transformers does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner

import surgery
from surgery.onnx.run.encoder import EncoderOutput
from surgery.onnx.run.inputs import InputRow
from surgery.onnx.run.task_scores import task_scores
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError, UsageError
from tests.oracles import recipes

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def exported(name, folder):
    """A model and its graph with a tokenizer of words, and transformers' copies of both."""
    base = recipes.build(name, folder / "base")
    words = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(4, recipes.VOCAB))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w4"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    tokenizer.save_pretrained(base)
    surgery.export_onnx(base, output=folder / "out")
    return folder / "out", recipes.load(name, base), tokenizer


def of(model, tokenizer, *texts):
    with torch.no_grad():
        typed = model.config.model_type != "distilbert"
        return model(**tokenizer(*texts, return_tensors="pt", return_token_type_ids=typed))


def test_words_for_masks(tmp_path):
    out, model, tokenizer = exported("bert_masks", tmp_path)
    texts = ["w5 [MASK] w9 [MASK]", "w8 [MASK]"]
    found = surgery.run(out, texts, device="cpu")
    pipeline = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)
    wanted = pipeline(texts[0])
    for scores, words in zip(found.texts[0].scores, wanted, strict=True):
        assert [*scores] == [word["token_str"] for word in words]
        assert np.allclose([*scores.values()], [word["score"] for word in words], atol=1e-5)
    assert len(found.texts[1].scores) == 1


def test_words_that_differ_by_a_space_are_two():
    """Tokens of RoBERTa and others; the less likely one took the place of the likelier."""

    class Spaced:
        mask = 3

        def decode(self, ids):
            return ["a", "word", " word", "[MASK]"][ids[0]]

    logits = np.log([[[0.1, 0.6, 0.25, 0.05]]])
    encoded = EncoderOutput({"logits": logits}, (1,))
    (scores,) = task_scores("fill-mask", encoded, 0, InputRow([3], [0]), [], Spaced())
    assert list(scores)[:3] == ["word", "word (2)", "a"]
    assert list(scores.values()) == pytest.approx([0.6, 0.25, 0.1, 0.05])


@pytest.mark.parametrize("name", ["bert_spans", "distilbert_spans"])
def test_answers(name, tmp_path):
    out, model, tokenizer = exported(name, tmp_path)
    question, text = "w5 w6", "w7 w8 w50 w60 w70"
    expected = of(model, tokenizer, question, text)
    begin, end = (logits[0, 4:9].softmax(0) for logits in (expected.start_logits, expected.end_logits))
    spans = {(first, last): float(begin[first] * end[last]) for first in range(5) for last in range(first, 5)}
    (first, last), score = max(spans.items(), key=lambda pair: pair[1])
    (scores,) = surgery.run(out, [(question, text)], device="cpu").texts[0].scores
    assert [*scores] == [" ".join(text.split()[first : last + 1])]
    assert abs(scores.popitem()[1] - score) < 1e-5
    printed = CliRunner().invoke(command, ["run", str(out), "--pair", question, text, "--device", "cpu"]).output
    assert " ".join(text.split()[first : last + 1]) + f" {score:.4f}" in printed
    by_ids = surgery.run(out, tokenizer(question, text).input_ids, device="cpu").texts[0].scores
    assert next(iter(by_ids[0])).startswith("tokens ")


def test_choices(tmp_path):
    out, model, tokenizer = exported("roberta_choices", tmp_path)
    pairs = [("w5 w6", "w7"), ("w5 w6", "w8 w9 w10")]
    encoded = tokenizer(
        *map(list, zip(*pairs, strict=True)), return_tensors="pt", padding=True, return_token_type_ids=True
    )
    encoded["input_ids"][0, -2:] = 1  # RoBERTa's own padding, which the configuration names
    with torch.no_grad():
        logits = model(**{name: value[None] for name, value in encoded.items()}).logits[0]
    found = surgery.run(out, pairs, device="cpu")
    assert np.allclose([text.scores[0]["chosen"] for text in found.texts], logits.softmax(0), atol=1e-5)


def test_pairs_are_scored_with_their_types(tmp_path):
    out, model, tokenizer = exported("bert_sequence", tmp_path)
    pairs = [("w5", "w7 w8"), ("w9 w10 w11", "w12")]
    found = surgery.run(out, pairs, device="cpu")
    for text, pair in zip(found.texts, pairs, strict=True):
        wanted = of(model, tokenizer, *pair).logits[0].softmax(0)
        assert np.allclose([*text.scores[0].values()], wanted, atol=1e-5)
    assert found.inputs == ("w5 / w7 w8", "w9 w10 w11 / w12")


def test_inputs_from_files(tmp_path):
    out, _, _ = exported("bert_sequence", tmp_path)
    lines = [{"prompt": "w5"}, {"pair": ["w5", "w7"]}, {"ids": [1, 9, 2]}]
    (tmp_path / "some.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    (tmp_path / "some.txt").write_text("w5\n\nw9 w10\n")

    def run(file):
        result = CliRunner().invoke(
            command, ["--json", "run", str(out), "--batch", str(tmp_path / file), "--device", "cpu"]
        )
        return result, json.loads(result.stdout)["result"] if result.exit_code == 0 else None

    wanted = surgery.run(out, ["w5", ("w5", "w7"), [1, 9, 2]], device="cpu").as_json()["texts"]
    assert run("some.jsonl")[1]["texts"] == wanted
    assert [len(text["prompt"]) for text in run("some.txt")[1]["texts"]] == [3, 4]
    for bad, words in (('{"prompt": 3}', "line 1"), ('{"prompt": "a", "ids": [1]}', "line 1"), ("", "no line")):
        (tmp_path / "bad.jsonl").write_text(bad)
        assert words in run("bad.jsonl")[0].stderr
    with pytest.raises(UsageError, match=r"inputs\[1\]"):
        surgery.run(out, ["w5", {"role": "user"}])
    with pytest.raises(FitError, match="no text"):
        surgery.run(out, [])


def test_groups_of_rows_give_what_all_give_together(tmp_path):
    rows = [[5, 17, 3], [29, 8, 77, 50, 9], [61], [42, 88], [7, 7, 7, 7, 7, 7]]
    for name in ("llama", "bert_token", "bert_sequence"):
        base = recipes.build(name, tmp_path / name)
        surgery.export_onnx(base, output=base)
        together, apart = (surgery.run(base, rows, device="cpu", max_new=4, batch_size=size) for size in (None, 2))
        for one, other in zip(together.texts, apart.texts, strict=True):
            assert (one.tokens, one.reason) == (other.tokens, other.reason)
            for mine, theirs in zip(one.scores, other.scores, strict=True):
                assert np.allclose([*mine.values()], [*theirs.values()], atol=1e-5)
        assert together.new_tokens == apart.new_tokens == (20 if name == "llama" else 0)
        assert [value.shape for value in together.arrays.values()] == [value.shape for value in apart.arrays.values()]
