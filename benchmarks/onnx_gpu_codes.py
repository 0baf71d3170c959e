# SPDX-License-Identifier: Apache-2.0
"""Graphs of codes beside fp16, and beside onnxruntime-genai's builder at the same bits: time, logits, export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx_gpu_run import Run

from surgery.onnx.run.timed_graph import TimedGraph

__all__ = ["CODES", "TOKENIZER", "beside_builder", "codes", "exported", "spawn", "with_tokenizer"]

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "base"  # which one it is does not matter
CODES: dict[str, tuple[str, ...]] = {
    "int4, blocks of 32": ("--weights-type", "int4"),
    "int4, blocks of 64": ("--weights-type", "int4", "--block", "64"),
    "int4, blocks of 128": ("--weights-type", "int4", "--block", "128"),
    "int8, blocks of 128": ("--weights-type", "int8", "--block", "128"),
}
FAST = "int4, blocks of 128"
SMALL = "int4, blocks of 32"
MIXED = {"ep.cuda.fpa_intb_gemm": "1"}
"""Has onnxruntime repack blocks of 32 for CUTLASS's kernels of mixed types."""
LIMITS = {"": 0.72, "8b": 0.55}
"""What a token of 4 bits may take of one of 16."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def spawn(
    *words: object, environment: dict[str, str] | None = None, folder: Path | None = None, timeout: float = 240
) -> tuple[str, float, float]:
    """What a Python program prints; its seconds, and the most memory it has for itself, in MB."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(environment or {})}, cwd=folder,
    )  # fmt: skip
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            try:
                held = Path(f"/proc/{process.pid}/statm").read_text().split()
                peak[0] = max(
                    peak[0], (int(held[1]) - int(held[2])) * _PAGE / 1e6
                )  # files that are mapped are not its own
            except (OSError, IndexError):
                return
            time.sleep(0.01)

    began = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    out, said = process.communicate(timeout=timeout)
    seconds = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        raise RuntimeError(said[-600:])
    return out, seconds, peak[0]


def exported(run: Run, source: Path, out: Path, *options: str) -> tuple[float, float]:
    """Export by the command; seconds and MB."""
    where = ("--target", "cuda", "--dtype", "fp16") if run.device == "cuda" else ("--target", "cpu")
    return spawn("-m", "surgery_cli", "-q", "export-onnx", source, "-o", out, *where, *options)[1:]


def codes(run: Run, dtype: str, folder: str = "") -> None:
    """Graphs of codes beside the base's, in turns; of the 8 B shape if its folder is named."""
    source = run.work / (folder or dtype)
    sides = {"base": run.open_timed(source / "model.onnx")}
    for name, options in CODES.items():
        if folder and name not in (FAST, SMALL):
            continue
        out = run.work / f"{folder}{dtype}-{name.replace(' ', '')}"
        seconds, held = exported(run, source, out, *options)
        print(f"  {name}: exported in {seconds:.1f} s, {held:.0f} MB", flush=True)
        run.check(f"{folder} {name}: MB held by the export".strip(), held, 500)
        sides[name] = run.open_timed(out / "model.onnx")
        if name == SMALL and run.device == "cuda":
            sides[f"{name}, CUTLASS"] = run.open_timed(out / "model.onnx", session_config=MIXED)
            paired = MIXED | {"ep.cuda.fpa_intb_gemv_paired_k": "1", "ep.cuda.fpa_intb_gemv_wave_aware": "1"}
            sides[f"{name}, CUTLASS paired"] = run.open_timed(out / "model.onnx", session_config=paired)
    label = f"{dtype} codes {folder}".strip()
    run.measured(label, sides, [run.tokens], 40 if folder else 200, prefills=20)
    for name, error in errors(run, sides).items():
        run.check(
            f"{label} {name}: error of logits", error, 0.1 if "int8" in name else 0.95
        )  # random weights: the worst case
    run.ratio(label, FAST, "decode", LIMITS[folder])
    run.ratio(label, FAST, "first token", 1.15)


def errors(run: Run, sides: dict[str, TimedGraph]) -> dict[str, float]:
    """Norm of the error of a prompt's logits to their norm, against the first side."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, side in sides.items():
        assert side.decoder is not None
        found[name] = side.decoder.prefill([run.tokens]).astype(np.float32)
    first = next(iter(found.values()))
    return {name: float(np.linalg.norm(one - first) / np.linalg.norm(first)) for name, one in list(found.items())[1:]}


def with_tokenizer(run: Run, dtype: str) -> Path:
    """The model with some tokenizer beside it, which the builder wants."""
    folder = run.work / f"{dtype}-tokenizer"
    if not folder.exists():
        folder.mkdir()
        for file in (run.work / dtype / "model.safetensors", run.work / dtype / "config.json"):
            (folder / file.name).symlink_to(file.resolve())
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


def beside_builder(run: Run, dtype: str, unpacked_to: Path) -> None:
    """4 bits in blocks of 32, the token table too where the builder makes it of the tied head: same bits, same kernels."""
    source, out = with_tokenizer(run, dtype), run.work / f"{dtype}-genai-int4"
    builder = unpacked_to / "onnxruntime_genai" / "models" / "builder.py"  # as a file: it needs none of the libraries
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(unpacked_to.resolve())])
    where = ("-p", "int4", "-e", "cuda" if run.device == "cuda" else "cpu", "-c", run.work / "cache")
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    _, seconds, held = spawn(builder, "-i", source, "-o", out, *where, environment=environment)
    print(f"  builder: {seconds:.1f} s, {held:.0f} MB", flush=True)
    sides = {"base": run.open_timed(run.work / dtype / "model.onnx")}
    mine: dict[str, tuple[float, float]] = {}
    for name, options in {
        "surgery": ("--weights-type", "int4"),
        "surgery, scales searched": ("--weights-type", "int4", "--scales", "search"),
    }.items():
        made = run.work / f"{dtype}-int4-{name.replace(' ', '')}"
        mine[name] = exported(run, run.work / dtype, made, *options)
        sides[name] = run.open_timed(made / "model.onnx")
    sides["genai builder's int4"] = run.open_timed(out)
    label = f"{dtype} int4 beside the builder"
    run.measured(label, sides, [run.tokens], 200, prefills=20)
    found = errors(run, sides)
    sizes = {name: side.memory_nbytes for name, side in sides.items()}
    print(f"  errors {json.dumps(found)}, bytes on the device {json.dumps(sizes)}", flush=True)
    lines = {line["graph"]: line for line in run.rows if line["dtype"] == label}
    theirs = lines["genai builder's int4"]["decode_ms"]
    for name, (taken, own) in mine.items():
        run.check(f"{label} {name}: decode / builder's", lines[name]["decode_ms"] / theirs, 1.01)
        run.check(f"{label} {name}: error of logits / builder's", found[name] / found["genai builder's int4"], 1.0)
        run.check(f"{label} {name}: MB held by the export", own, 500)
        run.check(f"{label} {name}: seconds of the export / builder's", taken / seconds, 0.2)
