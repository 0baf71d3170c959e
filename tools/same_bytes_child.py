# SPDX-License-Identifier: Apache-2.0
"""Run commands of one checkout, each in a fork of this process, so that the imports are paid for once.

Called by `same_bytes.py` as ``python same_bytes_child.py CHECKOUT``, with the commands on stdin. A command runs through the
entry point that ``pyproject.toml`` gives the script ``surgery``, wherever the packages lie.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["search_path"]

LIMIT = 120  # seconds for a command
HEAVY = (
    "click",
    "rich",
    "numpy",
    "torch",
    "safetensors",
    "xxhash",
    "onnx",
)  # imported before the forks; no code of the checkout


def search_path(checkout: Path) -> list[str]:
    """The folders that hold the checkout's packages."""
    found = _settings(checkout)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return list(dict.fromkeys(str((checkout / package).parent) for package in found))


def _settings(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text())


def _entry_point(checkout: Path) -> Callable[[], object]:
    """The function behind the command; an installed copy of the packages would be compared with itself, so it is refused."""
    settings = _settings(checkout)
    for package in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        spec = importlib.util.find_spec(Path(package).name)
        places = list(spec.submodule_search_locations or []) if spec else []
        if [Path(place).resolve() for place in places] != [(checkout / package).resolve()]:
            raise ImportError(f"{package}: found at {places}, not in {checkout}")
    module, _, name = settings["project"]["scripts"]["surgery"].partition(":")
    main: Callable[[], object] = getattr(importlib.import_module(module), name)
    return main


def _run(main: Callable[[], object], words: Sequence[str], stdout: str, stderr: str) -> int:
    """One command in a fork; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(LIMIT)
        for number, name in ((1, stdout), (2, stderr)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.argv = ["surgery", *words]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work() -> None:
    checkout = Path(sys.argv[1])
    commands = json.load(sys.stdin)
    for name in HEAVY:
        importlib.import_module(name)
    main = _entry_point(checkout)
    gc.collect()
    gc.freeze()  # what is shared with the forks is not written to
    done = []
    for command in commands:
        start = time.monotonic()
        code = _run(main, command["words"], command["stdout"], command["stderr"])
        done.append({"code": code, "seconds": time.monotonic() - start})
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    _work()
