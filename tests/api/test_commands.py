# SPDX-License-Identifier: Apache-2.0
"""Each command is a function of the same name with parameters of the same names, and the other way round."""

from __future__ import annotations

import importlib
import inspect

import click
import pytest

import surgery
from surgery_cli.group import COMMANDS
from surgery_cli.options import global_options

ONLY_A_COMMAND = {"completion"}
ONLY_A_FUNCTION = {"open"}
RANK = {"rank": "rank", "energy": "rank", "max_error": "rank", "budget": "rank", "rank_pattern": "rank"}
SAMPLING = dict.fromkeys(("temperature", "top_k", "top_p", "seed"), "sampling")

# Options that are called, or grouped, otherwise than the parameters; None: the command alone has it.
OTHERWISE: dict[str, dict[str, str | None]] = {
    "extract-lora": RANK,
    "convert": {"as_kind": "as_lora", "energy": "rank", "max_error": "rank", "alpha": None},
    "merge": {"alpha": None},  # `open(path, alpha=...)`
    "check": {"energy": "rank", "max_error": "rank"},
    "combine": RANK,
    "resize": RANK,
    "run": {
        "texts": "inputs",
        "pairs": "inputs",
        "batch": "inputs",
        "ids": "inputs",
        "no_prompt": "prompt",
        **SAMPLING,
    },
    "bench": {"no_cuda_graph": "cuda_graph"},
    "export-onnx": {"mode": None},
    "inspect": {"depth": None, "every": None, "alpha": None},
    "diff": {"fail_on": None},
    "prompt transfer": {"text_file": "texts", "ids": "texts"},
    "prompt nearest": {"text_file": "texts", "ids": "texts"},
}
PAGES = {"html_file", "csv_file", "md_file"}  # of a summary, which has a method for each
PUSH = {"push", "private", "commit_message"}  # of a finished output, whatever made it
CALLBACKS = {"progress", "on_text"}

GROUPS = {"prompt"}
"""Commands with commands of their own: `surgery prompt show` is the function `prompt_show`."""


def command_of(name: str) -> click.Command:
    """A command by its words."""
    first, *rest = name.split()
    command = importlib.import_module(f"surgery_cli.commands.{first.replace('-', '_')}").command
    return command.commands[rest[0]] if rest else command


VERBS = [
    verb
    for name in COMMANDS
    if name not in ONLY_A_COMMAND
    for verb in ([f"{name} {each}" for each in command_of(name).commands] if name in GROUPS else [name])
]


def function_name(verb: str) -> str:
    return verb.replace("-", "_").replace(" ", "_")


def test_every_command_is_a_function_and_every_function_a_command():
    functions = {name for name in surgery.__all__ if inspect.isfunction(getattr(surgery, name))}
    assert functions - ONLY_A_FUNCTION == {function_name(name) for name in VERBS}


@pytest.mark.parametrize("name", VERBS)
def test_options_of_a_command_are_parameters_of_its_function(name: str):
    options = {option.name for option in command_of(name).params} - {option.name for option in global_options()} - PUSH
    parameters = inspect.signature(getattr(surgery, function_name(name))).parameters
    if options & PAGES:
        options -= {*PAGES, *({"overwrite"} - set(parameters))}
    names = {OTHERWISE.get(name, {}).get(option, option) for option in options} - {None}
    assert names == set(parameters) - CALLBACKS
    assert not [option for option in OTHERWISE.get(name, {}) if option in parameters and option != "rank"]


@pytest.mark.parametrize("name", VERBS)
def test_what_is_no_input_is_passed_by_name(name: str):
    """So that adding a parameter breaks no caller."""
    parameters = inspect.signature(getattr(surgery, function_name(name))).parameters.values()
    positional = [one.name for one in parameters if one.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(positional) <= 2
    assert not {"rank", "dtype", "overwrite", "progress"} & set(positional)
    assert name == "verify" or "output" not in positional
