# SPDX-License-Identifier: Apache-2.0
"""Write ``rows.json``: which single-file tensor, or which of its rows, diffusers makes each of its parameters of.

    python tests/golden/layouts/make.py [--check]

Needs diffusers 0.42.1 with torch (and transformers for the text encoder), and ``formats`` on the path. The rules of this
project only name the tensors of a single file. What becomes of them is diffusers' own conversion: it runs over tensors of
one column that hold their row numbers, and every parameter of the model has to come out, with its height, and nothing
else. A name that diffusers does not know fails here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils as peer

from surgery_formats.models.layouts.index import LayoutIndex, filled
from surgery_formats.models.layouts.registry import NETWORKS

HERE = Path(__file__).parent
STEP = 1 << 20  # values: number of the tensor times this, plus the row


def unet(**changes: Any) -> tuple[torch.nn.Module, Callable[..., Any]]:
    options: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = diffusers.UNet2DConditionModel(**(options | changes))
    prefix = peer.LDM_UNET_KEY
    config = dict(model.config)
    return model, lambda tensors: peer.convert_ldm_unet_checkpoint({prefix + k: t for k, t in tensors.items()}, config)


XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def models() -> dict[str, tuple[str, torch.nn.Module, Callable[..., Any]]]:
    """By name: the family, its model in diffusers, the conversion."""
    with torch.device("meta"):
        return {
            "sd15": ("Stable Diffusion 1, 2 or XL", *unet()),
            "sdxl": ("Stable Diffusion 1, 2 or XL", *unet(**XL)),
            "sd3": (
                "Stable Diffusion 3",
                diffusers.SD3Transformer2DModel(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0,)),
                peer.convert_sd3_transformer_checkpoint_to_diffusers,
            ),
            "flux": (
                "Flux",
                diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
                peer.convert_flux_transformer_checkpoint_to_diffusers,
            ),
            "chroma": (
                "Chroma",
                diffusers.ChromaTransformer2DModel(num_layers=2, num_single_layers=2),
                peer.convert_chroma_transformer_checkpoint_to_diffusers,
            ),
            "flux2": (
                "Flux 2",
                diffusers.Flux2Transformer2DModel(num_layers=2, num_single_layers=2),
                peer.convert_flux2_transformer_checkpoint_to_diffusers,
            ),
            "wan": (
                "Wan",
                diffusers.WanTransformer3DModel(num_layers=2, image_dim=32, added_kv_proj_dim=5120),
                peer.convert_wan_transformer_to_diffusers,
            ),
            "wan-vace": (
                "Wan",
                diffusers.WanVACETransformer3DModel(num_layers=2, vace_layers=[0, 1]),
                peer.convert_wan_transformer_to_diffusers,
            ),
            "wan-animate": ("Wan", _without_act_fn(diffusers.WanAnimateTransformer3DModel(num_layers=5)), animated),
            "qwen-image": (
                "Qwen-Image",
                diffusers.QwenImageTransformer2DModel(num_layers=2),
                lambda tensors: {name.removeprefix("model.diffusion_model."): t for name, t in tensors.items()},
            ),
            "qwen-image-2.1": (
                "Qwen-Image 2.1",
                diffusers.QwenImage21Transformer2DModel(num_layers=2),
                peer.convert_qwen_image21_transformer_checkpoint_to_diffusers,
            ),
            "z-image": (
                "Z-Image",
                diffusers.ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1),
                peer.convert_z_image_transformer_checkpoint_to_diffusers,
            ),
            "hunyuan-video": (
                "HunyuanVideo",
                diffusers.HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=2, num_refiner_layers=1),
                peer.convert_hunyuan_video_transformer_to_diffusers,
            ),
            "ltx": (
                "LTX-Video",
                diffusers.LTXVideoTransformer3DModel(num_layers=2),
                peer.convert_ltx_transformer_checkpoint_to_diffusers,
            ),
            "ltx2": (
                "LTX-2",
                diffusers.LTX2VideoTransformer3DModel(num_layers=2),
                peer.convert_ltx2_transformer_to_diffusers,
            ),
            "lumina2": (
                "Lumina 2",
                diffusers.Lumina2Transformer2DModel(num_layers=2, num_refiner_layers=1),
                peer.convert_lumina2_to_diffusers,
            ),
            "cosmos2": (
                "Cosmos-Predict2 or Anima",
                diffusers.CosmosTransformer3DModel(
                    num_layers=2, use_crossattn_projection=False, extra_pos_embed_type=None
                ),
                peer.convert_cosmos_transformer_checkpoint_to_diffusers,
            ),
            "hidream": (
                "HiDream",
                diffusers.HiDreamImageTransformer2DModel(
                    patch_size=2, num_layers=2, num_single_layers=1, llama_layers=[0, 1], caption_channels=[64, 64]
                ),
                peer.convert_hidream_transformer_to_diffusers,
            ),
            "mochi": (
                "Mochi",
                diffusers.MochiTransformer3DModel(),  # of all its blocks: the conversion counts on 48
                peer.convert_mochi_transformer_checkpoint_to_diffusers,
            ),
            "sana": (
                "Sana",
                diffusers.SanaTransformer2DModel(num_layers=2),
                lambda tensors: peer.convert_sana_transformer_to_diffusers(
                    tensors | {"pos_embed": None, "y_embedder.y_embedding": None}
                ),
            ),
            "auraflow": (
                "AuraFlow",
                diffusers.AuraFlowTransformer2DModel(num_mmdit_layers=2, num_single_dit_layers=2),
                peer.convert_auraflow_transformer_checkpoint_to_diffusers,
            ),
            "krea2": (
                "Krea 2",
                diffusers.Krea2Transformer2DModel(num_layers=2),
                peer.convert_krea2_transformer_checkpoint_to_diffusers,
            ),
            "openclip": ("CLIP", *openclip()),
        }


def _without_act_fn(model: torch.nn.Module) -> Any:
    """A model without the biases that the release has in another shape."""
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".act_fn." not in name}
    return SimpleNamespace(state_dict=lambda: kept)


def animated(tensors: dict[str, Any]) -> dict[str, Any]:
    """diffusers' conversion expects biases of its motion encoder to have four axes."""
    whole = {n: t[None, :, :, None] if ".convs." in n and n.endswith(".bias") else t for n, t in tensors.items()}
    return peer.convert_wan_transformer_to_diffusers(whole)


def openclip() -> tuple[torch.nn.Module, Callable[..., Any]]:
    """The names of transformers' model, which need not be installed."""
    shapes = {"text_model.embeddings.token_embedding.weight": 50, "text_model.embeddings.position_embedding.weight": 8}
    for layer in range(2):
        at = f"text_model.encoder.layers.{layer}."
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1"):
            shapes |= {f"{at}{module}.weight": 16, f"{at}{module}.bias": 16}
        shapes |= {
            f"{at}mlp.fc1.weight": 64,
            f"{at}mlp.fc1.bias": 64,
            f"{at}mlp.fc2.weight": 16,
            f"{at}mlp.fc2.bias": 16,
        }
        shapes |= {f"{at}layer_norm2.weight": 16, f"{at}layer_norm2.bias": 16}
    shapes |= {"text_model.final_layer_norm.weight": 16, "text_model.final_layer_norm.bias": 16}
    flat = {name for name in shapes if "norm" in name or name.endswith(".bias")}
    model = SimpleNamespace(
        state_dict=lambda: {n: torch.empty((rows,) if n in flat else (rows, 1)) for n, rows in shapes.items()}
    )
    text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
    return model, lambda tensors: peer.convert_open_clip_checkpoint(text_model, tensors, prefix="")  # type: ignore


def single_file(index: LayoutIndex, heights: dict[str, int]) -> dict[str, int]:
    """Tensors of the first layout, with their heights, that hold all parameters."""
    tensors: dict[str, int] = {}
    first = [rule.name for rule in index.network.layouts[0](list(heights))]
    for parameter in heights:
        for rule, numbers, leaf in index.rules_for(parameter):
            if rule.name in first:
                name = filled(rule.name, numbers) + leaf
                pieces = {filled(piece.name, numbers) + leaf for piece in rule.pieces}
                tensors[name] = sum(heights[piece] for piece in pieces)
                break
        else:
            raise SystemExit(f"{index.network.name}: no rule for {parameter}")
    return tensors


def traced(
    family: str, model: torch.nn.Module, convert: Callable[..., Any]
) -> tuple[dict[str, int], dict[str, list[tuple[str, int]]]]:
    """Tensors of a release with their heights; and, by parameter, the tensor and the row of it that each row is made of."""
    heights = {name: tensor.shape[0] for name, tensor in model.state_dict().items()}
    network = next(network for network in NETWORKS if network.name == family)
    tensors = single_file(LayoutIndex.of(network, list(heights)), heights)
    names = list(tensors)
    given = {
        name: (torch.arange(rows, dtype=torch.float64) + STEP * at).reshape(rows, 1)
        for at, (name, rows) in enumerate(tensors.items())
    }
    converted = convert(dict(given))
    if converted.keys() != heights.keys():
        odd = sorted(converted.keys() ^ heights.keys())
        raise SystemExit(f"{family}: diffusers' conversion and model differ in {odd[:6]} ({len(odd)})")
    rows: dict[str, list[tuple[str, int]]] = {}
    for name, tensor in converted.items():
        values = [int(value) for value in tensor.flatten()]
        if len(values) != heights[name]:
            raise SystemExit(f"{family}: {name} has {len(values)} rows, {heights[name]} in the model")
        rows[name] = [(names[value // STEP], value % STEP) for value in values]
    return tensors, rows


def rows_of(family: str, model: torch.nn.Module, convert: Callable[..., Any]) -> dict[str, Any]:
    """As ``rows.json`` has it: spans of rows, or the name alone where a parameter is all of a tensor."""
    tensors, rows = traced(family, model, convert)
    found: dict[str, Any] = {}
    for name, places in sorted(rows.items()):
        spans: list[list[Any]] = []
        for source, row in places:
            if spans and spans[-1][0] == source and spans[-1][2] == row:
                spans[-1][2] += 1
            else:
                spans.append([source, row, row + 1])
        source, *rest = spans[0]
        found[name] = source if len(spans) == 1 and rest == [0, tensors[source]] else spans
    if family == "Mochi":  # its blocks are alike, but for the last
        found, tensors = ({n: v for n, v in some.items() if _block_of(n) in (None, 0, 47)} for some in (found, tensors))
    tails = {name: list(t.shape[1:]) for name, t in sorted(model.state_dict().items()) if t.ndim != 2 and name in found}
    return {"family": family, "heights": tensors, "rows": found, "tails": tails}


def _block_of(name: str) -> int | None:
    match = re.match(r"(?:transformer_)?blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def main() -> None:
    made = {name: rows_of(*entry) for name, entry in models().items()}
    text = json.dumps({"diffusers": diffusers.__version__, "models": made}, separators=(",", ":")) + "\n"
    path = HERE / "rows.json"
    if "--check" in sys.argv:
        raise SystemExit(0 if path.read_text() == text else f"{path} differs from what diffusers makes")
    path.write_text(text)


if __name__ == "__main__":
    main()
