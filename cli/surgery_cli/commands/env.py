# SPDX-License-Identifier: Apache-2.0
"""``surgery env``."""

from __future__ import annotations

import click

from surgery_cli.options import Settings, subcommand
from surgery_cli.output import show_result

__all__ = ["command"]


@subcommand("env")
@click.option("--deep", is_flag=True, help="Import torch and onnxruntime too, to see what they can use.")
def command(settings: Settings, deep: bool) -> None:
    """Show versions and devices, for bug reports.

    Nothing is sent anywhere; no path and no name of this machine is shown.
    """
    from surgery.verbs.env import env

    show_result("env", env(deep=deep), settings, data=True)
