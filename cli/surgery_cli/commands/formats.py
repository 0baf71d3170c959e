# SPDX-License-Identifier: Apache-2.0
"""``surgery formats``."""

from __future__ import annotations

import click

from surgery_cli.options import Settings
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, table

__all__ = ["command"]


@sub_command("formats")
def command(settings: Settings) -> None:
    """List the adapter formats that can be read and written.

    And the containers of models, the model families whose names are known, and the kinds of update that can be merged.
    """
    from surgery.verbs.formats import formats

    found = formats()
    if settings.json:
        emit_json("formats", found.as_json())
        return
    table(
        ("adapter format", "title", "as", "to write it"),
        (
            (
                one.name,
                one.title + ("" if one.built_in else " (plugin)"),
                "file" if one.single_file else "folder",
                "needs --base" if one.needs_base else "",
            )
            for one in found.formats
        ),
    )
    click.echo()
    table(
        ("container", "files", "read", "written"),
        ((one.name, one.files, _yes(one.reads), _yes(one.writes)) for one in found.containers),
    )
    click.echo()
    table(
        ("family", "to ONNX", "model types"),
        ((one.name, _yes(one.graphs), ", ".join(one.model_types)) for one in found.families),
    )
    click.echo()
    table(("update", "equation"), ((one.name, one.equation or one.title) for one in found.updates))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
