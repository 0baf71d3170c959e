# SPDX-License-Identifier: Apache-2.0
"""Options that say where the work is done: devices, threads, this machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from surgery_cli.values import count
from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show
from surgery_formats.threads import MOST_THREADS

__all__ = ["device", "device_option", "devices", "devices_option", "engine", "runtime_device_option", "threads"]

F = TypeVar("F", bound=Callable[..., Any])


def _runtime_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    name, colon, index = value.partition(":")
    if name not in ("auto", "cpu", "cuda") or (colon and (name != "cuda" or not index.isdecimal() or len(index) > 3)):
        raise click.BadParameter(f"'{show(value)}' is none of auto, cpu, cuda, cuda:N")
    return value


def devices(text: str) -> str:
    """One device, or several GPUs.

    Raises:
        click.BadParameter: not devices, or not on this machine.
    """
    if text in ("cpu", "auto"):
        return text
    context = click.get_current_context(silent=True)
    if text == "cuda" and context is not None and context.params.get("engine"):
        return text  # of a worker, not of this machine
    from surgery.engine.devices import devices_of

    try:
        devices_of(text)
    except FitError as error:
        raise click.BadParameter("; ".join(filter(None, (error.message, error.hint)))) from error
    return text


def device(text: str) -> str:
    """A device that is there.

    Raises:
        click.BadParameter: not a device, or not on this machine.
    """
    if "," in text or text == "cuda:all":
        raise click.BadParameter(f"'{show(text)}' is none of cpu, cuda, cuda:N, auto")
    return devices(text)


def _device_option(metavar: str, help: str, default: str = "cpu", **check: Any) -> Callable[[F], F]:
    return click.option("--device", default=default, show_default=True, metavar=metavar, help=help, **check)


device_option = _device_option(
    "cpu|cuda[:N]|auto", "Where the arithmetic runs; auto: the CPU, sooner done.", type=device
)
"""Checked before anything is read."""
devices_option = _device_option(
    "cpu|cuda[:N[,N...]]|cuda:all|auto",
    "Where the arithmetic runs; auto: on GPUs from 1 B parameters.",
    type=devices,
)
runtime_device_option = _device_option(
    "auto|cpu|cuda[:N]",
    "Where it runs; auto: what the graph was made for, if it is here.",
    "auto",
    callback=_runtime_device,
)
"""The device of onnxruntime: whether it is there is looked up by the library, without torch."""


def _engine(ctx: click.Context, param: click.Parameter, value: str) -> str | None:
    if value == "local":
        return None
    from surgery.engine.shares.choice import cluster_of

    try:
        cluster_of(value)
    except UsageError as error:
        raise click.BadParameter("; ".join(filter(None, (error.message, error.hint)))) from error
    return value


engine = click.option(
    "--engine",
    default="local",
    show_default=True,
    is_eager=True,
    metavar="local|ray[:HOST:PORT]",
    callback=_engine,
    help="Where weights are computed: here, or on a Ray cluster (docs/scale-out.md).",
)
"""Eager, for ``--device``: a cluster has devices of its own."""


def threads(name: str, help: str) -> Callable[[F], F]:
    """``--workers`` or ``--threads``: a number that starts as many, so that a slip of the hand must not count."""
    return click.option(name, type=count(most=MOST_THREADS), help=help)
