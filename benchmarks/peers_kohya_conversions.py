# SPDX-License-Identifier: Apache-2.0
"""Flux LoRAs between sd-scripts' names and diffusers', by ``convert_flux_lora.py`` and by this project, for `peers.py`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peers_kohya import Kohya, off
from peers_kohya_files import MAKERS, Tensors, factors, named
from peers_kohya_networks import BLOCKS, Network, Rows, as_diffusers, judged
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

__all__ = ["conversions"]

_RANKS: Mapping[str, int] = {"to_k": 4, "to_v": 2, "add_q_proj": 4, "proj_mlp": 6}
_HEADER = {"transformer.r": 8, "transformer.lora_alpha": 2.0, "transformer.alpha_pattern": {}}


def _eight(_: str) -> int:
    return 8


def _uneven(key: str) -> int:
    return _RANKS.get(key.rpartition(".")[2], 8)


def _without(pattern: str) -> Callable[[Network], Tensors]:
    def make(flux: Network) -> Tensors:
        made = as_diffusers(flux, _eight, BLOCKS)
        return {key: value for key, value in made.items() if not re.search(pattern, key)}

    return make


def _dora(flux: Network) -> Tensors:
    made = MAKERS["DoRA (`dora_scale`)"](as_diffusers(flux, _eight, BLOCKS), flux.base, flux.keys)
    names = {"lora_down": "lora_A", "lora_up": "lora_B", "dora_scale": "lora_magnitude_vector"}
    spelt = {re.sub("|".join(names), lambda found: names[found[0]], key): value for key, value in made.items()}
    return {key: value.flatten() if key.endswith("vector") else value for key, value in spelt.items()}


# By title: what a file in diffusers' names holds.
_THERE: Mapping[str, Callable[[Network], Tensors]] = {
    "LoRA": lambda flux: as_diffusers(flux, _eight, BLOCKS),
    "ranks of q, k, v that differ": lambda flux: as_diffusers(flux, _uneven, BLOCKS),
    "q and v alone": _without(r"to_k|add_k|proj_mlp"),
    "k and v alone": _without(r"to_q|add_q|proj_mlp"),
    "alpha in the header": lambda flux: as_diffusers(flux, _eight, BLOCKS),
    "`x_embedder`, `norm_out` and the like too": lambda flux: as_diffusers(flux, _eight, r"^transformer\."),
    "DoRA": _dora,
}
# By title: of a file in sd-scripts' names the LoRA and what is made of it; whether text encoders stay in.
_HERE: Mapping[str, tuple[str, str, bool]] = {
    "LoRA": ("one", "", False),
    "LoRA of CLIP and T5 too": ("one", "", True),
    "ranks of 2 to 8, `img_in` and the like too": ("dims", "", False),
    "without `alpha`": ("one", "without `alpha`", False),
    "DoRA": ("one", "DoRA (`dora_scale`)", False),
    "LoHa": ("one", "LoHa", False),
}


def conversions(kohya: Kohya, work: Path) -> Rows:
    """By direction and case: how far the change of what was written is from the source's."""
    flux, rows = Network.of(kohya.inputs, "flux"), dict[str, dict[str, str]]()
    for title, (kind, made, texts) in _HERE.items():
        torch.manual_seed(len(rows))
        tensors = {
            key: value for key, value in load_file(flux.lora(kind)).items() if texts or key.startswith("lora_unet")
        }
        tensors = MAKERS[made](tensors, flux.base, flux.keys) if made else tensors
        rows[f"to diffusers: {title}"] = _both(kohya, flux, tensors, {}, "diffusers", work / f"to-diffusers{len(rows)}")
    for title, make in _THERE.items():
        said = {"lora_adapter_metadata": json.dumps(_HEADER)} if "header" in title else {}
        rows[f"to kohya: {title}"] = _both(kohya, flux, make(flux), said, "kohya", work / f"to-kohya{len(rows)}")
    return rows


def _both(kohya: Kohya, flux: Network, tensors: Tensors, said: dict[str, str], to: str, out: Path) -> Mapping[str, str]:
    print(out.name, file=sys.stderr, flush=True)
    out.mkdir()
    source, here, there = (out / f"{name}.safetensors" for name in ("source", "here", "there"))
    save_file(tensors, source, said)
    times = 0.25 if said else 1.0
    exact = {key: times * value for key, value in flux.change(tensors).items()}
    base = flux.folder / "flux-whole.safetensors"
    ours = kohya.surgery("convert", source, "--to", to, "--base", base, "-o", here)
    names = ("sd-scripts", "ai-toolkit") if to == "diffusers" else ("ai-toolkit", "sd-scripts")
    asked = ["--src", names[0], "--dst", names[1], "--src_path", source, "--dst_path", there]
    theirs = kohya.run("convert_flux_lora.py", *asked)
    return {
        "surgery": judged(ours, lambda: off(_read(flux, here), exact)),
        "kohya": judged(theirs, lambda: off(_read(flux, there), exact)),
    }


def _read(flux: Network, path: Path) -> Tensors:
    """What a file changes; where no alpha is beside a module its header says the scale, as PEFT has it, and so diffusers reads it."""
    with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        modules = {module: held for module, held in factors(load_file(path)) if f"{module}.weight" in flux.keys}
        for module, held in modules.items():
            part, _, name = module.partition(".")
            if "alpha" not in held and f"{part}.r" in said:
                alpha = said[f"{part}.alpha_pattern"].get(name, said[f"{part}.lora_alpha"])
                held["alpha"] = torch.tensor(float(alpha))
        return flux.change(named(modules))
    return {}  # a file that safetensors cannot read
