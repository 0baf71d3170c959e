# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo: Tencent's release, and ComfyUI's file of it, which names the blocks as Flux does.

The rules of diffusers 0.42.1 (``convert_hunyuan_video_transformer_to_diffusers``) and of ComfyUI's model loader
(``process_unet_state_dict`` of HunyuanVideo).
"""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.flux import BLOCKS, MODULATED
from surgery_formats.models.layouts.rule import Network, Rule, fused, same, swapped

__all__ = ["NETWORK"]

_IN, _OUT = "double_blocks.#.", "transformer_blocks.#."
_SINGLE_IN, _SINGLE_OUT = "single_blocks.#.", "single_transformer_blocks.#."
_TEXT_IN, _TEXT_OUT = "txt_in.", "context_embedder."
_TIME = "time_text_embed."


def _token_refiner(
    attention: str, first: str, second: str, time: tuple[str, str], text: tuple[str, str]
) -> Iterator[Rule]:
    """The network in front of the text, by what stands behind ``self_attn`` and by its linear layers' names."""
    old, new = f"{_TEXT_IN}individual_token_refiner.blocks.#.", f"{_TEXT_OUT}token_refiner.refiner_blocks.#."
    yield fused(f"{old}self_attn{attention}qkv", *(f"{new}attn.{part}" for part in ("to_q", "to_k", "to_v")))
    yield same(f"{old}self_attn{attention}proj", f"{new}attn.to_out.0")
    yield same(f"{old}mlp.{first}", f"{new}ff.net.0.proj")
    yield same(f"{old}mlp.{second}", f"{new}ff.net.2")
    yield same(f"{old}adaLN_modulation.1", f"{new}norm_out.linear")
    yield same(f"{old}norm1", f"{new}norm1")
    yield same(f"{old}norm2", f"{new}norm2")
    yield same(f"{_TEXT_IN}input_embedder", f"{_TEXT_OUT}proj_in")
    for number in (0, 1):
        linear = f"linear_{number + 1}"
        yield same(f"{_TEXT_IN}t_embedder.{time[number]}", f"{_TEXT_OUT}{_TIME}timestep_embedder.{linear}")
        yield same(f"{_TEXT_IN}c_embedder.{text[number]}", f"{_TEXT_OUT}{_TIME}text_embedder.{linear}")


def _double(side: str, parts: tuple[str, str, str], norms: tuple[str, str], out: str, context: str) -> Iterator[Rule]:
    yield fused(f"{_IN}{side}_attn_qkv", *(f"{_OUT}attn.{part}" for part in parts))
    yield same(f"{_IN}{side}_attn_q_norm", f"{_OUT}attn.{norms[0]}")
    yield same(f"{_IN}{side}_attn_k_norm", f"{_OUT}attn.{norms[1]}")
    yield same(f"{_IN}{side}_attn_proj", f"{_OUT}attn.{out}")
    yield same(f"{_IN}{side}_mod.linear", f"{_OUT}norm1{context}.linear")
    yield same(f"{_IN}{side}_mlp.fc1", f"{_OUT}ff{context}.net.0.proj")
    yield same(f"{_IN}{side}_mlp.fc2", f"{_OUT}ff{context}.net.2")


_RELEASE = (
    *_double("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", ""),
    *_double(
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
        "to_add_out",
        "_context",
    ),
    fused(
        f"{_SINGLE_IN}linear1",
        *(f"{_SINGLE_OUT}{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        units=(1, 1, 1, 4),
    ),
    same(f"{_SINGLE_IN}linear2", f"{_SINGLE_OUT}proj_out"),
    same(f"{_SINGLE_IN}q_norm", f"{_SINGLE_OUT}attn.norm_q"),
    same(f"{_SINGLE_IN}k_norm", f"{_SINGLE_OUT}attn.norm_k"),
    same(f"{_SINGLE_IN}modulation.linear", f"{_SINGLE_OUT}norm.linear"),
    same("img_in.proj", "x_embedder.proj"),
    same("time_in.mlp.0", f"{_TIME}timestep_embedder.linear_1"),
    same("time_in.mlp.2", f"{_TIME}timestep_embedder.linear_2"),
    same("guidance_in.mlp.0", f"{_TIME}guidance_embedder.linear_1"),
    same("guidance_in.mlp.2", f"{_TIME}guidance_embedder.linear_2"),
    same("vector_in.in_layer", f"{_TIME}text_embedder.linear_1"),
    same("vector_in.out_layer", f"{_TIME}text_embedder.linear_2"),
    same("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
    *_token_refiner("_", "fc1", "fc2", ("mlp.0", "mlp.2"), ("linear_1", "linear_2")),
)
_COMFYUI = (
    *(rule for rule in (*BLOCKS, *MODULATED) if rule.name != "img_in"),
    same("img_in.proj", "x_embedder.proj"),
    *_token_refiner(".", "0", "2", ("in_layer", "out_layer"), ("in_layer", "out_layer")),
)

NETWORK = Network(
    "HunyuanVideo",
    ("HunyuanVideoTransformer3DModel",),
    (lambda _: _RELEASE, lambda _: _COMFYUI),
    in_omi={
        **{f"{mlp}.fc1": f"{mlp}.fc0" for mlp in ("mlp", "img_mlp", "txt_mlp")},
        "t_embedder.mlp.0": "t_embedder.linear_1",
        "t_embedder.mlp.2": "t_embedder.linear_2",
    },
)
