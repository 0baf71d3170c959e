# SPDX-License-Identifier: Apache-2.0
"""Command lines, and what may be wrong with the inputs that they read: each damage to an input goes to every command that reads it.

Codes: 3 where a file is wrong by itself, 4 where it does not fit, would lose something or change nothing, 5 where it is not what an
account of it says, 2 where the command line is wrong. Two codes are given where both readings are fair: one command looks first at the
file, another at what it is for.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

__all__ = [
    "ADAPTER",
    "COMMANDS",
    "DAMAGES",
    "FILES",
    "HUGE",
    "MODEL",
    "SETTINGS",
    "TEXTS",
    "Damage",
    "add",
    "at",
    "changed_bytes",
    "config",
    "crossed",
    "poke",
    "tensors",
    "text",
]

COMMANDS = (
    "merge {base} {lora} -o {out}",
    "merge {base} {lora} {lora2}=0.5 -o {out} --dtype fp32",
    "merge {base} {lora} -o {out} --dry-run",
    "merge {graph}/model.onnx {lora} --base {base} -o {out}",
    "unmerge {merged} {lora} -o {out}",
    "unmerge {base} {merged} -o {out}",
    "extract-lora {base} {tuned} -o {out} --rank 2",
    "insert {base} --new lora --rank 2 -o {out}",
    "insert {base} --new lora --init pissa --rank 2 --residual {out}_base -o {out}",
    "insert {base} {delta} -o {out}",
    "insert {base} {lora} --unmerged -o {out}",
    "insert {graph}/model.onnx {lora} --base {base} -o {out}",
    "insert {graph}/model.onnx {lora} --base {base} --gated -o {out}",
    "locate {graph}/model.onnx --base {base}",
    "fold {slots}/model.onnx {onnx_adapter} -o {out}",
    "convert {lora} --to mlx -o {out}",
    "convert {lora} --to bare -o {out}.safetensors",
    "convert {lora} --for vllm --base {base} -o {out}",
    "convert {lora} --to compact --factors int4 -o {out}",
    "convert {lora} --to onnx-adapter --graph {slots}/model.onnx --base {base} -o {out}.onnx_adapter",
    "convert {graph}/model.onnx --to safetensors --base {base} -o {out}",
    "combine {lora} {lora2} -o {out}",
    "combine {lora} {lora2} --method ties --density .5 --rank 2 -o {out}",
    "resize {lora} --rank 1 -o {out}",
    "layers {base} --drop 1 -o {out}",
    "layers {base} --drop 1 --adapter {lora} --adapter-out {out}_lora -o {out}",
    "layers {base} --fuse qkv -o {out}",
    "export-onnx {base} -o {out}",
    "export-onnx {base} {lora} -o {out}",
    "export-onnx {base} --swap {lora} -o {out}",
    "export-onnx {base} {prompt} -o {out}",
    "export-onnx {base} --weights-type int4 -o {out}",
    "verify {graph} --against {base}",
    "verify {merged} --against {base}",
    "verify {merged}",
    "verify {slots}",
    "eval {base} --adapter {lora} --text {base}/config.json",
    "check {base} {lora}",
    "check {base} {lora} --for vllm --fix {out}",
    "inspect {base}",
    "inspect {lora}",
    "inspect {graph}/model.onnx",
    "inspect {prompt}",
    "inspect {onnx_adapter}",
    "diff {base} {tuned}",
    "diff {lora} {lora2}",
    "diff {graph}/model.onnx {slots}/model.onnx",
    "report {lora} --base {base}",
    "report {lora} --base {base} --other-base {tuned}",
    "report {lora} --base {base} --md {out}.md",
    "run {graph} --ids 1,2 --max-new 2",
    "run {slots} --ids 1,2 --max-new 2 --adapter {onnx_adapter}",
    "bench {graph} --prompt-length 4 --new-tokens 2",
    "prompt show {prompt} --base {base}",
    "prompt nearest {prompt} {base}",
    "prompt bake {prompt} {base} -o {out}",
    "prompt bake {prompt} {base} --as kv -o {out}",
    "prompt combine {prompt} {prompt2} -o {out}",
    "prompt convert {prompt} --to prefix --base {base} -o {out}",
    "prompt transfer {prompt} {base} --onto {tuned} -o {out} --accept-loss",
    "apply {recipe} -o {out}",
    "apply {recipe} -o {out} --dry-run",
    "apply {merged}/surgery_manifest.json -o {out} --input base={base} --input adapters={lora}",
)
"""Each is done on sound inputs with exit code 0."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with one input.

    Attributes:
        name: Of the damage.
        of: The input, as command lines call it.
        change: Damages a copy of it, in place.
        codes: Exit codes that are right.
        mentions: Each must be in the message: the file, and the tensor or field where there is one.
        only: Pattern of the commands that read what is damaged; the others are right to go on.
        some: How many of those commands it goes to, in turn; 0 for all.
    """

    name: str
    of: str
    change: Callable[[Path], Any]
    codes: tuple[int, ...]
    mentions: tuple[str, ...] = ()
    only: str = ""
    some: int = 0


DAMAGES: list[Damage] = []
_REPEATED = "apply {merged}/"
MODEL, ADAPTER, SETTINGS = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
HUGE = 10**30


def crossed() -> Iterator[tuple[Damage, str]]:
    """Every damage with each command that reads what is damaged."""
    turn = 0
    for damage in DAMAGES:
        readers = [line for line in COMMANDS if f"{{{damage.of}}}" in line and re.match(damage.only, line)]
        if damage.some:
            readers = [readers[(turn + step) % len(readers)] for step in range(min(damage.some, len(readers)))]
            turn += damage.some
        for line in readers:
            if line.startswith(_REPEATED) and damage.of != "merged":
                # its inputs are compared with their digests before anything is opened
                yield replace(damage, codes=(*damage.codes, 4), mentions=()), line
            else:
                yield damage, line


def add(
    name: str, of: str, change: Callable[[Path], Any], codes: int | tuple[int, ...], *says: str, **more: Any
) -> None:
    DAMAGES.append(Damage(name, of, change, codes if isinstance(codes, tuple) else (codes,), says, **more))


# --- any file -----------------------------------------------------------------------------------------------------------------
def _in_place_of(write: Callable[[Path, bytes], Any]) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.unlink()
        write(path, data)

    return change


def _loop(path: Path, data: bytes) -> None:
    path.symlink_to(path.name + ".loop")
    (path.parent / (path.name + ".loop")).symlink_to(path.name)


FILES: dict[str, Callable[[Path], Any]] = {
    "empty": _in_place_of(lambda path, data: path.write_bytes(b"")),
    "cut-off": _in_place_of(lambda path, data: path.write_bytes(data[: len(data) * 2 // 3])),
    "noise": _in_place_of(lambda path, data: path.write_bytes(np.random.default_rng(0).bytes(len(data)))),
    "fifo": _in_place_of(lambda path, data: os.mkfifo(path)),
    "folder": _in_place_of(lambda path, data: path.mkdir()),
    "loop": _in_place_of(_loop),
    "dangling": _in_place_of(lambda path, data: path.symlink_to("nowhere")),
    "device": _in_place_of(lambda path, data: path.symlink_to("/dev/zero")),
}
TEXTS: dict[str, Callable[[str], str | bytes]] = {
    "cut-off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a-list": lambda text: f"[{text}]",
    "key-twice": lambda text: (
        text.rstrip().rstrip("}") + ', "model_type": 1, "model_type": 2, "peft_type": 1, "peft_type": 2}'
    ),
    "nested-deep": lambda text: '{"a":' * 100_000,
    "latin-1": lambda text: text.replace("a", "\xe4").encode("latin-1"),
    "huge": lambda text: text + " " * (5 << 20),
    "nan": lambda text: text.rstrip().rstrip("}") + ', "x": NaN}',
    "5000-digits": lambda text: text.rstrip().rstrip("}") + f', "x": {"9" * 5000}}}',
}


def at(name: str, change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(folder / name)


def text(name: str, edit: Callable[[str], str | bytes]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        made = edit((folder / name).read_text())
        (folder / name).write_bytes(made if isinstance(made, bytes) else made.encode())

    return change


def changed_bytes(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return change


def tensors(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def config(name: str, **fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **fields}))

    return change


def poke(tensor: str, value: float) -> Callable[[dict[str, Any]], Any]:
    def poke(tensors: dict[str, Any]) -> None:
        tensors[tensor] = tensors[tensor].copy()
        tensors[tensor].reshape(-1)[3] = value

    return poke


for _name in ("bad_weights", "bad_configurations", "bad_graphs"):  # each adds its damages, in this order
    importlib.import_module(f"tests.oracles.{_name}")
