# SPDX-License-Identifier: Apache-2.0
"""What the library logs, on stderr."""

from __future__ import annotations

import logging

import click

from surgery_formats.text import clean

__all__ = ["show_logs"]


class _Handler(logging.Handler):
    """Writes records as lines; names out of files are escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(clean(f"{record.relativeCreated / 1000:8.3f} {record.name}: {record.getMessage()}"), err=True)


def show_logs(*, debug: bool) -> None:
    """Show what the library does, and with `debug` every step of it."""
    logger = logging.getLogger("surgery")
    logger.handlers = [_Handler()]  # one, however often a process runs a command
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
