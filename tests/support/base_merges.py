# SPDX-License-Identifier: Apache-2.0
"""Networks x base layouts x spellings of a LoRA: what a merge has to write into each base of `bases`, held against what it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from surgery import merge
from tests.support.adapter_files import Arrays
from tests.support.base_loras import SPELLINGS, lora_of
from tests.support.bases import KINDS, LAYOUTS, WHOLE, drawn, files_of, written

__all__ = ["COMBINATIONS", "TOLERANCE", "Combination", "MergeOutcome", "check", "compared", "merged", "sample"]

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Combination:
    """A base and a LoRA.

    Attributes:
        network: By its name in the golden rows.
        layout: Of the base.
        spelling: Of the LoRA.
    """

    network: str
    layout: str
    spelling: str

    def __str__(self) -> str:
        return f"{self.network}, {self.layout}, {self.spelling}"


COMBINATIONS = tuple(
    Combination(network, layout, spelling) for network in KINDS for layout in LAYOUTS for spelling in SPELLINGS
)


def sample(every: int) -> tuple[Combination, ...]:
    """Every so many-th combination, another layout and spelling of each network in turn."""
    return COMBINATIONS[::every]


@dataclass(frozen=True)
class MergeOutcome:
    """What is wrong with a merge, if anything, and how far off it is.

    Attributes:
        wrong: What is not as it should be; empty if all is.
        error: The greatest difference from what is wanted beyond one rounding to the stored type, as a share of the
            greatest change of the weight.
        changed: How many weights changed.
    """

    wrong: tuple[str, ...]
    error: float
    changed: int


def merged(combination: Combination, folder: Path) -> MergeOutcome:
    """One merge, held to what diffusers' conversion says."""
    dtype = np.float16 if combination.layout == "variant" else np.float32
    weights = drawn(combination.network, dtype)
    base = written(weights, combination.layout, folder / "base")
    files = files_of(weights, combination.layout)
    whole = combination.layout in WHOLE or (
        combination.layout == "release" and len(KINDS[combination.network].inside) == len(weights.encoders)
    )
    lora = lora_of(weights, combination.spelling, encoders=whole)
    save_file(lora.tensors, folder / "lora.safetensors")
    merge(base, folder / "lora.safetensors", output=folder / "out")
    return compared(files, files_of(lora.added, combination.layout), folder / "base", folder / "out")


def check(combination: Combination, folder: Path) -> float:
    """Assert that a merge is right; how far it is off."""
    found = merged(combination, folder)
    assert not found.wrong
    assert found.error < TOLERANCE
    assert found.changed
    return found.error


def compared(files: Mapping[str, Arrays], added: Mapping[str, Arrays], base: Path, out: Path) -> MergeOutcome:
    """What a merge wrote against what it was to write: same files, names, order, types and metadata; other values."""
    wrong, worst, changed = list[str](), 0.0, 0
    told = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wrong += [
        f"{name}: a file of one side only" for name in sorted(told ^ (made - {"surgery_manifest.json", "README.md"}))
    ]
    for name, tensors in files.items():
        if name not in made:
            continue
        if header(base / name) != header(out / name):
            wrong.append(f"{name}: another header")
        got = load_file(out / name)
        for key, tensor in tensors.items():
            delta = added[name][key]
            wanted = tensor.astype(float) + delta
            if not delta.any() and not np.array_equal(got[key], tensor):
                wrong.append(f"{key}: changed")
            if delta.any() and np.array_equal(got[key], tensor):
                wrong.append(f"{key}: not changed")
            changed += bool(delta.any())
            rounding = np.spacing(np.abs(wanted).astype(tensor.dtype)).astype(float) / 2
            excess = np.abs(got[key].astype(float) - wanted) - rounding
            worst = max(worst, float(excess.max(initial=0) / max(np.abs(delta).max(initial=0), 1e-30)))
    return MergeOutcome(tuple(wrong), worst, changed)


def header(path: Path) -> list[tuple[str, Any]]:
    """Names in the order of the file, types and shapes, metadata."""
    with path.open("rb") as file:
        told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = told.pop("__metadata__", None)
    ordered = sorted(told.items(), key=lambda item: item[1]["data_offsets"])
    return [("__metadata__", metadata), *((name, (each["dtype"], each["shape"])) for name, each in ordered)]
