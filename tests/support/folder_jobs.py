# SPDX-License-Identifier: Apache-2.0
"""Small runs of an output folder that several tests start from: finished, and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import xxhash

from surgery_formats.files.output.folder import output_folder

__all__ = ["OTHER", "PLAN", "env", "leave_stage", "write_output"]

_ROOT = Path(__file__).parents[2]
PLAN = "0123456789abcdef" * 4
OTHER = "f" * 64


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT / "formats")}


def write_output(out: Path, data: bytes = b"weights", plan: str = PLAN, **options: object) -> Path:
    with output_folder(out, plan, **options) as folder:  # type: ignore[arg-type]
        made = folder.create("model.safetensors", len(data))
        made.pwrite(data, 0)
        made.finish({"xxh3": xxhash.xxh3_128_hexdigest(data)})
        return folder.commit({"tool": "test"})


_KILLED = """
import json, os, sys, xxhash
from surgery_formats.files.output.folder import output_folder
with output_folder(sys.argv[1], sys.argv[2]) as folder:
    for name, text in json.loads(sys.argv[3]).items():
        data = text.encode()
        made = folder.create(name, len(data))
        made.pwrite(data, 0)
        made.finish({"xxh3": xxhash.xxh3_128_hexdigest(data)})
    for name in ("half.safetensors", "unet/half.safetensors", "vae/half.safetensors"):
        folder.create(name, 1000).pwrite(b"x" * 10, 0)
    os._exit(9)
"""


def leave_stage(out: Path, files: dict[str, str], plan: str = PLAN) -> Path:
    """What a killed run leaves: finished files, a half-written one, a journal with a torn last line."""
    ran = subprocess.run([sys.executable, "-c", _KILLED, str(out), plan, json.dumps(files)], env=env(), check=False)
    assert ran.returncode == 9
    stage = out.parent / f".{out.name}.surgery-{plan[:16]}"
    with (stage / ".surgery-journal").open("ab") as journal:
        journal.write(b'\n{"plan": "' + plan[:20].encode())
    return stage
