# SPDX-License-Identifier: Apache-2.0
"""The one map from what went wrong to a message on stderr and an exit code; commands never catch."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click

from surgery_cli import interruption
from surgery_cli.options import Settings
from surgery_cli.output import SCHEMA_VERSION
from surgery_formats.errors import SurgeryError
from surgery_formats.extras import missing_package
from surgery_formats.text import clean, encodable, show

__all__ = ["Fault", "fault_of", "guarded"]

INTERNAL, USAGE, INPUT, RESOURCE = 1, 2, 3, 7
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
_OF_THE_SYSTEM = (  # and not of what was asked for
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOLCK,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_ARGUMENT = re.compile(r"`(?P<name>\w+)=(?P<value>[^`]*)`")
_LISTED = re.compile(r"'(\w+(?:,\w+)+)'")
_PATH_LIMIT = 500  # characters; a path is worth showing whole


@dataclass(frozen=True, slots=True)
class Fault:
    """What is told about an exception; `code` is a stable name for machines, `hint` what to do next."""

    exit_code: int
    code: str
    message: str
    hint: str | None = None
    file: str | None = None
    tensor: str | None = None


def fault_of(error: BaseException) -> Fault:
    """The fault to report for `error`."""
    match error:
        case SurgeryError():
            hint = error.hint and _ARGUMENT.sub(_option, error.hint)
            return Fault(error.exit_code, error.code, error.message, hint, error.file, error.tensor)
        case click.NoSuchOption():
            return Fault(USAGE, "UsageError", f"no such option '{show(error.option_name)}'", _for_option(error))
        case click.UsageError():
            hint = _for_list(error) or (f"see '{error.ctx.command_path} --help'" if error.ctx else None)
            return Fault(USAGE, "UsageError", _lowered(error.format_message()), hint)
        case click.ClickException():
            return Fault(USAGE, "UsageError", error.format_message())
        case KeyboardInterrupt() | click.Abort():
            return Fault(interruption.exit_code(), "Interrupted", "interrupted")
        case MemoryError():
            return Fault(RESOURCE, "ResourceError", "not enough memory", "try --workers 1 or a --memory-limit")
        case OSError() if error.errno in _FULL:
            hint = "free some space, or write to another disk"
            return Fault(RESOURCE, "ResourceError", str(error.strerror), hint, _path(error))
        case OSError() if error.filename is not None and (isinstance(error, _UNREADABLE) or error.errno in _NO_PATH):
            return Fault(INPUT, "InputError", str(error.strerror), None, _path(error))
        case OSError() if error.errno in _OF_THE_SYSTEM:
            return Fault(RESOURCE, "ResourceError", str(error.strerror), None, _path(error))
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's, unimported
        hint = "try --workers 1, a --memory-limit or another --device"
        return Fault(RESOURCE, "ResourceError", f"not enough memory: {_first_line(error)}", hint)
    if (missing := missing_package(error)) is not None:
        return fault_of(missing)
    from surgery_formats.plugins import plugin_behind  # importlib.metadata takes 18 ms

    plugin = plugin_behind(error)
    where, whom = (f" in the plugin {plugin}", " to its authors") if plugin else ("", "")
    message = f"internal error{where}: {type(error).__name__}: {_first_line(error)}"
    return Fault(INTERNAL, "InternalError", message, f"run again with --debug for the traceback; please report{whom}")


_RENAMED = {
    "adapters": "--adapter",
    "against_adapters": "--against-adapter",
    "output": "-o",
    "inputs": "--input",
    "as_lora": "--as lora",
    "form": "--as",
    "graph_of": "--base",
    "consumer": "--for",
}  # arguments whose options have other names


def _option(argument: re.Match[str]) -> str:
    """An argument of a function as the option of the same name: ``overwrite=True`` -> ``--overwrite``.

    A pattern is quoted, as a shell would look for files of its name.
    """
    option = _RENAMED.get(argument["name"]) or f"--{argument['name'].replace('_', '-')}"
    value = argument["value"].strip('"')
    return option if value in ("", "True") else f"{option} {shlex.quote(value)}"


def _for_list(error: click.UsageError) -> str | None:
    """What to write for several values behind one option, with commas, where the option is given once for each."""
    option = error.param if isinstance(error, click.BadParameter) else None
    listed = _LISTED.search(error.message)
    if not (isinstance(option, click.Option) and option.multiple and listed):
        return None
    several = " ".join(f"{option.opts[0]} {shlex.quote(value)}" for value in listed[1].split(",")[:3])
    return f"the option may be repeated: {several}"


def _for_option(error: click.NoSuchOption) -> str | None:
    if error.ctx is None:
        return None
    from surgery_cli.unknown_options import hint_for_option  # it looks at every command

    return hint_for_option(error.option_name, error.ctx) or f"see '{error.ctx.command_path} --help'"


def guarded(work: Callable[[], None], settings: Settings, words: Sequence[str]) -> int:
    """Do `work`, tell what went wrong, if anything did, and return the exit code.

    The command line's `words` count too: where parsing failed, `settings` may not have seen its ``--json`` yet.
    """
    try:
        work()
        interruption.check()  # code in C may have lost the exception
        sys.stdout.flush()  # here, where a reader that went away can still be dealt with
    except click.exceptions.Exit as left:
        return left.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return USAGE
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        interruption.ignore()
        # An import in C makes other errors of an interruption: "numpy.core.multiarray failed to import".
        fault = fault_of(KeyboardInterrupt() if interruption.asked() else error)
        known = words[: words.index("--")] if "--" in words else words
        debug = settings.debug or "--debug" in known
        trace = "".join(traceback.format_exception(error)) if debug else None
        if settings.json or "--json" in known:
            _tell_machine(fault, trace)
        else:
            _tell_human(fault, trace)
        return fault.exit_code
    return 0


def _tell_human(fault: Fault, trace: str | None) -> None:
    for line in (trace or "").splitlines():
        click.echo(clean(line), err=True)
    where = [show(fault.file, _PATH_LIMIT)] if fault.file else []
    where += [f"tensor '{show(fault.tensor)}'"] if fault.tensor else []
    click.echo(f"error: {': '.join([*where, clean(fault.message)])}", err=True)
    if fault.hint:
        click.echo(f"  hint: {clean(fault.hint)}", err=True)


def _tell_machine(fault: Fault, trace: str | None) -> None:
    error = {**asdict(fault), "message": clean(fault.message), "hint": clean(fault.hint) if fault.hint else None}
    error |= {name: encodable(text) for name in ("file", "tensor") if (text := error[name])}
    del error["exit_code"]
    if trace is not None:
        error["traceback"] = encodable(trace)
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}), err=True)


def _path(error: OSError) -> str | None:
    return None if error.filename is None else os.fsdecode(error.filename)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _lowered(text: str) -> str:
    """Click's sentences in the form of our own messages."""
    return text[:1].lower() + text[1:].removesuffix(".")
