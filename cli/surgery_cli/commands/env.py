# SPDX-License-Identifier: Apache-2.0
"""``surgery env``."""

from __future__ import annotations

import click

from surgery_cli.options import Settings
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, pairs, warn
from surgery_formats.text import nbytes, show

__all__ = ["command"]


@sub_command("env")
@click.option("--deep", is_flag=True, help="Import torch and onnxruntime too, to see what they can use.")
def command(settings: Settings, deep: bool) -> None:
    """Show versions and devices, for bug reports.

    Nothing is sent anywhere; no path and no name of this machine is shown.
    """
    from surgery.verbs.env import env

    found = env(deep=deep)
    if settings.json:
        emit_json("env", found.as_json())
    else:
        memory = "" if found.memory_nbytes is None else f", {nbytes(found.memory_nbytes)} of memory"
        pairs(
            [
                ("surgery", found.version),
                ("python", found.python),
                ("platform", show(found.platform)),
                ("machine", f"{found.cores} cores{memory}"),
                *(("gpu", f"{show(gpu.name)}, {nbytes(gpu.nbytes)}, driver {show(gpu.driver)}") for gpu in found.gpus),
                *((package.name, package.version or "not installed") for package in found.packages),
                *((f"{name} says", text) for name, text in found.deep.items()),
            ]
        )
    for finding in found.findings:
        warn(f"{finding.what}; cure: {finding.cure}")
