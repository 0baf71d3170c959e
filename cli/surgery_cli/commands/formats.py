# SPDX-License-Identifier: Apache-2.0
"""``surgery formats``."""

from __future__ import annotations

from surgery_cli.options import Settings, subcommand
from surgery_cli.output import show_result

__all__ = ["command"]


@subcommand("formats")
def command(settings: Settings) -> None:
    """List the adapter formats, and which of them can be written.

    And the containers of models, the model families whose names are known, and the kinds of update that can be merged.
    """
    from surgery.verbs.formats import formats

    show_result("formats", formats(), settings, data=True)
