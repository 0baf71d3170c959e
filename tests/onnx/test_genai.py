# SPDX-License-Identifier: Apache-2.0
"""Folders for onnxruntime-genai: the tokens around a text, and the page's program where it is installed.

It needs the package onnxruntime, which has the same files as the onnxruntime-gpu of this project: ``pip install --no-deps
onnxruntime-genai`` runs on either. What it encoded is also written down here, so that the settings are tested without it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery_formats.errors import MalformedError

BASE = Path("examples/base")
ROOT = Path(__file__).resolve().parents[2]
NAMES = {"<|begin|>": 0, "<|end|>": 1, "<|pad|>": 2}
TEXT, IDS = "def add(a", [297, 1102, 10, 67]
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*parts: str) -> dict[str, Any]:
    """A post-processor that puts special tokens around the text A."""
    single: list[dict[str, Any]] = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    special = {part: {"id": part, "ids": [NAMES[part]], "tokens": [part]} for part in parts if part != "A"}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def roberta() -> dict[str, Any]:
    sides = {"sep": ["<|end|>", 1], "cls": ["<|begin|>", 0]}
    return {"type": "RobertaProcessing", **sides, "trim_offsets": True, "add_prefix_space": False}


Case = tuple[Any, dict[str, Any], list[int], list[int], "tuple[bool, bool] | None"]
CASES: dict[str, Case] = {  # post-processor, settings, tokens in front and behind, what is written
    "beginning": (template("<|begin|>", "A"), {}, [0], [], None),
    "both": (template("<|begin|>", "A", "<|end|>"), {}, [0], [1], None),
    "end": (template("A", "<|end|>"), {}, [], [1], None),
    "none": (BYTES, {}, [], [], None),
    "nothing to do": (None, {}, [], [], None),
    "one token for both": (template("<|begin|>", "A"), {"eos_token": "<|begin|>"}, [0], [], (True, False)),
    "no name of an end": (template("<|begin|>", "A"), {"eos_token": None}, [0], [], (True, False)),
    "a class with a beginning": (BYTES, {"tokenizer_class": "LlamaTokenizer"}, [], [], (False, False)),
    "in a sequence": ({"type": "Sequence", "processors": [BYTES, template("<|begin|>", "A")]}, {}, [0], [], None),
    "as RoBERTa": (roberta(), {}, [0], [1], None),
    "said by its author": (BYTES, {"add_bos_token": False, "add_eos_token": False}, [], [], None),
}
UNSAID = {"another token": template("<|pad|>", "A"), "twice": template("<|begin|>", "<|begin|>", "A")}


def exported(folder: Path, processor: Any, settings: dict[str, Any], layout: str = "genai") -> surgery.ExportResult:
    """The shipped example with another tokenizer around its words."""
    shutil.copytree(BASE, folder / "base")
    for name, changes in (("tokenizer.json", {"post_processor": processor}), ("tokenizer_config.json", settings)):
        content = json.loads((folder / "base" / name).read_text()) | changes
        (folder / "base" / name).write_text(json.dumps(content))
    return surgery.export_onnx(folder / "base", output=folder / "out", layout=layout)


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize("name", CASES)
def test_settings_are_written_where_they_would_be_guessed_wrong(tmp_path: Path, name: str) -> None:
    processor, settings, front, behind, written = CASES[name]
    result = exported(tmp_path, processor, settings)
    wanted = settings_of(tmp_path / "base")
    if written is not None:
        wanted |= dict(zip(("add_bos_token", "add_eos_token"), written, strict=True))
    assert settings_of(tmp_path / "out") == wanted
    assert not any("cannot be told" in text for text in result.warnings)
    import transformers

    for folder in ("base", "out"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer(TEXT)["input_ids"] == [*front, *IDS, *behind]
    assert surgery.run(tmp_path / "out", TEXT, max_new=1).texts[0].tokens


@pytest.mark.parametrize("name", CASES)
def test_genai_encodes_as_transformers_does(tmp_path: Path, name: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    processor, settings, front, behind, _ = CASES[name]
    exported(tmp_path, processor, settings)
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    assert list(tokenizer.encode(TEXT)) == IDS  # nothing in a folder changes that
    tokenizer.update_options(add_special_tokens="true")
    assert list(tokenizer.encode(TEXT)) == [*front, *IDS, *behind]


@pytest.mark.parametrize("name", UNSAID)
def test_what_genai_cannot_be_told_is_warned_of(tmp_path: Path, name: str) -> None:
    result = exported(tmp_path, UNSAID[name], {})
    assert any("cannot be told: give it token ids" in text for text in result.warnings)
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "base")


def test_settings_that_contradict_the_tokenizer_are_warned_of(tmp_path: Path) -> None:
    result = exported(tmp_path, BYTES, {"add_bos_token": True})
    assert any("something else than the tokenizer does" in text for text in result.warnings)
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "base")


def test_other_layouts_keep_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    result = exported(tmp_path, template("<|pad|>", "A"), {"tokenizer_class": "LlamaTokenizer"}, layout="plain")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (
        tmp_path / "base/tokenizer_config.json"
    ).read_bytes()
    assert not any("cannot be told" in text for text in result.warnings)


def test_a_template_of_tokens_that_are_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="the template has no token"):
        exported(tmp_path, template("<|begin|>", "A") | {"special_tokens": {}}, {})


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "TemplateProcessing", "single": [5]},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]},
        {"type": "BertProcessing"},
        {"type": "Sequence", "processors": 5},
    ],
    ids=str,
)
def test_a_post_processor_of_another_form_is_refused(tmp_path: Path, processor: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match="has not the form of its type"):
        exported(tmp_path, processor, {})


def test_a_post_processor_that_is_not_known_stays(tmp_path: Path) -> None:
    assert not exported(tmp_path, {"type": "Unheard"}, {}).warnings
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "base")


def test_the_pages_program_says_what_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    surgery.export_onnx(BASE, output=tmp_path / "out", layout="genai")
    page = (ROOT / "docs" / "deploying.md").read_text().partition("## onnxruntime-genai\n")[2]
    program = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert program is not None
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    exec(compile(program[1], "deploying.md", "exec"), {"print": said.append})
    text = "Once upon a time"
    wanted = surgery.run("out", text, max_new=64).texts[0].text
    assert len(said) == 1
    assert said[0].startswith(text)
    assert wanted.startswith(said[0].removeprefix(text))
    assert len(said[0]) > len(text) + 20
