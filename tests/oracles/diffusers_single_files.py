# SPDX-License-Identifier: Apache-2.0
"""Small real models of diffusers as folders and as single files, and what ``from_single_file`` reads of merged ones.

    python tests/oracles/diffusers_single_files.py make FOLDER     # NAME/folder, NAME/base.safetensors
    python tests/oracles/diffusers_single_files.py check FOLDER    # NAME/one (merged file), NAME/other (merged folder): equal models?

In an environment with diffusers (see tests/golden/README.md), with ``formats`` on the path. Every model is random. The single
file holds the model's own tensors under the names that this project's rules give: diffusers' own loader tells whether these,
and what was merged, are right.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

from surgery_formats.models.layouts.index import LayoutIndex, filled
from surgery_formats.models.layouts.registry import NETWORKS

_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SMALL = {"num_attention_heads": 2, "attention_head_dim": 12}
MODELS: dict[str, tuple[str, Any]] = {
    "sd15": ("Stable Diffusion 1, 2 or XL", lambda: diffusers.UNet2DConditionModel(**_UNET)),
    "sd3": (
        "Stable Diffusion 3",
        lambda: diffusers.SD3Transformer2DModel(
            **_SMALL, num_layers=2, qk_norm="rms_norm", caption_projection_dim=24, joint_attention_dim=16,
            pooled_projection_dim=16, sample_size=8, pos_embed_max_size=8,
        ),
    ),
    "wan": ("Wan", lambda: diffusers.WanTransformer3DModel(**_SMALL, num_layers=2, text_dim=16, freq_dim=16, ffn_dim=32)),
    "ltx": (
        "LTX-Video",
        lambda: diffusers.LTXVideoTransformer3DModel(
            **_SMALL, num_layers=2, in_channels=8, out_channels=8, cross_attention_dim=24, caption_channels=16
        ),
    ),
    "sana": (
        "Sana",
        lambda: diffusers.SanaTransformer2DModel(
            **_SMALL, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
            caption_channels=16, sample_size=8,
        ),
    ),
    "auraflow": (
        "AuraFlow",
        lambda: diffusers.AuraFlowTransformer2DModel(
            **_SMALL, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16, caption_projection_dim=24,
            sample_size=8, pos_embed_max_size=16,
        ),
    ),
    "z-image": (
        "Z-Image",
        lambda: diffusers.ZImageTransformer2DModel(
            n_layers=2, n_refiner_layers=1, dim=48, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 8, 8]
        ),
    ),
    "qwen-image": (
        "Qwen-Image",
        lambda: diffusers.QwenImageTransformer2DModel(
            **_SMALL, num_layers=2, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 4, 4)
        ),
    ),
}  # fmt: skip


def single_file(family: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the release's layout."""
    network = next(network for network in NETWORKS if network.name == family)
    index = LayoutIndex.of(network, list(weights))
    first = [rule.name for rule in network.layouts[0](list(weights))]
    found: dict[str, torch.Tensor] = {}
    for name in weights:
        for rule, numbers, leaf in index.rules_for(name):
            if rule.name in first:
                parts = []
                for piece in rule.pieces:
                    whole = weights[filled(piece.name, numbers) + leaf]
                    parts.append(whole.chunk(piece.parts)[piece.part])
                found[filled(rule.name, numbers) + leaf] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
                break
        else:
            raise SystemExit(f"{family}: no rule for {name}")
    return found


def make(folder: Path) -> None:
    torch.manual_seed(3)
    for name, (family, build) in MODELS.items():
        model = build()
        model.save_pretrained(folder / name / "folder")
        weights = load_file(folder / name / "folder" / "diffusion_pytorch_model.safetensors")
        prefix = (
            "" if family in ("AuraFlow", "Qwen-Image") else "model.diffusion_model."
        )  # which not all conversions take away
        tensors = {f"{prefix}{key}": tensor for key, tensor in single_file(family, weights).items()}
        if family == "Sana":  # which the release has and diffusers' model has not
            tensors |= {
                f"model.diffusion_model.{key}": torch.zeros(1, 4) for key in ("pos_embed", "y_embedder.y_embedding")
            }
        save_file(tensors, folder / name / "base.safetensors", {"format": "pt"})


def check(folder: Path) -> None:
    for name, (_, build) in MODELS.items():
        kind = type(build())
        config = str(folder / name / "folder")
        for file, other in (("base.safetensors", "folder"), ("one/base.safetensors", "other")):
            model = kind.from_single_file(
                str(folder / name / file), config=config, local_files_only=True, low_cpu_mem_usage=False
            )
            wanted = kind.from_pretrained(str(folder / name / other)).state_dict()
            got = model.state_dict()
            if wrong := [key for key, tensor in wanted.items() if not torch.equal(tensor, got[key].to(tensor.dtype))]:
                raise SystemExit(f"{name}, {file}: {len(wrong)} of {len(wanted)} differ: {wrong[:4]}")
        print(f"OK {name}: {len(wanted)} parameters")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
