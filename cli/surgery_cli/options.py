# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, as decorators; those of `engines` and the types of `values` can be had here too."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from surgery_cli.engines import (
    device_option,
    devices_option,
    engine,
    runtime_device_option,
    threads,
)
from surgery_cli.push import push_asked, push_options
from surgery_cli.values import OneOf, count, first_ids, number, rank_of, share, size, token_ids, true_share, weighted
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery_cli.page_files import Pages
    from surgery_cli.push import Push

__all__ = [
    "PATH",
    "Settings",
    "adapters",
    "alpha",
    "choice",
    "complete_files",
    "count",
    "device_option",
    "devices_option",
    "dry_run",
    "dtype",
    "engine",
    "first_ids",
    "format_option",
    "global_options",
    "number",
    "output",
    "overwrite",
    "path",
    "rank_of",
    "reference",
    "runtime_device_option",
    "share",
    "size",
    "subcommand",
    "texts",
    "threads",
    "token_ids",
    "told_alpha",
    "true_share",
    "verify",
    "weighted",
]

F = TypeVar("F", bound=Callable[..., Any])


class _PathType(click.Path):
    """A path that says something: an empty one, as of a variable that is not set, would be the working folder.

    No command reads or writes a stream, so a dash is a mistake. `Path` forgets a slash at the end, which a file does not have.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        if value == "-":
            self.fail("'-' is no path, and streams are not supported; a file of that name is ./-", param, ctx)
        if isinstance(value, str) and "\0" in value:
            self.fail("the path holds a zero byte", param, ctx)
        if isinstance(value, str) and value.endswith(os.sep) and os.path.isfile(value.rstrip(os.sep)):
            self.fail(f"'{show(value)}' is a file and no folder", param, ctx)
        return super().convert(value, param, ctx)


PATH = _PathType(path_type=Path)


@dataclass
class Settings:
    """The values of `global_options`, the files to write, and where the output is pushed.

    It is the same object before and after the sub-command.
    """

    json: bool = False
    verbose: int = 0
    quiet: bool = False
    debug: bool = False
    pages: Pages | None = None
    push: Push | None = None


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Absent is not false: the option may have been given on the other side of the sub-command."""
    if value and param.name:
        setattr(ctx.ensure_object(Settings), param.name, value)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from surgery._version import __version__

        click.echo(f"surgery {__version__}")
        ctx.exit()


def _json_schema(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        import json

        from surgery_cli.schemas import error_schema, schema_of

        command = ctx.command_path.partition(" ")[2]
        if command and isinstance(ctx.command, click.Group):
            raise click.UsageError("each of its commands has its own schema", ctx)
        click.echo(json.dumps(schema_of(command) if command else error_schema(), indent=2))
        ctx.exit()


def global_options() -> list[click.Parameter]:
    """``--json --json-schema -v -q --debug --version``: of the group and of every command, last in its help."""

    def flag(*names: str, help: str, callback: Callable[..., None] = _store, **kind: Any) -> click.Option:
        return click.Option(names, help=help, callback=callback, expose_value=False, is_eager=True, **kind)

    return [
        flag("--json", is_flag=True, help="Data as JSON on stdout, everything else on stderr."),
        flag("--json-schema", is_flag=True, help="Show the JSON Schema of --json and exit.", callback=_json_schema),
        flag("-v", "--verbose", count=True, help="Show more; twice: what is done, too."),
        flag("-q", "--quiet", is_flag=True, help="No progress, summary or hints; a dry run still says what it found."),
        flag("--debug", is_flag=True, help="Show tracebacks, and what is done."),
        flag("--version", is_flag=True, help="Show the version and exit.", callback=_version),
    ]


def subcommand(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A sub-command: it takes the global options and gets `Settings` as its first argument."""

    def wrap(function: Callable[..., None]) -> click.Command:
        help_names = {"help_option_names": ["-h", "--help"]}  # click keeps the first option it makes for a context
        command = click.command(name, context_settings=help_names)(click.pass_obj(_logged(function)))
        command.params += global_options()
        return command

    return wrap


def _logged(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, whose first argument says whether what the library logs is shown, and where its output is pushed."""

    @wraps(function)
    def call(settings: Settings, *args: Any, **kwargs: Any) -> None:
        if settings.debug or settings.verbose > 1:
            from surgery_cli.logs import show_logs

            show_logs(debug=settings.debug)
        words = click.get_current_context().command_path.partition(" ")[2]
        settings.push = push_asked(words, kwargs, quiet=settings.quiet or settings.json)
        function(settings, *args, **kwargs)

    return call


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """References are mostly files and folders: the shell completes those itself."""
    return [CompletionItem(incomplete, type="file")]


def adapter_format(text: str) -> str:
    """A format's name, plugins' included; ``safetensors`` is that of a graph's weights.

    Raises:
        click.BadParameter: there is no such format.
    """
    from surgery.consumers.registry import consumers
    from surgery_formats.adapters.registry import formats
    from surgery_formats.text import closest, listing

    if text not in (*formats(), "safetensors"):
        if text.partition("@")[0] in consumers():
            hint = f"{show(text)} is a program: --for {show(text)} writes what it honours"
        else:
            hint = closest(text, formats()) or f"there are {listing(sorted(formats()), 30)}"
        raise click.BadParameter(f"no adapter format '{show(text)}'; {hint}")
    return text


def format_option(help: str, **more: Any) -> Callable[[F], F]:
    """``--to``, a format to write."""
    return click.option(
        "--to", type=adapter_format, metavar="FORMAT", shell_complete=complete_formats, help=help, **more
    )


def complete_formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of formats that begin so."""
    from surgery_formats.adapters.registry import formats

    return [CompletionItem(name) for name in (*formats(), "safetensors") if name.startswith(incomplete)]


def reference(name: str, *, metavar: str, help: str) -> Callable[[F], F]:
    """An option that names a model or an adapter."""
    return click.option(name, metavar=metavar, shell_complete=complete_files, help=help)


def path(*names: str, metavar: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that is a file or folder; whether it is there is seen where it is opened."""
    return click.option(*names, type=PATH, metavar=metavar, help=help, **more)


def output(help: str, *, rehearsed: bool = True) -> Callable[[F], F]:
    """``-o/--output``, required but for a dry run where the command has `rehearsed` ones, and ``--push``."""
    needed = f"{help}  [required, but for --dry-run]" if rehearsed else help
    option = click.option(
        "-o",
        "--output",
        metavar="OUT",
        required=not rehearsed,
        callback=_needed if rehearsed else None,
        type=PATH,
        help=needed,
    )

    def add(function: F) -> F:
        return option(push_options(function))

    return add


def dry_run(help: str) -> Callable[[F], F]:
    """``--dry-run``; eager, for ``--output`` to look at."""
    return click.option("--dry-run", is_flag=True, is_eager=True, help=help)


def alpha(function: F) -> F:
    """``--alpha``, of adapters whose files do not state it."""
    return click.option(
        "--alpha",
        type=number(above=0),
        metavar="NUMBER",
        help="lora_alpha of an ADAPTER whose file does not state it: PEFT's weights alone, torchtune, litgpt, loralib, NeMo, older MLX.",
    )(function)


def told_alpha(reference: str, alpha: float | None) -> Any:
    """An adapter as a verb takes it: opened, where an alpha was given."""
    if alpha is None:
        return reference
    from surgery.engine.inputs import open

    return open(reference, alpha=alpha)


def _needed(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is None and not ctx.params.get("dry_run") and not ctx.resilient_parsing:
        raise click.MissingParameter("--dry-run does without, and writes nothing", ctx=ctx, param=param)
    return value


def overwrite(what: str = "OUT") -> Callable[[F], F]:
    """``--overwrite``."""
    return click.option("--overwrite", is_flag=True, help=f"Replace {what} if it is there, atomically.")


def verify(help: str) -> Callable[[F], F]:
    """``--verify fast|full``, as whether copies are compared byte by byte."""
    return choice(
        "--verify",
        "verify_copies",
        values=("fast", "full"),
        help=help,
        callback=lambda ctx, param, value: value == "full",
    )


def choice(
    *names: str, values: Sequence[str], help: str, default: str | None = None, case_sensitive: bool = True, **more: Any
) -> Callable[[F], F]:
    """One of `values`, by default the first."""
    kind = OneOf(values, case_sensitive=case_sensitive)
    return click.option(*names, type=kind, default=default or values[0], show_default=True, help=help, **more)


dtype = choice(
    "--dtype",
    values=("keep", "bf16", "fp16", "fp32", "fp64"),
    help="Stored type of floating-point tensors.",
    case_sensitive=False,
)


def adapters(*, required: bool = True, metavar: str = "") -> Callable[[F], F]:
    """``ADAPTER[=WEIGHT]...``."""
    metavar = metavar or ("ADAPTER[=WEIGHT]..." if required else "[ADAPTER[=WEIGHT]]...")
    return click.argument(
        "adapters", nargs=-1, required=required, type=weighted, metavar=metavar, shell_complete=complete_files
    )


def texts(what: str) -> Callable[[F], F]:
    """``--text --text-file --ids --length``: texts on which `what` is measured."""

    def add(function: F) -> F:
        for option in (
            click.option("--length", type=count(2), default=128, show_default=True, help="Most tokens of a text."),
            click.option(
                "--ids", multiple=True, metavar="1,5,9", callback=token_ids, help="Token ids instead of text."
            ),
            path("--text-file", metavar="FILE", help="File of such a text."),
            click.option("-p", "--text", "texts", multiple=True, metavar="TEXT", help=f"Text to measure {what} on."),
        ):
            function = option(function)
        return function

    return add
