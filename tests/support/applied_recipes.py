# SPDX-License-Identifier: Apache-2.0
"""Recipes of the example, and what comes of applying them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

import surgery

__all__ = ["CHAIN", "again", "files_of", "largest", "write"]


def write(text: str) -> str:
    """Make this the recipe of the current folder."""
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


CHAIN = """\
# Two styles, one model.
inputs:
  base: examples/base
steps:
  - verb: combine
    adapters: {examples/lora: 0.75, examples/dora: 0}
    method: svd
    rank: 6
    as: both
  - verb: merge
    base: base
    adapters: both
    dtype: fp32
output: merged
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by its path below the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def largest(one: Path, two: Path) -> float:
    """The largest difference between two models of the same tensors."""
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def again(folder: str, **inputs: str) -> bool | None:
    """Whether the manifest of a folder gives its bytes again."""
    result = surgery.apply(f"{folder}/surgery_manifest.json", output=f"{folder} again", inputs=inputs)
    return result.same and files_of(Path(folder)) == files_of(Path(f"{folder} again"))
