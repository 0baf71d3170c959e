# SPDX-License-Identifier: Apache-2.0
"""Chat templates as transformers renders them, in a sandbox; stop words; strengths of adapters."""

from __future__ import annotations

import json
import shutil

import numpy as np
import peft
import pytest
import transformers

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.onnx.run.batch_file import read_batch
from surgery.onnx.run.chat import render_chats
from surgery.onnx.run.opening import open_graph
from surgery.onnx.run.prepare import prepare_decoder
from surgery.onnx.run.stop_words import CutText
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from tests.oracles import peft_oracle, recipes
from tests.support.kit import ROOT
from tests.support.onnx_files import write_adapter_file

BASE = ROOT / "examples" / "base"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who? {{ nobody }}"},
    {"role": "assistant", "content": "She."},
    {"role": "user", "content": "When?"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "with blocks and a date": """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {{- '[' + message.role + '] ' + message['content'] | trim }}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{{- strftime_now('%Y') | length }} {{ messages[0] | tojson }} {{ messages[0]['content'].split(' ')[-1] }}
""",
    "what there is not": "{% if tools is not none %}{{ tools | length }}{% endif %}{{ documents is none }}{{ mine is defined }}",
    "an assistant's part": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "JSON as it is asked for": "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}{{ dict(a=1) | tojson }}",
    "a macro": "{% macro say(m) %}{{ m.role | upper }}: {{ m.content }}\n{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ say(m) }}{% endfor %}",
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_templates_are_rendered_as_transformers_does(folder, name, where):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if where == "tokenizer_config.json":
        (folder / where).write_text(json.dumps({**settings, "chat_template": TEMPLATES[name], "bos_token": "<s>"}))
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
        (folder / where).write_text(TEMPLATES[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render_chats(folder, [TALK, TALK]) == [wanted, wanted]


HOSTILE = {
    "reaches for Python": ("{{ ''.__class__.__mro__ }}", MalformedError, "fails"),
    "changes what it is given": ("{{ messages.append(1) }}", MalformedError, "fails"),
    "counts for ever": ("{% for i in range(10 ** 9) %}{% endfor %}", MalformedError, "fails"),
    "has no end": ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", MalformedError, "more than"),
    "runs for ever": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        MalformedError,
        "seconds",
    ),
    "takes a gigabyte": ("{{ 'x' * 10 ** 9 }}", MalformedError, "memory"),
    "doubles a text": (
        "{% set ns = namespace(a='xx') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
        MalformedError,
        "memory",
    ),
    "pads a text": ("{{ '%10000000000d' % 1 }}", MalformedError, "memory"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", MalformedError, "without end"),
    "is deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", MalformedError, "without end"),
    "stores what Python owns": ("{% set ns = namespace(__class__=1) %}", MalformedError, "no attribute"),
    "formats attributes": ("{{ '{0.__class__.__mro__}'.format(messages) }}", MalformedError, "fails"),
    "imports": ("{% include 'other' %}", MalformedError, "fails"),
    "is broken": ("{% for %}", MalformedError, "fails"),
    "refuses": ("{{ raise_exception('no system, please') }}", FitError, "no system, please"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_templates(folder, fault, monkeypatch):
    monkeypatch.setattr("surgery.onnx.run.chat._SECONDS", 1)
    template, error, words = HOSTILE[fault]
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=words):
        render_chats(folder, [TALK])


def test_a_chat_is_what_the_template_makes_of_a_text(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    surgery.export_onnx(folder, output=folder)
    chat = surgery.run(folder, "def f(", chat=True, system="Be brief.", max_new=3, device="cpu").texts[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def f("}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert list(chat.prompt) == tokenizer(text, add_special_tokens=False).input_ids
    assert surgery.run(folder, talk, max_new=3, device="cpu").texts[0] == chat


def test_lines_of_a_file_end_as_lines_do(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\r\n\n two\x0b\n".encode())
    assert read_batch(tmp_path / "a.txt") == ["one\u2028still one", " two\x0b"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_batch(tmp_path / "a.jsonl") == ["a\u2028b"]


def test_without_a_template_a_chat_is_refused(folder):
    with pytest.raises(NotFoundError, match="no chat template"):
        render_chats(folder, [TALK])


def test_stop_words_end_a_row_and_are_cut_off(folder):
    surgery.export_onnx(folder, output=folder)
    texts = ["The function returns", "import os"]
    whole = surgery.run(folder, texts, max_new=24, device="cpu").texts
    word = whole[0].text[7:10]
    heard = ["", ""]

    def on_text(row, text):
        heard[row] += text

    found = surgery.run(folder, texts, max_new=24, device="cpu", stop=word, on_text=on_text).texts
    assert found[0].text == whole[0].text[: whole[0].text.index(word)]
    assert (found[0].reason, len(found[0].tokens) < 24) == ("stop", True)
    assert found[1].text == whole[1].text.partition(word)[0]
    assert heard == [text.text for text in found]


def test_no_part_of_a_stop_word_is_ever_shown():
    cut = CutText(["</s>", "END"])
    assert [cut.push(piece) for piece in ("a <", "b", " EN", "D of", " it")] == ["a ", "<b", " ", "", ""]
    assert (cut.text, cut.ended, cut.close()) == ("a <b ", True, "")
    unended = CutText(["</s>"])
    assert unended.push("x </") == "x "
    assert unended.close() == "</"


def test_a_file_at_a_strength(tmp_path):
    base = recipes.build("llama", tmp_path / "base")
    with peft_oracle.quiet():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(recipes.load("llama", base), config)
        import torch

        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(3))
        wrapped.save_pretrained(tmp_path / "lora")
    surgery.export_onnx(base, swap=tmp_path / "lora", output=tmp_path / "out")
    file = tmp_path / "out" / "adapters" / "lora.onnx_adapter"
    halved = {
        name: array * np.float32(0.5) if ".lora_B." in name else array
        for name, array in read_adapter_file(file).items()
    }
    write_adapter_file(tmp_path / "half.onnx_adapter", halved)
    opened = open_graph(tmp_path / "out", device="cpu")

    def logits(adapter):
        return prepare_decoder(opened, batch=1, max_length=8, adapters=adapter)[0].prefill([[5, 17, 3]])

    assert np.array_equal(logits(f"{file}=0.5"), logits(tmp_path / "half.onnx_adapter"))
    assert np.abs(logits(f"{file}=0.5") - logits(file)).max() > 1e-3
    with pytest.raises(FitError, match="no strength"):
        logits(f"{file}=much")


def test_a_head_has_no_strength(tmp_path):
    base = recipes.build("bert_sequence", tmp_path / "base")
    with peft_oracle.quiet():
        model = recipes.load("bert_sequence", base)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
        wrapped.save_pretrained(tmp_path / "lora")
    surgery.export_onnx(base, swap=tmp_path / "lora", output=tmp_path / "out")
    file = tmp_path / "out" / "adapters" / "lora.onnx_adapter"
    with pytest.raises(FitError, match="has no strength"):
        surgery.run(tmp_path / "out", [5, 6], adapters=f"{file}=0.5", device="cpu")
    assert surgery.run(tmp_path / "out", [5, 6], adapters=f"{file}=1", device="cpu").texts
