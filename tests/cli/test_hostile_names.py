# SPDX-License-Identifier: Apache-2.0
"""Whatever a name, a metadata entry or a path holds, it reaches screen, Markdown, HTML, CSV and JSON as text that does nothing."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_cli.group import COMMANDS as COMMAND_NAMES
from surgery_cli.group import surgery
from surgery_formats.text import clean, encodable, markdown, markdown_code, show, verbatim
from tests.oracles.bad_inputs import COMMANDS
from tests.support.page_reader import check_page
from tests.support.small_world import invoke, make_world

ACTS = "\x1b[2J\x1b]0;t\x07\r\nerror: forged\t\u202e\u2066\u200b"
MARKS = "|<script>x<!--`a`[b](javascript:c)![d](e)*f*_g_{{7*7}}{% h %}$i$&lt;~~j~~"
NAMES = {
    "acts": ACTS + MARKS,
    "half": MARKS + "\ud800",
    "long": "n<i>" * 250_000,
    "formula": '=HYPERLINK("http://x");=cmd|\uff1d1|</table></style><svg onload=x>\'"&#0;' + MARKS,
}
SPAN = re.compile(r"^(`{3,})\n.*?\n\1$|(`+)(?!`).*?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
MARKUP = re.compile(r"(?<!\\)(?:<\w|!\[|\]\(|\{\{|\{%|&lt|~~|\*f)")


def _header(edit: Callable[[dict[str, Any]], Any], file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        edit(header)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])

    return change


def _renamed(old: str, new: str, file: str) -> Callable[[Path], Any]:
    def edit(header: dict[str, Any]) -> None:
        for key in [key for key in header if old in key]:
            header[key.replace(old, new)] = header.pop(key)

    return _header(edit, file)


def _config(file: str, **fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        place = folder / file
        known = json.loads(place.read_text()) if place.exists() else {}
        place.write_text(json.dumps({**known, **fields}))

    return change


def _graph(edit: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        edit(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


def _in_text(file: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        place = folder / file
        place.write_text(place.read_text().replace(json.dumps(old), json.dumps(new)))

    return change


MODEL, ADAPTER, SETTINGS = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"


def _places(name: str) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """Where a name can stand: the input, and what puts it there."""
    encoded = name.replace("\ud800", "")
    places: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "a tensor of the base": ("base", _renamed("layers.1.mlp.up_proj", name, MODEL)),
        "metadata of the base": ("base", _header(lambda header: header["__metadata__"].update({name: name}), MODEL)),
        "the base's own name": ("base", _config("config.json", _name_or_path=name)),
        "architecture": ("base", _config("config.json", architectures=[name])),
        "model type": ("base", _config("config.json", model_type=name)),
        "chat template": ("base", _config("tokenizer_config.json", chat_template=name, tokenizer_class=name)),
        "the adapter's base": ("lora", _config(SETTINGS, base_model_name_or_path=name)),
        "the adapter's task": ("lora", _config(SETTINGS, task_type=name, revision=name)),
        "kind of adapter": ("lora", _config(SETTINGS, peft_type=name)),
        "target modules": ("lora", _config(SETTINGS, target_modules=[name])),
        "an unknown switch": ("lora", _config(SETTINGS, **{name: True})),
        "a tensor of the adapter": ("lora", _renamed("layers.1.self_attn.v_proj", name, ADAPTER)),
        "metadata of the adapter": ("lora", _header(lambda header: header["__metadata__"].update({name: name}), ADAPTER)),
        "what a prompt began as": ("prompt", _config(SETTINGS, prompt_tuning_init_text=name, tokenizer_name_or_path=name)),
        "the base of a prompt": ("prompt", _config(SETTINGS, base_model_name_or_path=name)),
        "an account": ("merged", _in_text("surgery_manifest.json", "merge", name)),
        "a file of an account": ("merged", _in_text("surgery_manifest.json", "config.json", name)),
        "an adapter in a graph": ("slots", _graph(lambda model: [
            setattr(entry, "value", entry.value.replace('"lora"', json.dumps(name))) for entry in model.metadata_props
        ])),
        "who made a graph": ("graph", _graph(lambda model: setattr(model, "producer_name", encoded))),
        "a node": ("graph", _graph(lambda model: setattr(model.graph.node[3], "name", encoded))),
        "an operator": ("graph", _graph(lambda model: setattr(model.graph.node[3], "op_type", encoded))),
        "an input": ("graph", _graph(lambda model: setattr(model.graph.input[0], "name", encoded))),
        "metadata of a graph": ("graph", _graph(lambda model: model.metadata_props.add(key=encoded, value=encoded))),
        "a step": ("recipe", lambda path: path.write_text(json.dumps({"steps": [{"verb": name}]}))),
        "an option of a step": ("recipe", lambda path: path.write_text(json.dumps({"steps": [{"verb": "merge", name: 1}]}))),
        "a reference of a step": ("recipe", lambda path: path.write_text(json.dumps({"steps": [
            {"verb": "merge", "base": name, "adapters": name}
        ]}))),
    }  # fmt: skip
    return places


FRONT = re.compile(r"(?:---\n(.*?)\n---\n)?(.*)", re.DOTALL)
ALWAYS = re.compile(r"inspect|report .*--md|merge \{base\} \{lora\} -o \{out\}$|verify \{merged|prompt show")
PRINTS = re.compile(r"inspect|report|merge|check \{base\} \{lora\}$|prompt (show|combine)|diff|locate|run")
PAGED = {
    name
    for name in COMMAND_NAMES
    if any(param.name == "html_file" for param in surgery.get_command(click.Context(surgery), name).params)
}
NUMBERS = itertools.count()
CASES = [(kind, place) for kind, name in NAMES.items() for place in _places(name)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_world(tmp_path_factory.mktemp("world"))


def _harmless(text: str) -> None:
    assert all(line.isprintable() for line in text.replace("\t", " ").splitlines()), ascii(text)[:2000]
    assert "\nerror: forged" not in text


def _checked(words: list[str], *, told: bool) -> None:
    began = time.process_time()
    if not told and words[0] in PAGED:
        number = next(NUMBERS)
        words = [*words, "--html", f"page{number}.html", "--csv", f"page{number}.csv"]
    result = invoke(*words)
    assert result.exit_code != 1, result.stderr[:2000]
    assert time.process_time() - began < 10
    if not told:
        _harmless(result.stdout)
        _harmless(result.stderr)
        return
    for stream in (result.stdout, *([result.stderr] if result.exit_code and result.exit_code != 6 else [])):
        for document in filter(None, [stream.strip()]):
            assert document.isascii()
            json.dumps(json.loads(document), ensure_ascii=False).encode()  # no half of a character


def _markdown_is_harmless(folder: Path) -> None:
    for path in folder.rglob("*.md"):
        text = path.read_text()
        _harmless(text)
        front, rest = FRONT.fullmatch(text).groups("")
        assert MARKUP.search(SPAN.sub("", rest)) is None, path
        assert "<" not in front


def _pages_are_harmless(folder: Path) -> None:
    """A page has the tags of ours alone, whatever names say; no cell of a table is a formula."""
    pages = sorted(folder.glob("page*.html"))
    for path in pages:
        _harmless(check_page(path.read_text(encoding="utf-8")).text.replace("\N{EM SPACE}", " "))
        assert path.stat().st_size < 1 << 21
        with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert all(cell.isprintable() for cell in cells)
        assert not any(re.search(r"(?:^|;)\s*(?:[=+@\uff1d]|-(?![\d.]))", cell) for cell in cells)


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_a_hostile_name_does_nothing(
    kind: str, place: str, world: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    of, put = _places(NAMES[kind])[place]
    bad = tmp_path / "bad" / world[of].name
    bad.parent.mkdir()
    (shutil.copytree if world[of].is_dir() else shutil.copyfile)(world[of], bad)
    put(bad)
    monkeypatch.chdir(tmp_path)
    readers = [line for line in COMMANDS if f"{{{of}}}" in line]
    first = CASES.index((kind, place))
    shown = [line for line in readers if ALWAYS.match(line)]
    turns = [readers[(first + step) % len(readers)] for step in range(3)]
    lines = (
        list(dict.fromkeys((*shown, *turns)))
        if kind == "acts"
        else [shown[first % len(shown)] if shown else turns[0], turns[1]]
    )
    for number, line in enumerate(lines):
        words = line.format(out=tmp_path / f"out{number}", **{**world, of: bad}).split()
        if kind == "acts" or number == 0:
            _checked([*words, "-v"], told=False)
        if kind == "acts" or number == 1:
            _checked([*(word.replace(f"out{number}", f"json{number}") for word in words), "--json"], told=True)
    _markdown_is_harmless(tmp_path)
    _pages_are_harmless(tmp_path)


@pytest.mark.parametrize(
    "name",
    [ACTS + MARKS.replace("/", ""), "\udcff\udcfe<b>", "| a `b` [c](d)", "'\";=cmd|' C'!A0<svg onload=x>\u202e"],
    ids=["acts", "no text", "marks", "formula"],
)
def test_a_hostile_folder_does_nothing(name: str, world: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    at = dict(world)
    for number, of in enumerate(("base", "lora", "prompt", "graph")):
        at[of] = tmp_path / f"{number}{name}"[:80]
        shutil.copytree(world[of], at[of])
    for number, line in enumerate(COMMANDS):
        if PRINTS.match(line) and "onnx_adapter" not in line:
            words = [word.format(out=tmp_path / f"out{number}", **at) for word in line.split()]
            _checked(words, told=False)
            _checked([*(word.replace(f"out{number}", f"json{number}") for word in words), "--json"], told=True)
    _markdown_is_harmless(tmp_path)
    _pages_are_harmless(tmp_path)


CHARACTERS = st.text(st.characters(categories=None), max_size=60) | st.sampled_from((NAMES["acts"], NAMES["half"]))


@settings(max_examples=150)
@given(CHARACTERS)
def test_every_text_is_made_safe(text: str) -> None:
    assert show(text).isprintable()
    assert len(show(text)) <= 120 * 10
    assert clean(text).isprintable()
    assert clean(show(text)) == show(text)
    assert all(line.isprintable() or "\t" in line or not line.isascii() for line in verbatim(text).split("\n"))
    verbatim(text).encode()
    json.dumps({encodable(text): encodable(text)}, ensure_ascii=False).encode()
    span = markdown_code(show(text))
    assert span.count("`") in (0, 2)
    assert "|" not in span
    assert MARKUP.search(markdown(text)) is None
    assert markdown(text).isprintable()
