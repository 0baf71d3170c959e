# SPDX-License-Identifier: Apache-2.0
"""``surgery completion``."""

from __future__ import annotations

import sys

import click

from surgery_cli.options import Settings, subcommand
from surgery_cli.output import emit_json

__all__ = ["command"]

_INSTALL = {
    "bash": "surgery completion bash > ~/.local/share/bash-completion/completions/surgery",
    "zsh": "surgery completion zsh > a file that your ~/.zshrc sources",
    "fish": "surgery completion fish > ~/.config/fish/completions/surgery.fish",
    "powershell": "surgery completion powershell >> $PROFILE",
}


@subcommand("completion")
@click.argument("shell", type=click.Choice(sorted(_INSTALL)))
def command(settings: Settings, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      surgery completion bash > ~/.local/share/bash-completion/completions/surgery
      surgery completion fish > ~/.config/fish/completions/surgery.fish
    """
    from click.shell_completion import get_completion_class

    from surgery_cli.group import COMPLETE, surgery

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this version of click cannot complete in {shell}; update it")
    script = kind(surgery, {}, "surgery", COMPLETE).source()
    if settings.json:
        emit_json("completion", {"shell": shell, "script": script})
        return
    click.echo(script)
    if not settings.quiet and sys.stdout.isatty():  # into a file it is being installed
        click.echo(f"install it: {_INSTALL[shell]}", err=True)
