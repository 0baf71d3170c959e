# SPDX-License-Identifier: Apache-2.0
"""Checks a converted adapter with the code of the program it was converted for; exit 0 if right, 1 if not.

Each sub-command runs in the environment of its peer (see README.md) and prints one line::

    python peer_check.py mlx BASE ADAPTER EXPECTED
    python peer_check.py diffusers PIPELINE_DIR KOHYA_FILE EXPECTED

EXPECTED is a safetensors file with the weights the adapter must change, as they must be afterwards, under the
names of the base on disk (for a pipeline: ``component/name``). Every expected weight has to be met within
``--tolerance`` (1e-6) of max|W' - W| of that tensor, and no other weight may change at all. What the peer
logs as a warning counts as a failure too: it is how these loaders report tensors they ignored.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]


class _Warnings(logging.Handler):
    """Collects what some libraries log at WARNING or above, and Python warnings, while it is entered."""

    def __init__(self, *libraries: str) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._loggers = [logging.getLogger(name) for name in libraries]
        self._recorder = warnings.catch_warnings(record=True)

    def add(self, text: str) -> None:
        """Keeps one message on one line, without terminal colours."""
        self.lines.append(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:300])

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def __enter__(self) -> Self:
        self._python = self._recorder.__enter__()
        warnings.simplefilter("always")
        for logger in self._loggers:
            logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for logger in self._loggers:
            logger.removeHandler(self)
        for item in self._python or []:
            if issubclass(item.category, RuntimeWarning | UserWarning):
                self.add(str(item.message))
        self._recorder.__exit__(None, None, None)


def read_folder(folder: Path) -> Tensors:
    """All tensors of the safetensors files in one folder, float32."""
    out: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update({k: v.astype(np.float32) for k, v in load_file(file).items()})
    if not out:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return out


def stacked_to_hf(name: str, value: np.ndarray) -> Tensors:
    """An mlx-lm parameter under checkpoint names (experts are stacked in mlx-lm, one matrix each on disk)."""
    found = re.fullmatch(r"(.*)\.switch_mlp\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return {name: value}
    stem, part = found.groups()
    leaf = {"gate": "w1", "down": "w2", "up": "w3"}[part] if stem.endswith("block_sparse_moe") else f"{part}_proj"
    return {f"{stem}.experts.{e}.{leaf}.weight": value[e] for e in range(value.shape[0])}


def fuse_mlx(base: Path, adapter: Path) -> Tensors:
    """mlx-lm: load the model and the adapter (unknown tensors raise), fuse every module that can be fused."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import load_adapters, load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base, lazy=False, strict=True)
    load_adapters(model, str(adapter))
    parts = [(n, m.fuse(dequantize=False)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    if parts:
        model.update_modules(tree_unflatten(parts))
    out: Tensors = {}
    for name, value in tree_flatten(model.parameters()):
        out.update(stacked_to_hf(name, np.array(value.astype(mx.float32))))
    return out


def fuse_diffusers(pipeline_dir: Path, lora: Path) -> tuple[Tensors, list[str]]:
    """diffusers: load pipeline (float32) and LoRA, fuse; weights named as on disk, and what was logged."""
    import torch
    from diffusers import DiffusionPipeline

    index = json.loads((pipeline_dir / "model_index.json").read_text())
    absent = {k: None for k, v in index.items() if isinstance(v, list) and not (pipeline_dir / k).is_dir()}
    pipe: Any = DiffusionPipeline.from_pretrained(
        pipeline_dir, torch_dtype=torch.float32, local_files_only=True, **absent
    )
    with lora.open("rb") as file:
        keys = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    prefixes = {"unet": ("lora_unet_", "unet."), "text_encoder": ("lora_te_", "lora_te1_", "text_encoder.")}
    prefixes["text_encoder_2"] = ("lora_te2_", "text_encoder_2.")
    touched = [c for c, p in prefixes.items() if any(k.startswith(p) for k in keys)]
    with _Warnings("diffusers", "transformers", "peft") as heard:
        pipe.load_lora_weights(str(lora))
        pipe.fuse_lora(components=touched)
    # A file may leave components alone.
    said = [line for line in heard.lines if not line.startswith("No LoRA keys associated to")]
    out: Tensors = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, component, None)) is None:
            continue
        on_disk = read_folder(pipeline_dir / component)
        for key, value in model.state_dict().items():
            if ".lora_" in key:
                continue
            name = key.replace(".base_layer.", ".")
            # CLIPTextModel lost its ``text_model.`` level in newer transformers; checkpoints still have it.
            name = name if name in on_disk else f"text_model.{name}"
            out[f"{component}/{name}"] = value.float().numpy()
    return out, said


def compare(base: Tensors, got: Tensors, expected: Tensors, tolerance: float) -> tuple[list[str], float]:
    """Problems (empty when right) and the worst error relative to max|W' - W|."""
    problems: list[str] = []
    worst = 0.0
    for name, value in got.items():
        if name not in base:
            problems.append(f"{name} is not in the base")
        elif name not in expected and not np.array_equal(value, base[name]):
            problems.append(f"{name} must not change")
    for name, want in expected.items():
        if name not in got:
            problems.append(f"{name} is missing")
            continue
        if got[name].shape != want.shape:
            problems.append(f"{name} has shape {got[name].shape}, not {want.shape}")
            continue
        size = np.abs(want.astype(np.float64) - base[name]).max()
        error = float(np.abs(got[name].astype(np.float64) - want).max() / size) if size else float("inf")
        worst = max(worst, error)
        if not error <= tolerance:
            problems.append(f"{name} is off by {error:.2e} of max|delta|")
    return problems, worst


def main() -> int:
    """Runs one check; returns the exit status."""
    parser = argparse.ArgumentParser(description="check a converted adapter with the peer's own code")
    parser.add_argument("peer", choices=["mlx", "diffusers"])
    parser.add_argument("base", type=Path, help="model folder (mlx) or pipeline folder (diffusers)")
    parser.add_argument("adapter", type=Path, help="adapter folder (mlx) or LoRA file (diffusers)")
    parser.add_argument("expected", type=Path, help="safetensors file with the changed weights")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    args = parser.parse_args()
    noise, said = io.StringIO(), list[str]()
    try:
        expected = {k: v.astype(np.float32) for k, v in load_file(args.expected).items()}
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            if args.peer == "mlx":
                base, got = read_folder(args.base), fuse_mlx(args.base, args.adapter)
            else:
                got, said = fuse_diffusers(args.base, args.adapter)
                parts = {p.name for p in args.base.iterdir() if any(p.glob("*.safetensors"))}
                base = {f"{c}/{k}": v for c in sorted(parts) for k, v in read_folder(args.base / c).items()}
        problems, worst = compare(base, got, expected, args.tolerance)
    except Exception as error:
        print(f"FAIL {args.peer} {args.adapter}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return 1
    problems += [f"warning: {line}" for line in said]
    if problems or not expected:
        shown = "; ".join(problems[:4]) or "nothing expected"
        print(f"FAIL {args.peer} {args.adapter}: {len(problems)} problems: {shown}")
        return 1
    print(f"OK {args.peer} {args.adapter}: {len(expected)} weights, worst error {worst:.1e} of max|delta|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
