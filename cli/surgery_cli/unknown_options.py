# SPDX-License-Identifier: Apache-2.0
"""What is meant by an option that a command does not have: an argument of it, an option spelt nearly so, another command's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import click

from surgery_formats.text import listing, show

__all__ = ["hint_for_option"]

_LIKENESS = 0.75  # of difflib: `outptu` for `output` has 0.83; `adapter` for `dtype`, which click suggests, 0.5
_SHORTEST = 3  # letters of the beginning of a name

_FIELD = {
    "adapter": ("what", "ref"),
    "base-model": ("base", "model"),
    "force": ("overwrite",),
    "format": ("to",),
    "jobs": ("workers", "threads"),
    "lora": ("adapter", "what", "ref"),
    "lora-alpha": ("alpha",),
    "model": ("base", "ref", "out"),
    "num-threads": ("threads", "workers"),
    "num-workers": ("workers", "threads"),
    "peft": ("adapter", "what", "ref"),
    "precision": ("dtype",),
    "save": ("output",),
    "scale": ("weight",),
    "strength": ("weight",),
    "threads": ("workers",),
    "torch-dtype": ("dtype",),
    "weights": ("weight",),
}
"""Words of other programs, which are no slips, and what is called otherwise here."""


def hint_for_option(name: str, ctx: click.Context) -> str | None:
    """What to write for the option `name` that the command of `ctx` lacks; None if nothing is like it.

    An argument of the command comes first, then an option of it, then the commands that have just this option.
    """
    word = name.lstrip("-")
    words = (word, *_FIELD.get(word, ()))
    if any(each in _words(metavar) for each in words for metavar in _arguments(ctx)):
        return f"it is an argument here: {ctx.command_path} {' '.join(_arguments(ctx))}"
    own = [option.removeprefix("--") for option in _options(ctx.command) if option.startswith("--")]
    near = next((each for each in words if each in own), None) or _part(word, own)
    others = [path for path, command in _commands(ctx.find_root()) if name in _options(command)]
    if near is None and word not in _FIELD and not others:
        near = next(iter(difflib.get_close_matches(word, own, n=1, cutoff=_LIKENESS)), None)
    if near is not None:
        return f"did you mean '--{near}'?"
    if not others:
        return None
    after = "; options come after the command" if isinstance(ctx.command, click.Group) else ""
    return f"'{show(name)}' is an option of {listing(others)}{after}"


def _arguments(ctx: click.Context) -> list[str]:
    """The metavars of a command's arguments: ``[ADAPTER[=WEIGHT]]...``."""
    return [param.make_metavar(ctx) for param in ctx.command.params if isinstance(param, click.Argument)]


def _words(metavar: str) -> list[str]:
    return re.findall("[a-z]+", metavar.lower())


def _options(command: click.Command) -> list[str]:
    params = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    return [name for param in params for name in (*param.opts, *param.secondary_opts)]


def _part(word: str, options: list[str]) -> str | None:
    """The shortest option that `word` begins, or else is the last word of: ``out`` of ``output``, ``dtype`` of ``adapter-dtype``."""
    if len(word) < _SHORTEST:
        return None
    begun = [option for option in options if option.startswith(word) and "-" not in option[len(word) :]]
    return min(begun or [option for option in options if option.endswith(f"-{word}")], key=len, default=None)


def _commands(root: click.Context, *above: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group with its name, ``prompt bake``."""
    group = root.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        if isinstance(command, click.Group):
            yield from _commands(click.Context(command, parent=root), *above, name)
        elif command is not None:
            yield " ".join((*above, name)), command
