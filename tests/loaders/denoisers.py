# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of diffusers, adapters of them, and the dense weights; run by the Python of an environment with diffusers.

``python denoisers.py FOLDER NAME ...`` writes, into FOLDER/NAME: ``pipeline``, with the denoiser and text encoders; ``peft``, a LoRA of
the denoiser that PEFT saved, and ``dense-peft``, the pipeline with it merged by PEFT; ``single.safetensors``, the denoiser in its
release's names, and ``original.safetensors``, a LoRA file in these names, with ``dense-original``. What tensors a release has, and how
high they are, our layouts say; which rows of which of them a parameter is, diffusers' own conversion of them. Where that has the widths
of the published model in it, there is none.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from denoiser_families import FAMILIES, draw
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["pipeline_of", "seeded"]

_ENCODERS = {
    "sd15": (("text_encoder", CLIPTextModel, 32),),
    "sdxl": (("text_encoder", CLIPTextModel, 32), ("text_encoder_2", CLIPTextModelWithProjection, 16)),
}


def seeded(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, of sizes that keep a signal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = noise / 10 + float(bool((parameter == 1).all()))
    return model.eval()


def components_of(name: str) -> dict[str, torch.nn.Module]:
    family = FAMILIES[name]
    part = "unet" if family.model.startswith("UNet") else "transformer"
    found = {part: seeded(getattr(diffusers, family.model)(**family.sizes), 1)}
    for number, (encoder, kind, width) in enumerate(_ENCODERS.get(name, ())):
        config = CLIPTextConfig(
            vocab_size=60,
            hidden_size=width,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=0,
            eos_token_id=2,
        )
        found[encoder] = seeded(kind(config), 2 + number)
    return found


def pipeline_of(name: str, components: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, FAMILIES[name].pipeline)
    wanted, _ = kind._get_signature_keys(kind)
    return kind(**dict.fromkeys(wanted) | dict(components))


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Of attention and of the MLP behind it: what everyone trains."""
    inside = ("attn", "attention", "ff", "mlp")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "embed" not in name and any(part in name for part in inside)
    ]


def _lora(targets: list[str], **more: Any) -> peft.PeftConfig:
    """Of several ranks and alphas."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **more)
    config.rank_pattern, config.alpha_pattern = {targets[0]: 2}, {targets[-1]: 3}
    return config


KINDS: Mapping[str, Callable[[list[str]], peft.PeftConfig]] = {
    "peft": _lora,
    "dora": lambda targets: _lora(targets, use_dora=True),
    "loha": lambda targets: peft.LoHaConfig(r=2, alpha=3, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=2, alpha=3, target_modules=targets),
}


def train(model: torch.nn.Module, folder: Path, targets: list[str]) -> torch.nn.Module:
    """Save an adapter of the kind that `folder` is called after as PEFT does, and merge it."""
    wrapped = peft.get_peft_model(model, KINDS[folder.name](targets))
    generator = torch.Generator().manual_seed(7)
    for key, parameter in wrapped.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
        elif parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    for file in folder.glob("README.md"):
        file.unlink()
    return wrapped.merge_and_unload().eval()


def rows_of(name: str, model: torch.nn.Module) -> dict[str, list[tuple[str, int]]]:
    """By parameter: the tensor of a release, and the row of it, that diffusers makes each of its rows of."""
    from diffusers.loaders import single_file_utils as peer

    from tests.golden.layouts.make import traced, unet

    family = FAMILIES[name]
    assert family.network is not None
    title, conversion = family.network
    if family.model.startswith("UNet"):
        convert = unet(**family.sizes)[1]
    else:
        convert = getattr(peer, conversion) if conversion else dict
    return traced(title, model, convert)[1]


def released(state: Mapping[str, torch.Tensor], rows: Mapping[str, list[tuple[str, int]]]) -> dict[str, torch.Tensor]:
    """The tensors of a release that diffusers would convert to these."""
    heights: dict[str, int] = {}
    for places in rows.values():
        for source, row in places:
            heights[source] = max(heights.get(source, 0), row + 1)
    found: dict[str, torch.Tensor] = {}
    for key, places in rows.items():
        for at, (source, row) in enumerate(places):
            if source not in found:
                found[source] = torch.zeros(heights[source], *state[key].shape[1:])
            found[source][row] = state[key][at]
    return found


def write(name: str, folder: Path) -> None:
    components = components_of(name)
    part = next(iter(components))
    pipeline_of(name, components).save_pretrained(folder / "pipeline")
    state = {key: value.clone() for key, value in components[part].state_dict().items()}
    targets = linear_modules(components[part])
    for kind in KINDS if name == "sd15" else ("peft",):
        trained = train(copy.deepcopy(components[part]), folder / kind, targets)
        pipeline_of(name, {**components, part: trained}).save_pretrained(folder / f"dense-{kind}")
    if FAMILIES[name].network is None:
        return
    model = getattr(diffusers, FAMILIES[name].model)(**FAMILIES[name].sizes)
    rows = rows_of(name, model)
    release = released(state, rows)
    prefix = "model.diffusion_model." if part == "unet" else ""
    save_file({f"{prefix}{key}": value.contiguous() for key, value in release.items()}, folder / "single.safetensors")
    model.load_state_dict(state)
    trained = {f"{target}.weight" for target in targets}
    parts: dict[str, set[str]] = {}
    for key, places in rows.items():
        for source, _ in places:
            parts.setdefault(source, set()).add(key)
    factors: dict[str, torch.Tensor] = {}
    after = {key: value.clone() for key, value in release.items()}
    for number, (source, keys) in enumerate(parts.items()):
        if keys <= trained and release[source].ndim == 2:
            out, inputs = release[source].shape
            stem, alpha = source.removesuffix(".weight"), 3.0
            a, b = 0.3 * draw(4, inputs, seed=number), 0.3 * draw(out, 4, seed=1000 + number)
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(alpha)}
            after[source] = release[source] + alpha / 4 * (b @ a)
    save_file({f"diffusion_model.{key}": value for key, value in factors.items()}, folder / "original.safetensors")
    for key, places in rows.items():
        state[key] = torch.stack([after[source][row] for source, row in places]).reshape(state[key].shape)
    model.load_state_dict(state)
    components[part] = model.eval()
    pipeline_of(name, components).save_pretrained(folder / "dense-original")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path += [str(root), str(root / "formats")]
    for family in sys.argv[2:]:
        write(family, Path(sys.argv[1]) / family)
