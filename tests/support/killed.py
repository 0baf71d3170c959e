# SPDX-License-Identifier: Apache-2.0
"""What a command leaves that is killed when all is written and nothing has appeared: its next run finds finished files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.kit import environment

__all__ = ["contents", "killed"]

_KILLED = """
import json, os, sys
import surgery
from surgery_formats.files.output.folder import OutputFolder
OutputFolder.commit = lambda *args, **options: os._exit(9)
verb, given, options = sys.argv[1:]
getattr(surgery, verb)(*json.loads(given), **json.loads(options))
"""


def killed(verb: str, *given: Any, output: Path, **options: Any) -> Path:
    """The folder that a function of `surgery` leaves when it is killed at the last moment; arguments are as JSON has them."""
    words = [verb, json.dumps(given), json.dumps(options | {"output": str(output)})]
    done = subprocess.run([sys.executable, "-c", _KILLED, *words], env=environment(), capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    (stage,) = output.parent.glob(f".{output.name}.surgery-*")
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
