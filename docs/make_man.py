# SPDX-License-Identifier: Apache-2.0
"""Manual pages from the commands' own help: ``docs/man/surgery-merge.1`` and the others, installed with the wheel.

``python docs/make_cli.py`` writes them together with docs/cli.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from surgery._version import __version__
from surgery_cli.group import COMMANDS, surgery

__all__ = ["FOLDER", "pages"]

FOLDER = Path(__file__).resolve().parent / "man"
_SURGERY = "surgery"


def pages() -> dict[str, str]:
    """The text of every page by the name of its file."""
    top = click.Context(surgery, info_name=_SURGERY, **surgery.context_settings)
    found = {f"{_SURGERY}.1": _page(_SURGERY, surgery, top)}
    for name in COMMANDS:
        command = surgery.get_command(top, name)
        assert command is not None
        context = click.Context(command, top, name)
        found[f"{_SURGERY}-{name}.1"] = _page(f"{_SURGERY} {name}", command, context)
        for inner, each in command.commands.items() if isinstance(command, click.Group) else ():
            below = click.Context(each, context, inner)
            found[f"{_SURGERY}-{name}-{inner}.1"] = _page(f"{_SURGERY} {name} {inner}", each, below)
    return found


def _page(title: str, command: click.Command, context: click.Context) -> str:
    dashed = title.replace(" ", "-")
    lines = [f'.TH "{dashed.upper()}" "1" "" "surgery {__version__}" "surgery manual"', ".SH NAME"]
    lines += [f"{_text(dashed)} \\- {_text(command.get_short_help_str(200))}", ".SH SYNOPSIS", f".B {_text(title)}"]
    lines += [
        _text(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(command.help or ""),
    ]
    lines += [".SH OPTIONS"]
    for parameter in command.get_params(context):
        names, told = parameter.get_help_record(context) or ("", "")
        if told:
            lines += [".TP", f".B {_text(names)}", _text(" ".join(told.split()))]
    inner = COMMANDS if command is surgery else {}
    if isinstance(command, click.Group) and command is not surgery:
        inner = {name: each.get_short_help_str(200) for name, each in command.commands.items()}
    if inner:
        lines.append(".SH COMMANDS")
    for name, told in inner.items():
        lines += [".TP", f".B {_text(f'{dashed}-{name}')}(1)", _text(told)]
    if command.epilog:
        lines += [".SH NOTES", *_paragraphs(command.epilog)]
    if command is not surgery:
        lines += [".SH SEE ALSO", f".BR {_text(dashed.rpartition('-')[0] if ' ' in title[8:] else _SURGERY)} (1)"]
    return "\n".join(line for line in lines if line) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Click's help as roff; what stands behind a backspace, click's mark for it, keeps its lines."""
    for number, part in enumerate(inspect.cleandoc(text).split("\n\n")):
        lines = [line.rstrip() for line in part.strip("\n").splitlines()]
        kept = bool(lines) and lines[0].strip() == "\b"
        if number:
            yield ".PP"
        yield from (".nf", *map(_text, lines[1:]), ".fi") if kept else (_text(" ".join(map(str.strip, lines))),)


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
