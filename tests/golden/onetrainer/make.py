# SPDX-License-Identifier: Apache-2.0
"""Makes files of OneTrainer: legacy and OMI names of Flux with an embedding in a bundle, and OFT.

Run it from this folder, in an environment with torch, diffusers, peft and parse (see ../README.md)::

    PYTHONPATH=ONETRAINER:OMI python make.py            # rewrites the files and expected.json
    PYTHONPATH=ONETRAINER:OMI python make.py --check    # makes everything again elsewhere and compares it with what is here

ONETRAINER is a checkout of Nerogar/OneTrainer at 23df3832, OMI the folder ``src`` of Open-Model-Initiative/OMI-Model-Standards at 16e78ee.
That commit is on no branch that could be cloned. The files here were made with its converters typed again from the published text, the
pairs of names in shorter tables, which were compared with that text: they stand for OMI's sources, and are not those sources.
Keys of the legacy file are OneTrainer's (``convert_to_mixture``), those of the other OMI's (``convert_to_omi``), from the same factors;
expected weights are ``W + alpha / rank up down``, as OneTrainer's module computes it, for the bases of ../flux. Rotations are those of
OneTrainer's ``OFTRotationModule``: of the inputs of linear layers, measured, and of kernels as its ``OFTModule`` multiplies them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from modules.module.oft_utils import OFTRotationModule
from modules.util.convert_lora_util import convert_to_mixture
from omi_model_standards.convert.lora.convert_flux_lora import convert_flux_lora_key_sets
from omi_model_standards.convert.lora.convert_lora_util import convert_to_omi
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]


def flux_generator() -> object:
    spec = importlib.util.spec_from_file_location("flux_make", HERE.parent / "flux/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lora(folder: Path) -> None:
    """All layers of the tiny Flux under diffusers' names, as OneTrainer holds them, and an embedding of two encoders."""
    flux = flux_generator()
    before = load_file(HERE.parent / "flux/base-diffusers.safetensors")
    torch.manual_seed(31)
    tensors: Tensors = {}
    found: Tensors = {}
    for name, weight in before.items():
        if weight.dim() != 2:
            continue
        stem = f"transformer.{name.removesuffix('.weight')}"
        down, up = 0.5 * torch.randn(4, weight.shape[1]), 0.5 * torch.randn(weight.shape[0], 4)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
        found[name] = (weight.double() + 2.0 / 4 * up.double() @ down.double()).float()
    tensors["bundle_emb.token.clip_l"] = torch.randn(2, 8)
    tensors["bundle_emb.token.t5"] = torch.randn(3, 8)
    tensors["bundle_emb.token.t5_out"] = torch.randn(3, 8)
    legacy = convert_to_mixture(dict(tensors))
    save(legacy, folder / "legacy.safetensors")
    save(convert_to_omi(legacy, convert_flux_lora_key_sets()), folder / "omi.safetensors")
    save(found, folder / "expected-diffusers.safetensors")
    save(flux.joined(found, before), folder / "expected-bfl.safetensors")


OFT = {"attn1.to_q": (12, 16), "ff.net.0.proj": (16, 8), "conv1": (6, 4, 3, 3), "proj_in": (8, 8, 1, 1)}


def oft(folder: Path) -> None:
    """Linear layers and convolutions; blocks of their own, one shared by all, angles as they are and scaled."""
    for number, (name, shared, scaled) in enumerate(
        (("own", False, False), ("shared", True, False), ("scaled", False, True))
    ):
        torch.manual_seed(40 + number)
        base, tensors, found = {}, {}, {}
        for module, shape in OFT.items():
            weight = torch.randn(shape)
            inputs, side = math.prod(shape[1:]), 4
            rotation = OFTRotationModule(
                inputs // side if not shared else 1, side * (side - 1) // 2, side, inputs, shared, scaled
            )
            torch.nn.init.normal_(rotation.weight, std=0.2)
            state = rotation.state_dict()
            path = f"down_blocks.0.{module}"
            stem = f"lora_unet_{path.replace('.', '_')}.oft_R"
            tensors |= {f"{stem}.{leaf}": value for leaf, value in state.items()}
            base[f"{path}.weight"] = weight
            if len(shape) == 2:
                found[f"{path}.weight"] = torch.nn.functional.linear(rotation(torch.eye(inputs)), weight).T
                continue
            factor = 2 * math.sqrt(side - 1) if scaled else 1  # as in OFTModule.forward
            turned = rotation._cayley_batch(rotation.weight / factor, side, True, 5)
            turned = turned.repeat(inputs // side, 1, 1) if shared else turned
            parts = torch.einsum("ork,rkc->orc", weight.reshape(shape[0], inputs // side, side), turned)
            found[f"{path}.weight"] = parts.reshape(shape)
        place = folder / f"oft-{name}"
        place.mkdir(exist_ok=True)
        save(base, place / "base.safetensors")
        save(tensors, place / "adapter.safetensors")
        save(found, place / "expected.safetensors")


def write(folder: Path) -> None:
    """Make everything in `folder`."""
    lora(folder)
    oft(folder)
    report = {"versions": {p: version(p) for p in ("torch", "diffusers", "safetensors")}}
    report["versions"] |= {"OneTrainer": "23df3832", "OMI-Model-Standards": "16e78ee"}
    (folder / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


def save(tensors: Tensors, path: Path) -> None:
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def differences(folder: Path) -> Iterator[str]:
    """Files in `folder` that are not those here."""
    for path in sorted(folder.rglob("*.safetensors")):
        mine, theirs = load_file(HERE / path.relative_to(folder)), load_file(path)
        close = mine.keys() == theirs.keys() and all(
            torch.allclose(mine[k].float(), theirs[k].float(), atol=1e-6) for k in mine
        )
        if not close:
            yield str(path.relative_to(folder))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as fresh:
            write(Path(fresh))
            sys.exit("\n".join(differences(Path(fresh))) or 0)
    write(HERE)
