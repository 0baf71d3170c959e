# SPDX-License-Identifier: Apache-2.0
"""Texts that people and recipes give: references, patterns, choices of ranks and layers, names; and what is shown of any text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from unicodedata import category

from surgery.engine.devices import devices_of
from surgery.engine.inputs import open as open_reference
from surgery.engine.selection import Selection
from surgery.insertion.modules import chosen_modules, linear_modules
from surgery.rank import Budget
from surgery.reports.markdown import as_markdown
from surgery.verbs.layers import rebuild
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.refs import parse_hub_name, resolve
from surgery_formats.text import clean, closest, encodable, local_name, markdown, markdown_code, show, verbatim

from ..target import Case, Seed, Target
from ..world import world_folder

__all__ = ["targets"]

QUICK = ("budget", "device", "file name", "shown")


def targets() -> list[Target]:
    """One for each kind of text."""
    kinds: dict[str, tuple[Callable[[str], object], tuple[str, ...]]] = {
        "reference": (
            _reference,
            ("org/name@main:a.gguf", "hf://org/name", "s3://bucket/a/b", "../x", "gs://", "az://c/x.onnx"),
        ),
        "shown": (_shown, ("a\x1b[31mb\n", "<b>|`x`", "\u202eabc\ud800", "C:\\x\\y.safetensors: [link](http://x)")),
        "file name": (
            _name,
            ("model-00001-of-00002.safetensors", "1_Pooling/config.json", "../x", "CON", "a\\b", "x "),
        ),
        "pattern": (_pattern, ("q_proj", "layers.[01].*", "*a*b*c", "unet:*", "[!q]*", "attention", "mlp,q_proj")),
        "layers": (_layers, ("0-3", "0", "0,0,0", "-1", "0-0,0", "all", "1-")),
        "vocabulary": (_vocabulary, ("trim", "pad=64", "trim=/dev/null", "pad=0", "pad=1e3")),
        "budget": (_budget, ("20MB", "512KiB", "2M", "300000", "1e9", "0.5g")),
        "device": (devices_of, ("cpu", "cpu,cpu", "cuda:0", "cuda:0,1", "auto", "cuda:all")),
    }
    return [
        Target(
            f"text:{name}",
            partial(_executed, execute),
            partial(_seeds, texts),
            on_disk=False,
            share=3 if name in QUICK else 0.5,
            quick=name in QUICK,
        )
        for name, (execute, texts) in kinds.items()
    ]


def _seeds(texts: Sequence[str]) -> Sequence[Seed]:
    world_folder()
    return [Seed(text, {"text": text.encode("utf-8", "surrogatepass")}) for text in texts]


def _executed(execute: Callable[[str], object], case: Case) -> str:
    text = case.raw.decode("utf-8", "surrogateescape")
    execute(text)
    return "read"


def _reference(text: str) -> None:
    where = to_path(text)
    if isinstance(where, RemotePath):
        assert where.key == where.key.strip("/")
        return
    named = parse_hub_name(text)
    if named is not None:
        assert ".." not in (named.file or "").split("/")
        return
    resolve(text)
    open_reference(text)


def _shown(text: str) -> None:
    for safe in (show(text), show(text, 40), clean(text), markdown(text), markdown_code(text)):
        assert safe.isprintable()
    assert len(show(text, 40)) <= 40 * 10
    assert "`" not in markdown_code(text).strip("`")
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"}.intersection(map(category, verbatim(text).translate({9: 32, 10: 32})))
    json.dumps(encodable(text)).encode()
    encodable(text).encode()
    local_name(text)
    closest(text, ["model", "layers", text])
    as_markdown(show(text), ())


def _name(text: str) -> None:
    if is_safe_name(text):
        parts = text.split("/")
        assert len(parts) <= 2
        assert not {"", ".", ".."}.intersection(parts)
        assert not {"\\", "\0"}.intersection(text)


def _pattern(text: str) -> None:
    at = world_folder()
    base = open_checkpoint(at / "base").main
    Selection(only=(text,)).keeps(next(iter(read_adapter(at / "lora").updates)))
    assert chosen_modules(linear_modules(base), text, base)


def _layers(text: str) -> None:
    checkpoint = open_checkpoint(world_folder() / "base")
    option = ("keep", "repeat", "drop")[len(text) % 3]
    rebuild(checkpoint, **{option: text})


def _vocabulary(text: str) -> None:
    rebuild(open_checkpoint(world_folder() / "base"), vocab=text)


def _budget(text: str) -> None:
    assert Budget.parse(text).limit > 0
