# SPDX-License-Identifier: Apache-2.0
"""Converting a LoRA of rank 128 on all linear layers of Flux between kohya and diffusers, beside copying the file and beside diffusers.

    python benchmarks/convert.py [--rounds 5] [--peer-rounds 2] [--peer PYTHON] [--pause 5] [--folder DIR] [--against TREE]

Every round runs each contender once, in turn, on warm files, as whole processes. kohya's file has one LoRA for queries, keys and
values (and the MLP of a single block), diffusers' has one of each; so its A are there several times, and it is larger. The proof
is part of every conversion. Correctness is asserted inside: sampled changes against float64, and against diffusers' own conversion.
The copy is followed by ``sync -f``, because the conversion syncs what it writes too; diffusers syncs nothing. It has no conversion to
kohya's names of Flux: that way it loads the file and saves it. Both bases are sparse files: of a base, names and sizes are read.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import ROOT, Sample, add_against, median, run, trees, versions
from safetensors import safe_open

RANK, ALPHA = 128, 64.0
D, M = 3072, 12288
DOUBLE, SINGLE = 19, 38
PEER = """
import sys
from diffusers import FluxPipeline
state = FluxPipeline.lora_state_dict(sys.argv[1])
state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in state.items()}  # safetensors saves no shared memory
FluxPipeline.save_lora_weights(sys.argv[2], state)
"""
INSTALLED = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
"""As packages that pip installed, which come compiled."""
Sizes = Mapping[str, tuple[int, int]]


def released() -> Sizes:
    """Black Forest Labs' linear layers, which kohya's names are made of."""
    sizes = {}
    for block in range(DOUBLE):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}_"
            sizes |= {f"{start}attn.qkv": (3 * D, D), f"{start}attn.proj": (D, D), f"{start}mod.lin": (6 * D, D)}
            sizes |= {f"{start}mlp.0": (M, D), f"{start}mlp.2": (D, M)}
    for block in range(SINGLE):
        start = f"single_blocks.{block}."
        sizes |= {
            f"{start}linear1": (3 * D + M, D),
            f"{start}linear2": (D, D + M),
            f"{start}modulation.lin": (3 * D, D),
        }
    return sizes


def parted() -> Sizes:
    """The same layers as diffusers has them."""
    sizes = {}
    for block in range(DOUBLE):
        start = f"transformer_blocks.{block}."
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
        sizes |= {f"{start}attn.{name}": (D, D) for name in names}
        for name in ("ff", "ff_context"):
            sizes |= {f"{start}{name}.net.0.proj": (M, D), f"{start}{name}.net.2": (D, M)}
        sizes |= {f"{start}{name}.linear": (6 * D, D) for name in ("norm1", "norm1_context")}
    for block in range(SINGLE):
        start = f"single_transformer_blocks.{block}."
        sizes |= {f"{start}attn.{name}": (D, D) for name in ("to_q", "to_k", "to_v")}
        sizes |= {f"{start}proj_mlp": (M, D), f"{start}proj_out": (D, D + M), f"{start}norm.linear": (3 * D, D)}
    return sizes


def write(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], drawn: bool
) -> None:
    """A file of safetensors: of random numbers, or as long as it would be with numbers."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(12)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in tensors.values() if drawn else ():
            values = (
                np.full(shape, ALPHA, np.float32) if dtype == "F32" else 0.02 * draw.standard_normal(shape, np.float32)
            )
            file.write(values.astype(np.float32 if dtype == "F32" else np.float16).tobytes())
        file.truncate(8 + len(text) + at)


def write_files(work: Path) -> None:
    """Both bases, and kohya's file."""
    more = {"img_in": (D, 64), "txt_in": (D, 4096), "vector_in.in_layer": (D, 768), "final_layer.linear": (64, D)}
    base = {f"{name}.weight": ("BF16", shape) for name, shape in (*released().items(), *more.items())}
    write(work / "flux1-dev.safetensors", base, {}, drawn=False)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (out, inputs) in released().items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.alpha"] = "F32", ()
        tensors[f"{key}.lora_down.weight"] = "F16", (RANK, inputs)
        tensors[f"{key}.lora_up.weight"] = "F16", (out, RANK)
    metadata = {"ss_network_module": "networks.lora_flux", "ss_network_dim": f"{RANK}", "ss_network_alpha": f"{ALPHA}"}
    write(work / "kohya.safetensors", tensors, metadata, drawn=True)


@dataclass(frozen=True)
class Opened:
    """An adapter's file, whose changes are sampled."""

    path: Path

    def change(self, down: str, up: str, rows: slice) -> np.ndarray:
        """Some rows of a weight's change, in float64, without the scale."""
        with safe_open(self.path, "np") as file:
            a, b = file.get_tensor(down), file.get_slice(up)[rows]
        return b.astype(np.float64) @ a.astype(np.float64)

    def of_kohya(self, module: str, rows: slice) -> np.ndarray:
        key = f"lora_unet_{module.replace('.', '_')}"
        with safe_open(self.path, "np") as file:
            scale = float(file.get_tensor(f"{key}.alpha")) / file.get_tensor(f"{key}.lora_down.weight").shape[0]
        return scale * self.change(f"{key}.lora_down.weight", f"{key}.lora_up.weight", rows)

    def of_diffusers(self, module: str, rows: slice) -> np.ndarray:
        with safe_open(self.path, "np") as file:
            stated = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        scale = (
            stated["transformer.lora_alpha"] / stated["transformer.r"] if stated else 1.0
        )  # a peer's are in the factors
        key = f"transformer.{module}"
        return scale * self.change(f"{key}.lora_A.weight", f"{key}.lora_B.weight", rows)


SAMPLES = (  # kohya's module, diffusers', and where its rows begin in the former
    ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q", 0),
    ("double_blocks.7.txt_attn.qkv", "transformer_blocks.7.attn.add_v_proj", 2 * D),
    ("double_blocks.18.img_mlp.2", "transformer_blocks.18.ff.net.2", 0),
    ("single_blocks.3.linear1", "single_transformer_blocks.3.attn.to_k", D),
    ("single_blocks.37.linear1", "single_transformer_blocks.37.proj_mlp", 3 * D),
    ("single_blocks.20.modulation.lin", "single_transformer_blocks.20.norm.linear", 0),
)


def check(kohya: Path, diffusers: Path, back: Path | None, peer: Path | None) -> None:
    """Changes of some rows are those of kohya's file: exactly, and within float16 of what diffusers makes of it."""
    for fused, part, start in SAMPLES:
        rows = slice(start + 100, start + 116)
        own = slice(100, 116)
        expected = Opened(kohya).of_kohya(fused, rows)
        assert np.array_equal(Opened(diffusers).of_diffusers(part, own), expected), part
        if back is not None:
            flat = part if f"lora_unet_{part.replace('.', '_')}.alpha" in _keys(back) else fused
            assert np.array_equal(Opened(back).of_kohya(flat, own if flat == part else rows), expected), part
        if peer is not None:
            worst = abs(Opened(peer).of_diffusers(part, own) - expected).max() / abs(expected).max()
            assert worst < 2e-3, (part, worst)


def _keys(path: Path) -> set[str]:
    with safe_open(path, "np") as file:
        return set(file.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--peer", default=sys.executable, help="the Python that has diffusers")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--folder", type=Path, help="where to work; needs 8 GB")
    add_against(parser)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    try:
        bench(work, options)
    finally:
        shutil.rmtree(work)


def bench(work: Path, options: argparse.Namespace) -> None:
    write_files(work)
    kohya, diffusers = work / "kohya.safetensors", work / "diffusers.safetensors"
    tree_of: dict[str, Path] = {}
    commands: dict[str, tuple[list[str], Path]] = {}

    def convert(source: Path, to: str, out: Path) -> list[str]:
        surgery = [sys.executable, "-P", "-m", "surgery_cli", "-q", "convert", str(source), "--to", to, "-o", str(out)]
        return [*surgery, "--base", str(work / "flux1-dev.safetensors")]

    run(convert(kohya, "diffusers", diffusers), work / "log")
    for source, to in ((kohya, "diffusers"), (diffusers, "kohya")):
        copied, out, saved = work / "copied", work / "out.safetensors", work / "saved"
        copy = ["sh", "-c", f"cp {source} {copied} && sync -f {copied}"]
        commands[f"`cp` + `sync -f` of {source.stem}'s"] = copy, copied
        for added, tree in trees(options).items():
            name = f"`surgery convert --to {to}`{added}"
            tree_of[name] = tree
            commands[name] = convert(source, to, out), out
        what = "load, convert and save" if to == "diffusers" else "load and save"
        commands[f"diffusers: {what} {source.stem}'s"] = [options.peer, "-c", PEER, str(source), str(saved)], saved
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for number in range(-1, options.rounds):  # the first warms files and memory, and is checked, not counted
        for name, (command, out) in commands.items():
            peer = name.startswith("diffusers")
            if peer and (number >= options.peer_rounds or not options.peer_rounds):
                continue
            time.sleep(options.pause)
            tree = tree_of.get(name, ROOT)
            sample = run(command, work / "log", INSTALLED, tree)
            if number >= 0:
                samples[name].append(sample)
            elif name.endswith("--to diffusers`"):
                check(kohya, out, None, None)
            elif name.endswith("--to kohya`"):
                check(kohya, diffusers, out, None)
            elif peer and "convert" in name:
                check(kohya, diffusers, None, out / "pytorch_lora_weights.safetensors")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    report(samples, kohya.stat().st_size, diffusers.stat().st_size, options.peer)


def report(samples: Mapping[str, list[Sample]], nbytes: int, other: int, peer: str) -> None:
    print(f"rank {RANK}, float16, {len(released())} modules of Flux: {nbytes / 1e9:.2f} GB as kohya has them, ", end="")
    print(f"{other / 1e9:.2f} GB as the {len(parted())} of diffusers\n")
    print("| | wall, s (median, min-max) | speed of the copy | processor, s | peak memory, MB |")
    print("|---|---|---|---|---|")
    base = 1.0
    for name, found in samples.items():
        if not found:
            continue
        walls = [sample.wall for sample in found]
        base = median(walls) if name.startswith("`cp`") else base
        span = f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        peak = max(sample.peak for sample in found) / 1e6
        cpu = median([sample.cpu for sample in found])
        print(f"| {name} | {span} | {base / median(walls):.2f}x | {cpu:.1f} | {peak:.0f} |")
    told = "import diffusers, torch; print(f'diffusers {diffusers.__version__}, torch {torch.__version__}')"
    found_versions = subprocess.run([peer, "-c", told], capture_output=True, text=True, check=False).stdout.strip()
    print(f"\n{versions('numpy', 'safetensors')}; {found_versions}")


if __name__ == "__main__":
    main()
