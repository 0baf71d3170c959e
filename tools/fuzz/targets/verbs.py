# SPDX-License-Identifier: Apache-2.0
"""Commands that read, and the plans of those that write, on a model and an adapter of which one or both are damaged."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import surgery

from ..golden import golden_graphs, seeds_of, small_graph
from ..target import Case, DisagreementError, Seed, Target
from ..world import graph_first, world, world_folder

__all__ = ["targets"]


def targets() -> list[Target]:
    """One for each command."""
    folders = partial(_together, "base", "lora")
    merged = partial(_together, "merged", "lora")
    return [
        Target("verb:inspect", _inspect, _anything, share=2),
        Target("verb:inspect-graph", _inspect, _graphs),
        Target(
            "verb:merge", _planned(lambda at: surgery.merge(at / "base", at / "lora", dry_run=True)), folders, share=2
        ),
        Target("verb:check", _planned(lambda at: surgery.check(at / "base", at / "lora")), folders),
        Target("verb:convert", _planned(_convert), folders),
        Target("verb:combine", _planned(lambda at: surgery.combine([at / "lora", at / "lora"], dry_run=True)), folders),
        Target("verb:report", _planned(lambda at: surgery.report(at / "lora", base=at / "base")), folders, share=0.5),
        Target(
            "verb:diff", _planned(lambda at: surgery.diff(at / "lora", world_folder() / "lora")), folders, share=0.5
        ),
        Target("verb:fingerprint", _planned(lambda at: surgery.fingerprint(at / "base")), folders, share=0.5),
        Target(
            "verb:layers",
            _planned(lambda at: surgery.layers(at / "base", vocab="pad=64", dry_run=True)),
            folders,
            share=0.5,
        ),
        Target(
            "verb:unmerge",
            _planned(lambda at: surgery.unmerge(at / "merged", at / "lora", dry_run=True)),
            merged,
            share=0.5,
        ),
        Target("verb:verify", _planned(lambda at: surgery.verify(at / "merged")), merged, share=0.5),
        Target("verb:prompt-show", _planned(_prompt), partial(_together, "base", "prompt"), share=0.5),
        Target("verb:locate", _locate, _graphs, share=0.2),
    ]


def _together(*names: str) -> Sequence[Seed]:
    """Folders beside each other."""
    files = {f"{name}/{file}": raw for name in names for file, raw in world()[name].items()}
    return [Seed("+".join(names), files, alone=False)]


def _anything() -> Sequence[Seed]:
    return [seed for some in seeds_of().values() for seed in some]


def _graphs() -> Sequence[Seed]:
    made = [Seed(name, graph_first(world()[name])) for name in ("graph", "swap")]
    return [Seed("small", {"model.onnx": small_graph(), "a.data": bytes(96)}), *made, *golden_graphs()]


def _planned(run: Callable[[Path], Any]) -> Callable[[Case], str]:
    def execute(case: Case) -> str:
        return _shown(run(case.path))

    return execute


def _convert(at: Path) -> Any:
    return surgery.convert(at / "lora", "mlx", base=at / "base", dry_run=True)


def _prompt(at: Path) -> Any:
    return surgery.prompt_show(at / "prompt", base=at / "base")


def _inspect(case: Case) -> str:
    return _shown(surgery.inspect(case.path))


def _locate(case: Case) -> str:
    return _shown(surgery.locate(case.path, world_folder() / "base", workers=1))


def _shown(result: Any) -> str:
    """What people and programs get to see: nothing in it acts on a terminal, and it is JSON."""
    for verbose in (False, True):
        summary = result.summary(verbose=verbose)
        for text in (summary.as_text(), summary.as_markdown()):
            if acting := [c for c in text if not c.isprintable() and c != "\n" and unicodedata.category(c) != "Zs"]:
                raise DisagreementError(f"{acting[:5]!r} is shown as it is")
    json.dumps(result.as_json(), allow_nan=False).encode()
    return "read"
