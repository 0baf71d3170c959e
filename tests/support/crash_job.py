# SPDX-License-Identifier: Apache-2.0
"""A small job that writes an output folder in every way there is: computed, copied, nested, at once.

As a command: ``crash_job.py SOURCE OUT [--overwrite]``; one line on stderr and the error's exit code when it
fails.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import xxhash

from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.raw import open_file

__all__ = ["job"]

_HEAD = b"header " * 500
_BLOCK = bytes(range(256)) * 64


def job(source: Path, out: Path, *, overwrite: bool = False) -> int:
    """Write `out`; the number of files an interrupted run had left ready."""
    opened = open_file(source)
    plan = hashlib.sha256(b"crash job").hexdigest()
    with output_folder(out, plan, overwrite=overwrite, inputs=[source]) as folder:
        reused = 0
        for index, name in enumerate(["unet/model.safetensors", "model-00001.safetensors"]):
            if name in folder.finished:
                reused += 1
                continue
            block = bytes([index]) + _BLOCK
            made = folder.create(name, len(_HEAD) + opened.size + len(block))
            made.pwrite(_HEAD, 0)
            made.copy_from(opened, 0, len(_HEAD), opened.size)
            made.pwrite(block, len(_HEAD) + opened.size)
            if made.readback(len(_HEAD) + opened.size, len(block)) != block:
                raise AssertionError("read back something else")
            made.finish({"xxh3": xxhash.xxh3_128_hexdigest(_HEAD + source.read_bytes() + block)})
        folder.write_small("config.json", b"{}")
        folder.write_small("unet/config.json", b"{}")
        opened.check_unchanged()
        folder.commit({"tool": "crash job"})
    return reused


def main(arguments: list[str]) -> int:
    try:
        sys.stdout.write(f"{job(Path(arguments[0]), Path(arguments[1]), overwrite='--overwrite' in arguments)}\n")
    except SurgeryError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
