# SPDX-License-Identifier: Apache-2.0
"""The table of sub-commands.

Nothing of a command is imported until it is the one asked for, so that help and completion are quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from surgery_cli.errors import guarded
from surgery_cli.options import Settings, global_options
from surgery_formats.system import check_system
from surgery_formats.text import closest, show

__all__ = ["COMMANDS", "COMPLETE", "SurgeryGroup", "surgery"]

COMMANDS = {
    "merge": "Merge adapters into a base model.",
    "unmerge": "Take a merge back.",
    "extract-lora": "Extract a LoRA from a full fine-tune.",
    "insert": "Insert trained tensors or adapters into a model or graph; begin new ones.",
    "locate": "Find a checkpoint's weights in an ONNX graph.",
    "fold": "Fold the LoRA branches of an ONNX graph into the weights beside them.",
    "strip": "Take the exporting machine's paths and lines of source out of an ONNX graph.",
    "convert": "Convert an adapter to another format, or a graph's weights to safetensors.",
    "combine": "Combine adapters into one.",
    "resize": "Lower the rank of an adapter.",
    "layers": "Write a model with other layers, projections or rows.",
    "export-onnx": "Export a model as ONNX graphs that use its weight files as they are.",
    "verify": "Verify an output: its bytes, and what a graph computes.",
    "eval": "Measure how well a model predicts a text: bits per byte.",
    "fingerprint": "Show one hash of what a model, an adapter or a graph holds.",
    "check": "Show what programs make of an adapter.",
    "inspect": "Show what a model, an adapter or an ONNX graph is made of.",
    "diff": "Show what differs between two models, two adapters or two ONNX graphs.",
    "report": "Report what adapters save in parameters and storage.",
    "run": "Run an exported model: generate text, or classify it.",
    "bench": "Measure an exported model: load, prefill, time per token, memory.",
    "prompt": "Show, read, bake, combine, convert and transfer soft prompts.",
    "apply": "Apply a recipe: several commands in one.",
    "formats": "List the adapter formats, and which of them can be written.",
    "env": "Show versions and devices, for bug reports.",
    "completion": "Print the completion script of a shell.",
}
"""In order of use. Each line is the first line of the command's own help."""

_TASKS = {
    "Change a model": ("merge", "unmerge", "extract-lora", "insert", "layers"),
    "Change adapters": ("convert", "combine", "resize", "prompt"),
    "Make and change ONNX graphs": ("export-onnx", "run", "bench", "locate", "fold", "strip"),
    "Look and prove": ("inspect", "diff", "report", "check", "verify", "fingerprint"),
}
"""Commands by what they are for; the others come last."""

COMPLETE = "_SURGERY_COMPLETE"  # click's name for it; the scripts of ``surgery completion`` set it

_EPILOG = """\b
Exit codes: 0 done; 1 internal error; 2 usage; 3 input missing, unreadable or
malformed; 4 does not fit; 5 proof failed; 6 findings (diff --fail-on,
check --for, fingerprint --against); 7 not enough disk or memory, or a bucket or
hub that refuses; 130 interrupted.
"""


class SurgeryGroup(click.Group):
    """A group whose commands are names in a table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command called `cmd_name`, if the table has it."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"surgery_cli.commands.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command as click does, with a "did you mean" from the table."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            hint = closest(name, [known for known in COMMANDS if known.startswith(name)] or COMMANDS)
            raise click.UsageError(f"no command '{show(name)}'" + (f"; {hint}" if hint else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table by tasks, without importing what it names."""
        told = {name for names in _TASKS.values() for name in names}
        width = max(map(len, COMMANDS))  # one column for all sections
        for task, names in {**_TASKS, "Other": tuple(name for name in COMMANDS if name not in told)}.items():
            with formatter.section(task):
                formatter.write_dl([(name.ljust(width), COMMANDS[name]) for name in names])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names out of the table, then options."""
        names = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Do what was asked for, where the system can."""
        check_system()  # before a module is imported that would fail at it
        return super().invoke(ctx)

    def main(  # type: ignore[override]  # always leaves through the one error map
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run one command line and exit with its code."""
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or "surgery"
        if instruction := os.environ.get(COMPLETE):
            sys.exit(shell_complete(self, {}, name, COMPLETE, instruction))
        settings = Settings()

        def work() -> None:
            with self.make_context(name, words, obj=settings, **extra) as ctx:
                self.invoke(ctx)

        sys.exit(guarded(work, settings, words))


@click.group(
    cls=SurgeryGroup,
    params=global_options(),
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
def surgery() -> None:
    """Operate on model and adapter files: exact, accounted for, as fast as copying the file."""
