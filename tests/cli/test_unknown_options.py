# SPDX-License-Identifier: Apache-2.0
"""An option that a command lacks: what is meant instead is near, or it is another command's, or nothing is suggested."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from surgery_cli.errors import fault_of
from surgery_cli.group import surgery

NEAR = {
    "--adapter": set(),
    "--alpha": set(),
    "--base": set(),
    "--base-model": {"--base"},
    "--device": set(),
    "--dtype": {"--adapter-dtype"},
    "--force": {"--overwrite"},
    "--format": {"--to"},
    "--fp16": set(),
    "--lora": {"--adapter"},
    "--method": set(),
    "--model": {"--base"},
    "--out": {"--output"},
    "--output": set(),
    "--outptu": {"--output"},
    "--quantize": {"--quantized"},
    "--rank": set(),
    "--scale": set(),
    "--text": {"--range-text"},
    "--threads": {"--workers"},
    "--to": set(),
    "--verbos": {"--verbose"},
    "--weight": {"--weights"},
}
"""Options that people write, and what may be suggested for each by any command that lacks it."""


def _commands(group: click.Group, above: click.Context | None = None) -> Iterator[click.Context]:
    context = click.Context(group, above, info_name="surgery" if above is None else group.name)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, context)
        else:
            yield click.Context(command, context, info_name=name)


def _hint(context: click.Context, word: str) -> str:
    command = context.command
    with pytest.raises(click.NoSuchOption) as refused:
        command.make_context(context.info_name, [word], parent=context.parent)
    fault = fault_of(refused.value)
    assert (fault.exit_code, fault.message) == (2, f"no such option '{word}'")
    assert fault.hint
    return fault.hint


@pytest.mark.parametrize("word", NEAR)
def test_a_suggestion_is_near_and_says_only_what_is_so(word: str) -> None:
    asked = 0
    for context in _commands(surgery):
        own = {name for param in context.command.params for name in param.opts}
        if word in own:
            continue
        asked += 1
        hint = _hint(context, word)
        if near := re.fullmatch("did you mean '(.*)'[?]", hint):
            assert near[1] in NEAR[word] & own, (context.command_path, hint)
        elif hint.startswith("it is an argument here"):
            assert hint.startswith(f"it is an argument here: {context.command_path} ")
        elif not hint.startswith("see '"):
            assert hint.startswith(f"'{word}' is an option of "), (context.command_path, hint)
    assert asked


@pytest.mark.parametrize(
    ("command", "word", "hint"),
    [
        ("merge", "--adapter", "it is an argument here: surgery merge BASE [ADAPTER[=WEIGHT]]..."),
        ("merge", "--lora", "it is an argument here: surgery merge BASE [ADAPTER[=WEIGHT]]..."),
        ("merge", "--scale", "it is an argument here: surgery merge BASE [ADAPTER[=WEIGHT]]..."),
        ("merge", "--model", "it is an argument here: surgery merge BASE [ADAPTER[=WEIGHT]]..."),
        ("inspect", "--lora", "it is an argument here: surgery inspect REF"),
        ("merge", "--out", "did you mean '--output'?"),
        ("check", "--force", "did you mean '--overwrite'?"),
        ("eval", "--lora", "did you mean '--adapter'?"),
        ("extract-lora", "--dtype", "did you mean '--adapter-dtype'?"),
        ("extract-lora", "--lora", "see 'surgery extract-lora --help'"),
        ("merge", "--method", "'--method' is an option of combine, prompt combine, prompt transfer"),
        ("layers", "--energy", "'--energy' is an option of extract-lora, convert, combine, resize and 1 more"),
        ("merge", "-p", "'-p' is an option of run, prompt nearest, prompt transfer"),
        ("merge", "--nothing-like-it", "see 'surgery merge --help'"),
    ],
)
def test_what_is_meant_is_named(command: str, word: str, hint: str) -> None:
    context = next(each for each in _commands(surgery) if each.info_name == command)
    assert _hint(context, word) == hint


def test_an_option_before_its_command_is_told_where_it_belongs() -> None:
    with pytest.raises(click.NoSuchOption) as refused:
        surgery.make_context("surgery", ["--energy", "0.9"])
    hint = fault_of(refused.value).hint
    assert hint is not None
    assert hint.endswith("; options come after the command")
