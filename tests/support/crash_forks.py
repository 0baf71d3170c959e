# SPDX-License-Identifier: Apache-2.0
"""One run of a command in a fork of this process, with something in the place of its calls on its output.

A call counts if it names the folder of the outputs or the one of temporary files, or a descriptor of a file there.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import gc
import importlib
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery_formats.files.output import kernel_copy
from tests.support.crash import Action, digest
from tests.support.crash_actions import Interrupt
from tests.support.crash_states import States
from tests.support.crash_table import Case

__all__ = ["Place", "import_once", "run_in_fork"]

LIMIT = 120  # seconds
CALLS = (
    "open",
    "write",
    "pwrite",
    "copy_file_range",
    "sendfile",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "mkdir",
    "rename",
    "replace",
    "link",
    "symlink",
    "unlink",
    "remove",
    "rmdir",
)


class Place:
    """Where a case runs: ``work`` and ``tmp`` of a home, which is the working folder."""

    def __init__(self, home: Path, case: Case) -> None:
        self.home, self.case = home, case
        self.work, self.tmp = home / "work", home / "tmp"
        self.words = case.words.split()

    def fresh(self) -> None:
        """As before the first run."""
        for folder in (self.work, self.tmp):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for source, name in self.case.brings:
            path = self.home / source
            if path.is_dir():
                # linked, so that identities stay: an output is never written in place
                shutil.copytree(path, self.work / name, copy_function=os.link)
            else:
                shutil.copyfile(path, self.work / name)

    def states(self) -> dict[str, str]:
        """The digest of each output, or "absent"."""
        return {name: _digest(self.work / name) for name in self.case.outputs}

    def litter(self) -> list[str]:
        """What lies beside the outputs, or among temporary files."""
        known = {*self.case.outputs, *(name for _, name in self.case.brings)}
        beside = set(os.listdir(self.work)) - known
        if self.case.adds:
            beside |= {name for name in os.listdir(self.work / self.case.outputs[0]) if name.startswith(".")}
        return sorted(beside | {f"tmp/{name}" for name in os.listdir(self.tmp)})


def _digest(path: Path) -> str:
    if not os.path.lexists(path):
        return "absent"
    return digest(path) if path.is_dir() else str(hash(path.read_bytes()))


def run_in_fork(
    place: Place, words: Sequence[str], action: Action | None, states: States | None = None
) -> tuple[int, str]:
    """The command in a fork; its exit code and what it said. Calls by which `states` are kept do not count."""
    words_file = place.home / "said"
    pid = os.fork()
    if pid == 0:
        leave = os._exit
        code = 99
        try:
            signal.alarm(LIMIT)
            os.dup2(os.open(words_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(place.home)
            os.environ["TMPDIR"] = str(place.tmp)
            import tempfile

            tempfile.tempdir = str(place.tmp)
            from surgery_cli.__main__ import main as run_process
            from surgery_cli.group import surgery

            if action is not None:
                _replace(action, (str(place.work), str(place.tmp)), states)
            if isinstance(action, Interrupt):  # as from a terminal, whatever this was started by
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                sys.argv = ["surgery", "-q", *words]
                run_process()
            surgery.main(["-q", *words], prog_name="surgery")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            sys.stderr.write(f"escaped: {error!r}\n")
        finally:
            if action is not None and hasattr(action, "end"):
                action.end()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            leave(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, words_file.read_text(errors="replace")[-600:]


def _replace(action: Action, roots: tuple[str, ...], states: States | None) -> None:
    """Let calls on files below `roots` go through `action`."""
    real_readlink = os.readlink
    within = threading.local() if states is None else states.within

    def path_of(value: Any, folder: Any = None) -> str:
        if isinstance(value, int):
            try:
                return real_readlink(f"/proc/self/fd/{value}")
            except OSError:
                return ""
        path = os.fsdecode(value)
        if folder is not None and not os.path.isabs(path):
            path = os.path.join(path_of(folder), path)
        return os.path.normpath(os.path.join(os.getcwd(), path))

    def ours(name: str, given: tuple[Any, ...], more: dict[str, Any]) -> bool:
        named = (
            given[:2] if name in ("rename", "replace", "link", "symlink", "renameat2", "copy_file_range") else given[:1]
        )
        folder = more.get("dir_fd")
        return any(path_of(value, folder).startswith(roots) for value in named)

    def wrap(module: Any, attribute: str, name: str) -> None:
        real = getattr(module, attribute)

        def wrapped(*given: Any, **more: Any) -> Any:
            if getattr(within, "now", False) or not given or not ours(name, given, more):
                return real(*given, **more)
            if name == "open" and module is not os:
                mode = given[1] if len(given) > 1 else more.get("mode", "r")
                if not set(mode) & set("wax+"):
                    return real(*given, **more)
            if (
                name == "open"
                and module is os
                and not given[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY)
            ):
                return real(*given, **more)
            return action(name, lambda: real(*given, **more), given)

        setattr(module, attribute, wrapped)

    for call in CALLS:
        wrap(os, call, call)
    wrap(fcntl, "flock", "flock")
    wrap(builtins, "open", "open")
    io.open = builtins.open
    rename_with = kernel_copy._rename_with

    def renameat2(flag: int, old: Any, new: Any) -> bool:
        if not ours("renameat2", (old, new), {}):
            return rename_with(flag, old, new)
        return bool(action("renameat2", lambda: rename_with(flag, old, new), (old, new)))

    kernel_copy._rename_with = renameat2


def import_once(names: Sequence[str]) -> None:
    """Import what a command imports, once, so that its forks need not."""
    for name in names:
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()
