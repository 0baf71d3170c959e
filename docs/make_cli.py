# SPDX-License-Identifier: Apache-2.0
"""Writes docs/cli.md, and the manual pages in docs/man, from the commands' own ``--help``, so that they cannot differ.

``python docs/make_cli.py`` rewrites them; with ``--check`` it ends with exit code 1 if one is out of date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from surgery._version import __version__
from surgery_cli.group import COMMANDS, surgery

__all__ = ["MAN", "PAGE", "pages", "render"]

PAGE = Path(__file__).resolve().parent / "cli.md"
MAN = Path(__file__).resolve().parent / "man"
_WIDTH = 80  # of help texts; fixed, so that the page does not depend on anybody's terminal
_HEAD = """\
# The command line

Made from `surgery --help` by `python docs/make_cli.py`; do not edit.

`REF`, `BASE` and `ADAPTER` are local paths first: a file or folder of that name always wins. Names of the Hugging Face
hub are `hf://org/name[@revision][:file]`, or `org/name` where nothing local has that name. Data goes to stdout;
progress, hints, warnings and errors go to stderr. With `--json` stdout holds one JSON object with `schema_version`,
`command` and `result`, as `--json-schema` describes it, and an error is one JSON object on stderr.
"""


def render() -> str:
    """The whole page."""
    top = click.Context(surgery, info_name="surgery", terminal_width=_WIDTH, **surgery.context_settings)
    parts = [_HEAD, *_section("surgery", surgery, top)]
    for name in COMMANDS:
        command = surgery.get_command(top, name)
        assert command is not None
        context = click.Context(command, top, name, terminal_width=_WIDTH)
        parts += _section(f"surgery {name}", command, context)
        if isinstance(command, click.Group):
            for inner, each in command.commands.items():
                below = click.Context(each, context, inner, terminal_width=_WIDTH)
                parts += _section(f"surgery {name} {inner}", each, below)
    return "\n".join(parts)


def _section(title: str, command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## {title}\n"
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"```\n{text}\n```\n"


def pages() -> dict[str, str]:
    """The text of every page by the name of its file."""
    top = click.Context(surgery, info_name="surgery", **surgery.context_settings)
    found = {"surgery.1": _manual("surgery", surgery, top)}
    for name in COMMANDS:
        command = surgery.get_command(top, name)
        assert command is not None
        context = click.Context(command, top, name)
        found[f"surgery-{name}.1"] = _manual(f"surgery {name}", command, context)
        for inner, each in command.commands.items() if isinstance(command, click.Group) else ():
            below = click.Context(each, context, inner)
            found[f"surgery-{name}-{inner}.1"] = _manual(f"surgery {name} {inner}", each, below)
    return found


def _manual(title: str, command: click.Command, context: click.Context) -> str:
    dashed = title.replace(" ", "-")
    lines = [f'.TH "{dashed.upper()}" "1" "" "surgery {__version__}" "surgery manual"', ".SH NAME"]
    lines += [f"{_roff(dashed)} \\- {_roff(command.get_short_help_str(200))}", ".SH SYNOPSIS", f".B {_roff(title)}"]
    lines += [
        _roff(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(command.help or ""),
    ]
    lines += [".SH OPTIONS"]
    for parameter in command.get_params(context):
        names, told = parameter.get_help_record(context) or ("", "")
        if told:
            lines += [".TP", f".B {_roff(names)}", _roff(" ".join(told.split()))]
    inner = COMMANDS if command is surgery else {}
    if isinstance(command, click.Group) and command is not surgery:
        inner = {name: each.get_short_help_str(200) for name, each in command.commands.items()}
    if inner:
        lines.append(".SH COMMANDS")
    for name, told in inner.items():
        lines += [".TP", f".B {_roff(f'{dashed}-{name}')}(1)", _roff(told)]
    if command.epilog:
        lines += [".SH NOTES", *_paragraphs(command.epilog)]
    if command is not surgery:
        lines += [".SH SEE ALSO", f".BR {_roff(dashed.rpartition('-')[0] if ' ' in title[8:] else 'surgery')} (1)"]
    return "\n".join(line for line in lines if line) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Click's help as roff; what stands behind a backspace, click's mark for it, keeps its lines."""
    for number, part in enumerate(inspect.cleandoc(text).split("\n\n")):
        lines = [line.rstrip() for line in part.strip("\n").splitlines()]
        kept = bool(lines) and lines[0].strip() == "\b"
        if number:
            yield ".PP"
        yield from (".nf", *map(_roff, lines[1:]), ".fi") if kept else (_roff(" ".join(map(str.strip, lines))),)


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main() -> int:
    """Write the pages, or say whether they are current."""
    wanted = {PAGE: render()} | {MAN / name: text for name, text in pages().items()}
    if "--check" in sys.argv[1:]:
        there = set(MAN.glob("*")) | {PAGE}
        return int(
            there != set(wanted) or any(page.read_text(encoding="utf-8") != text for page, text in wanted.items())
        )
    MAN.mkdir(exist_ok=True)
    for page in set(MAN.glob("*")) - set(wanted):
        page.unlink()
    for page, text in wanted.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
