# SPDX-License-Identifier: Apache-2.0
"""The programs that are given what we write, and how near they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.loaders import diffusion, inversions, language
from tests.loaders.acting import Trial

__all__ = ["PROGRAMS", "Program"]


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        title: Its name.
        written: Formats that are written for it.
        acts: Names of what it is given.
        trials: Makes that in a folder.
        precision: Greatest error, as a share of the change: of float32, in the order in which the program adds.
    """

    title: str
    written: str
    acts: tuple[str, ...]
    trials: Callable[[Path], Mapping[str, Trial]]
    precision: float = 1e-4


_TITLES = {
    "peft": "PEFT",
    "mlx-lm": "mlx-lm",
    "llama.cpp": "llama.cpp",
    "torchtune": "torchtune",
    "litgpt": "litgpt",
    "adapters": "adapters",
    "onnxruntime": "onnxruntime",
    "keras": "KerasHub",
}
PROGRAMS: Mapping[str, Program] = (
    {
        name: Program(
            title,
            f"`{language.FORMATS[name]}`",
            tuple(str(act) for act in language.ACTS[name]),
            partial(language.trials, name),
        )
        for name, title in _TITLES.items()
    }
    | {
        name: Program(name, written, tuple(str(act) for act in diffusion.ACTS[name]), partial(diffusion.trials, name))
        for name, written in (("diffusers", "`diffusers`, `kohya`, `comfyui`"), ("lycoris", "`kohya`"))
    }
    | {"textual-inversion": Program("diffusers", "`learned-embeds`, `embedding`", inversions.ACTS, inversions.trials)}
)
