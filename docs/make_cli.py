# SPDX-License-Identifier: Apache-2.0
"""Writes docs/cli.md, and the manual pages in docs/man, from the commands' own ``--help``, so that they cannot differ.

``python docs/make_cli.py`` rewrites them; with ``--check`` it ends with exit code 1 if one is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from make_man import FOLDER, pages

from surgery_cli.group import COMMANDS, surgery

__all__ = ["PAGE", "render"]

PAGE = Path(__file__).resolve().parent / "cli.md"
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


def main() -> int:
    """Write the pages, or say whether they are current."""
    wanted = {PAGE: render()} | {FOLDER / name: text for name, text in pages().items()}
    if "--check" in sys.argv[1:]:
        there = set(FOLDER.glob("*")) | {PAGE}
        return int(
            there != set(wanted) or any(page.read_text(encoding="utf-8") != text for page, text in wanted.items())
        )
    FOLDER.mkdir(exist_ok=True)
    for page in set(FOLDER.glob("*")) - set(wanted):
        page.unlink()
    for page, text in wanted.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
