# SPDX-License-Identifier: Apache-2.0
"""Makes the kohya (sd-scripts) golden files: two tiny diffusion pipelines, LoRA files for them, their effect.

Run it from this folder, in an environment with torch, diffusers, transformers and peft (see ../README.md)::

    python make.py

It rewrites ``sd1/``, ``sdxl/`` and ``expected.json``: of the models in ``pipelines.py``, what ``cases.py`` lists.
Every expected weight is W' = W + delta by the equations of the format, computed in float64 from the files on disk.
Then diffusers loads and fuses the same file: where it agrees within 1e-6 of max|delta| the weight *diffusers* made is
what is stored, elsewhere the formula's, and ``expected.json`` says which, and how far diffusers is off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Module, cases
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from pipelines import HERE, UNETS, Tensors, base_weights, make_pipeline
from safetensors.torch import load_file, save, save_file
from transformers import CLIPTextModel


def make_file(name: str, parts: list[Module], seed: int, dtype: torch.dtype) -> Tensors:
    """Random factors under sd-scripts' keys, seeded per target: two spellings hold the same numbers."""
    base, out = base_weights(name), Tensors()
    for part in parts:
        weight = base[part.target]
        digest = hashlib.sha256(f"{seed} {part.target}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))

        def draw(*shape: int, rng: np.random.Generator = rng) -> torch.Tensor:
            return torch.from_numpy(0.5 * rng.standard_normal(shape)).to(dtype)

        rows, columns, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
        ones = (1,) * len(kernel)
        if part.alpha is not None:
            out[f"{part.key}.alpha"] = torch.tensor(part.alpha, dtype=dtype)
        if part.mid:
            out[f"{part.key}.lora_mid.weight"] = draw(part.rank, part.rank, *kernel)
            out[f"{part.key}.lora_down.weight"] = draw(part.rank, columns, *ones)
        else:
            out[f"{part.key}.lora_down.weight"] = draw(part.rank, columns, *kernel)
        out[f"{part.key}.lora_up.weight"] = draw(rows, part.rank, *ones)
        if part.magnitude:
            length = rows if part.magnitude == "out" else columns
            size = (rows, 1, *ones) if part.magnitude == "out" else (1, columns, *ones)
            over = tuple(d for d in range(weight.ndim) if d != (0 if part.magnitude == "out" else 1))
            norm = torch.linalg.vector_norm(weight.double(), dim=over).float()
            out[f"{part.key}.dora_scale"] = (norm * (1 + 0.3 * draw(length).float())).reshape(size).to(dtype)
    return out


def formula(name: str, parts: list[Module], tensors: Tensors) -> Tensors:
    """W' in float64: W + (alpha/r) up.down, with a core up.mid.down, with a magnitude m V / ||V||."""
    base, out = base_weights(name), Tensors()
    for part in parts:
        weight = base[part.target].double()
        down, up = (tensors[f"{part.key}.lora_{n}.weight"].double() for n in ("down", "up"))
        rank = down.shape[0]
        alpha = tensors.get(f"{part.key}.alpha")
        scale = (float(alpha) if alpha is not None else rank) / rank
        if part.mid:
            mid = tensors[f"{part.key}.lora_mid.weight"].double()
            delta = torch.einsum("mn...,im,nj->ij...", mid, up.flatten(1), down.flatten(1))
        else:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        new = weight + scale * delta
        if part.magnitude:
            m = tensors[f"{part.key}.dora_scale"].double()
            over = tuple(d for d in range(weight.ndim) if d != (0 if part.magnitude == "out" else 1))
            new = m * new / torch.linalg.vector_norm(new, dim=over, keepdim=True)
        out[part.target] = new
    return out


def save_stable(tensors: Tensors, file: Path, notes: dict[str, str]) -> None:
    """Like ``save_file``, but with the metadata in one order: the library's changes from run to run."""
    blob = save(tensors, notes)
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + size :])


def metadata(name: str, tensors: Tensors, dim: int, alpha: float, module: str, args: dict[str, str]) -> dict[str, str]:
    """The ss_* notes sd-scripts leaves, with its two hashes of the bytes after the header."""
    notes = {
        "ss_base_model_version": "sdxl_base_v1-0" if name == "sdxl" else "sd_v1",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(args),
        "ss_network_dim": str(dim),
        "ss_network_module": module,
        "ss_output_name": "golden",
        "ss_tag_frequency": json.dumps({"10_golden": {'a "quoted" tag': 3, "wörter": 1}}),
        "ss_v2": "False",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if name == 'sdxl' else 'v1'}/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "golden",
    }
    blob = save(tensors, notes)
    data = blob[8 + int.from_bytes(blob[:8], "little") :]
    notes["sshs_model_hash"] = hashlib.sha256(data).hexdigest()
    notes["sshs_legacy_hash"] = hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    return notes


def make_peft(folder: Path, component: str) -> None:
    """A PEFT adapter for one component of sd1, made and merged by PEFT; one module has its own rank.

    In the UNet it has its own alpha too: diffusers loses those of a text encoder with transformers 5.

    The text encoder's module names are transformers 5's (no ``text_model.``): what PEFT writes with it.
    """
    base = base_weights("sd1")
    home = HERE / "sd1/base" / component
    if component == "unet":
        model: Any = UNet2DConditionModel.from_pretrained(home)
        targets, special = (
            ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut"],
            "mid_block.attentions.0.proj_in",
        )
    else:
        model = CLIPTextModel.from_pretrained(home)
        targets, special = ["q_proj", "out_proj", "fc2"], "encoder.layers.1.mlp.fc2"
    torch.manual_seed(3)
    alphas = {special: 1} if component == "unet" else {}
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets,
        rank_pattern={special: 3},
        alpha_pattern=alphas,
        init_lora_weights=False,
    )
    tuned: Any = get_peft_model(model, config)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = "sd1/base"
    values["target_modules"] = sorted(values["target_modules"])  # PEFT keeps a set
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    stored, tensors = Tensors(), load_file(folder / "adapter_model.safetensors")
    for name, value in tuned.merge_and_unload().state_dict().items():
        target = f"{component}/{name}" if f"{component}/{name}" in base else f"{component}/text_model.{name}"
        if torch.equal(value, base[target]):
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = tensors[f"{stem}A.weight"].double(), tensors[f"{stem}B.weight"].double()
        scale = alphas.get(special, 3) / 3 if special in name else 3 / 2
        delta = scale * (b.flatten(1) @ a.flatten(1)).reshape(value.shape)
        error = (value.double() - base[target].double() - delta).abs().max() / delta.abs().max()
        if error > 1e-6:
            sys.exit(f"{folder}: PEFT's {name} differs from the formula by {error:.1e}")
        stored[target] = value
    if 2 * len(stored) != len(tensors):
        sys.exit(f"{folder}: {len(stored)} weights changed by {len(tensors)} tensors")
    save_file(stored, folder.with_name(f"{folder.name}-expected.safetensors"), metadata={"format": "pt"})
    print(folder.name, len(tensors), "tensors,", len(stored), "weights")


def make_case(case: str, name: str, parts: list[Module], dtype: torch.dtype) -> dict[str, Any]:
    """Writes one LoRA file and what it does; returns its entry for expected.json."""
    sys.path.insert(0, str(HERE.parent))
    from peer_check import fuse_diffusers  # the code that later judges converted files

    folder = HERE / case
    folder.mkdir(parents=True)
    tensors = make_file(name, parts, 7 if name == "sd1" else 11, dtype)
    network = "lycoris.kohya" if any(p.magnitude or p.mid for p in parts) else "networks.lora"
    notes = metadata(name, tensors, parts[0].rank, parts[0].alpha or parts[0].rank, network, {})
    save_stable(tensors, folder / "adapter.safetensors", notes)
    wanted = formula(name, parts, load_file(folder / "adapter.safetensors"))
    base = base_weights(name)
    try:
        fused, said = fuse_diffusers(HERE / name / "base", folder / "adapter.safetensors")
    except ValueError as refusal:  # what the peer refuses is a fact worth recording
        fused, said = {}, [f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:160]}"]
    stored, off = Tensors(), dict[str, float]()
    for target, value in wanted.items():
        size = (value - base[target].double()).abs().max()
        got = torch.from_numpy(fused[target].copy()) if target in fused else None
        error = float((got.double() - value).abs().max() / size) if got is not None else float("inf")
        stored[target] = got if got is not None and error <= 1e-6 else value.float()
        if got is not None and error > 1e-6:
            off[target] = round(error, 3)
    also = sorted(k for k, v in fused.items() if k not in wanted and not np.array_equal(v, base[k].numpy()))
    if also:
        sys.exit(f"{case}: diffusers changed more: {also}")
    expected = folder / "expected.safetensors"
    if case == "sdxl/diffusers-names":  # the same numbers as sdxl/sgm-names under other keys: stored once
        expected = HERE / "sdxl/sgm-names/expected.safetensors"
        other = load_file(expected)
        for target, value in wanted.items():
            size = (value - base[target].double()).abs().max()
            if (other[target].double() - value).abs().max() > 1e-6 * size:
                sys.exit(f"{case}: {target} differs from sgm-names")
    else:
        save_file(stored, expected, metadata={"format": "pt"})
    print(
        case,
        len(tensors),
        "tensors,",
        len(stored),
        "weights, diffusers:",
        "refuses" if not fused else f"wrong for {len(off)}",
        said[:1],
    )
    return {
        "base": f"{name}/base",
        "expected": expected.relative_to(HERE).as_posix(),
        "weights": len(stored),
        "source": "diffusers" if fused and not off else "formula" if not fused or len(off) == len(stored) else "both",
        "diffusers_refuses": not fused,
        "diffusers_wrong": off,
        "diffusers_said": said,
    }


def main() -> None:
    """Makes everything anew."""
    for name in UNETS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        make_pipeline(name)
    make_peft(HERE / "sd1/peft-unet", "unet")
    make_peft(HERE / "sd1/peft-text-encoder", "text_encoder")
    files = {case: make_case(case, *arguments) for case, arguments in cases().items()}
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
    report = {"versions": {p: version(p) for p in packages}, "files": files}
    (HERE / "expected.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
