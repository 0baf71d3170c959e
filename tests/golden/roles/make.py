# SPDX-License-Identifier: Apache-2.0
"""Make diffusers.json: what part of its network each parameter of diffusers' transformers is, by the classes around it.

Run with diffusers 0.42.1: every class of `diffusers.models.transformers` that its defaults build is built without
weights, two layers of each kind. What a parameter is part of is read off the classes of the modules that hold it, from
the inside out, not off its name. Names with numbers left out that are of several parts in several classes stay out.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from pathlib import Path

import diffusers
import diffusers.models.transformers as transformers
import torch

LAYERS = ("num_layers", "num_single_layers", "n_layers", "depth", "num_refiner_layers", "n_refiner_layers")
# In order: of a module's class, then of the classes around it.
NORMS = re.compile(r"^(FP32)?(Layer|RMS|Group)Norm$|^(Mochi|T5|.*)RMSNorm$")
MODULATES = re.compile(r"AdaLayerNorm|AdaLN|Modulation|^.*NormContinuous|NormZero")
ATTENDS = re.compile(r"Attention(?!Block)|Attn(?!Block)")
FEEDS = re.compile(r"FeedForward|SwiGLU|MLP|GLUMB|^GELU$|^GEGLU$")
EMBEDS = re.compile(r"Embed|Timestep(?!.*Block)|TextProjection")


def part(around: list[str]) -> str:
    """The part by the classes of the module and of those that hold it, the innermost first."""
    if NORMS.match(around[0]):
        return "norm"
    for name in around:
        if MODULATES.search(name):
            return "modulation"
        if EMBEDS.search(name):
            return "embedding"
        if ATTENDS.search(name):
            return "attention"
        if FEEDS.search(name):
            return "mlp"
    return ""


def main() -> None:
    """Write diffusers.json beside this file."""
    found: dict[str, set[str]] = defaultdict(set)
    built = []
    for name in sorted(dir(transformers)):
        made = getattr(transformers, name)
        if not inspect.isclass(made) or not name.endswith("Model"):
            continue
        options = {key: 2 for key in inspect.signature(made.__init__).parameters if key in LAYERS}
        try:
            with torch.device("meta"):
                model = made(**options)
        except Exception as error:  # a class whose defaults build nothing
            print(name, type(error).__name__)
            continue
        built.append(name)
        modules = dict(model.named_modules())
        for parameter, _ in model.named_parameters():
            module = parameter.rpartition(".")[0]
            path = module.split(".") if module else []
            around = [type(modules[".".join(path[:depth])]).__name__ for depth in range(len(path), 0, -1)]
            key = ".".join("#" if segment.isdigit() else segment for segment in path)
            if around:
                found[key].add(part(around))
    parts = {name: next(iter(some)) for name, some in sorted(found.items()) if len(some) == 1 and "" not in some}
    facts = {"diffusers": diffusers.__version__, "classes": built, "parts": parts}
    (Path(__file__).parent / "diffusers.json").write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    print(len(built), "classes,", len(parts), "of", len(found), "names")


if __name__ == "__main__":
    main()
