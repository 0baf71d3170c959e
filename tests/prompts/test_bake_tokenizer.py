# SPDX-License-Identifier: Apache-2.0
"""A tokenizer with a baked prompt puts its tokens in front of every text, and takes no row that another token has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery_formats.errors import FitError, MalformedError
from tests.oracles import peft_oracle
from tests.support.baked_prompts import attached
from tests.support.kit import ROOT

PROMPT, BASE = ROOT / "examples" / "prompt", ROOT / "examples" / "base"


def test_the_tokenizer_puts_them_before_every_text_and_conversation(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    settings = json.loads((BASE / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (tmp_path / "base" / "other.jinja").write_text("{{ bos_token }}")
    result = surgery.prompt_bake(PROMPT, tmp_path / "base", output=tmp_path / "out", name="soft")
    assert result.words.startswith("<soft_0><soft_1>")
    assert not [text for text in result.warnings if "template" in text]
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(after) == len(before) + 16
    for text in ("def f(x):\n    return x", "", "numeric <soft objects"):
        assert after(text).input_ids == [*result.ids, *before(text).input_ids]
        assert after(text, add_special_tokens=False).input_ids == before(text, add_special_tokens=False).input_ids
        assert after.decode(after(text).input_ids, skip_special_tokens=True) == before.decode(
            before(text).input_ids, skip_special_tokens=True
        )
    assert after(result.words, add_special_tokens=False).input_ids == list(result.ids)
    talk = [{"role": "user", "content": "hello"}]
    old = before.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert after.apply_chat_template(talk, tokenize=True, return_dict=False) == [*result.ids, *old]
    assert (tmp_path / "out" / "other.jinja").read_text() == result.words + "{{ bos_token }}"
    named = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    named["chat_template"] = [{"name": "default", "template": template}, {"name": "tools", "template": "x"}]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(named))
    surgery.prompt_bake(PROMPT, tmp_path / "base", output=tmp_path / "several", name="soft")
    several = json.loads((tmp_path / "several" / "tokenizer_config.json").read_text())["chat_template"]
    assert [entry["template"] for entry in several] == [result.words + template, result.words + "x"]
    pair = after("a", "b").input_ids
    assert pair == [*result.ids, *before("a", "b").input_ids]


def test_the_shipped_prompt_is_served_by_text_alone(tmp_path: Path) -> None:
    surgery.prompt_bake(PROMPT, BASE, output=tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with peft_oracle.quiet():
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16), PROMPT
        ).eval()
    text = "The following methods can be defined"
    plain = transformers.AutoTokenizer.from_pretrained(BASE)(text, return_tensors="pt")
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), peft_oracle.quiet():
        wanted = model.generate(**plain, max_new_tokens=12, do_sample=False)[:, plain.input_ids.shape[1] :]
        got = baked.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs.input_ids.shape[1] :]
    assert torch.equal(wanted, got)
    exported = surgery.export_onnx(tmp_path / "out", output=tmp_path / "graph")
    assert exported.contract is not None
    ran = surgery.run(tmp_path / "graph", text, device="cpu", max_new=12)
    assert ran.texts[0].prompt == tuple(inputs.input_ids[0].tolist())
    assert surgery.verify(tmp_path / "out", against=BASE)


def test_rows_that_no_token_has_are_taken_first(tmp_path: Path) -> None:
    """Many models have more rows than tokens; new tokens get the ids that the tokenizer gives next."""
    attached("llama", "prompt", tmp_path)
    shutil.copy(BASE / "tokenizer.json", tmp_path / "base")
    whole = json.loads((BASE / "tokenizer.json").read_text())
    vocabulary = {token: row for token, row in whole["model"]["vocab"].items() if row < 90}
    whole["model"] |= {"vocab": vocabulary, "merges": []}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(whole))
    result = surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out")
    assert result.ids == (90, 91, 92, 93, 94)
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "out"))
    name = "model.embed_tokens.weight"
    assert before[name].shape == after[name].shape
    changed = (before[name] != after[name]).any(1).nonzero()[:, 0].tolist()
    assert changed == list(result.ids)
    inner = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    assert inner.convert_tokens_to_ids("<p_4>") == 94


@pytest.mark.parametrize("before", ["none", "bytes", "roberta", "sequence"])
def test_every_post_processor_gets_them_in_front(before: str, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    whole = json.loads((BASE / "tokenizer.json").read_text())
    own, bytes_ = (
        whole["post_processor"],
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    )
    roberta = {
        "type": "RobertaProcessing",
        "sep": ["<|end|>", 1],
        "cls": ["<|begin|>", 0],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    whole["post_processor"] = {
        "none": None,
        "bytes": bytes_,
        "roberta": roberta,
        "sequence": {"type": "Sequence", "processors": [bytes_, own]},
    }[before]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(whole))
    result = surgery.prompt_bake(PROMPT, tmp_path / "base", output=tmp_path / "out")
    old, new = (tokenizers.Tokenizer.from_file(str(tmp_path / where / "tokenizer.json")) for where in ("base", "out"))
    assert new.encode("a text").ids == [*result.ids, *old.encode("a text").ids]
    assert new.encode("a text", "b").ids == [*result.ids, *old.encode("a text", "b").ids]


def test_a_post_processor_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    whole = json.loads((BASE / "tokenizer.json").read_text())
    for broken in ({"type": "Sequence"}, {"type": "Sequence", "processors": [3]}, 5, {"type": "TemplateProcessing"}):
        (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": broken}))
        with pytest.raises(MalformedError, match="not understood"):
            surgery.prompt_bake(PROMPT, tmp_path / "base", output=tmp_path / "out")


def test_rows_of_tokens_are_never_taken(tmp_path: Path) -> None:
    """A vocabulary whose ids have gaps: the package counts its tokens, so that the next ids may be those of some."""
    attached("llama", "prompt", tmp_path)
    whole = json.loads((BASE / "tokenizer.json").read_text())
    vocabulary = {token: row for token, row in whole["model"]["vocab"].items() if row < 60 or 72 <= row < 80}
    whole["model"] |= {"vocab": vocabulary, "merges": []}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(whole))
    assert tokenizers.Tokenizer.from_str(json.dumps(whole)).add_tokens(["<p_0>"]) == 1  # and gets id 68
    with pytest.raises(FitError, match="68 to 72, and 72 is 'f'"):
        surgery.prompt_bake(tmp_path / "prompt", tmp_path / "base", output=tmp_path / "out")
