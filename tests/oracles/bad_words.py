# SPDX-License-Identifier: Apache-2.0
"""Command lines that are wrong by themselves: inputs that are not there, numbers that are none, options that do not go together.

They are made of `COMMANDS` and of the options that the commands have, so that a new command or option gets its cases with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import click

from surgery_cli.group import COMMANDS as TABLE
from surgery_cli.group import surgery
from tests.oracles.bad_inputs import COMMANDS

__all__ = ["WORDS", "Words"]

_INPUT = re.compile(r"\{(?!out\})(\w+)\}")


@dataclass(frozen=True)
class Words:
    """One command line.

    Attributes:
        name: Of the case.
        words: What follows ``surgery``, with the names of inputs in braces; ``{place}`` is an empty folder, ``{out}`` an output in it.
        codes: Exit codes that are right.
        mentions: Each must be in the message.
    """

    name: str
    words: tuple[str, ...]
    codes: tuple[int, ...]
    mentions: tuple[str, ...] = ()


def _inputs(line: str, turn: int) -> Iterator[Words]:
    """One line without one of its inputs, and with one that no file is called."""
    odd = ("", "\udcff\udcfe", "x\0y", "n" * 5000, "a\nerror: b", "\x1b[31mx", "/dev/null", "{place}")
    for number, match in enumerate(_INPUT.finditer(line)):
        left, right = line[: match.start()], line[match.end() :]
        yield Words(
            f"without {match[1]}: {line}", tuple((left + "{place}/absent" + right).split()), (2, 3, 4), ("absent",)
        )
        given = odd[(turn + number) % len(odd)]
        words = tuple("".join((word, given)) if False else word for word in (left + "\1" + right).split())
        yield Words(
            f"{given[:10]!a} as {match[1]}: {line}", tuple(word.replace("\1", given) for word in words), (2, 3, 4)
        )


_NO_NUMBERS = ("x", "", "-1", "nan", "1e400", "9" * 40)


def _options() -> Iterator[Words]:
    """Every option that takes a number, with what is none, or none that it can be."""
    for line in COMMANDS:
        words = line.split()
        name = " ".join(words[:2]) if words[0] == "prompt" else words[0]
        if name in _seen:
            continue
        _seen.add(name)
        command: click.Command | None = surgery.get_command(click.Context(surgery), words[0])
        assert command is not None
        if isinstance(command, click.Group):
            command = command.commands[words[1]]
        for option in command.params:
            kind = getattr(option.type, "name", "")
            if isinstance(option, click.Option) and not option.is_flag and kind in _NUMBERS:
                for text in _NO_NUMBERS if kind != "parse" else _NO_NUMBERS[:-1]:  # a number of 40 digits is one
                    yield Words(
                        f"{name} {option.opts[-1]} {text[:8]!r}",
                        (*words, option.opts[-1], text),
                        (2,),
                        (option.opts[-1],),
                    )


_NUMBERS = ("integer", "parse", "share", "true_share", "size")
_seen: set[str] = set()


def _of_all() -> Iterator[Words]:
    for name in TABLE:
        yield Words(f"{name} --frob", (name, "--frob"), (2,), ("--frob",))
        yield Words(f"{name} with one word too many", (name, *["x"] * 40), (2, 3, 4))
    yield Words("a command that is none", ("mergee",), (2,), ("mergee",))
    yield Words("a command of a terminal", ("\x1b[2J",), (2,), ("\\x1b",))


WORDS: tuple[Words, ...] = (
    *_of_all(),
    *(case for turn, line in enumerate(COMMANDS) for case in _inputs(line, turn)),
    *_options(),
)
