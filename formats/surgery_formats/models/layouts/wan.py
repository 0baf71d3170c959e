# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2, with VACE and Animate: Alibaba's release (diffusers 0.42.1, ``convert_wan_transformer_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same

__all__ = ["NETWORK"]

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_OF_IMAGES = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_TIME = "condition_embedder."


def _block(at: str) -> Iterator[Rule]:
    for old, new in _ATTENTION.items():
        yield same(f"{at}.self_attn.{old}", f"{at}.attn1.{new}")
    for old, new in (_ATTENTION | _OF_IMAGES).items():
        yield same(f"{at}.cross_attn.{old}", f"{at}.attn2.{new}")
    yield same(f"{at}.ffn.0", f"{at}.ffn.net.0.proj")
    yield same(f"{at}.ffn.2", f"{at}.ffn.net.2")
    yield same(f"{at}.norm3", f"{at}.norm2")
    yield same(f"{at}.modulation", f"{at}.scale_shift_table")


def _animated() -> Iterator[Rule]:
    """What Wan-Animate has for faces; biases of its motion encoder have another shape in diffusers, and no rule."""
    old, new = "face_adapter.fuser_blocks.#.", "face_adapter.#."
    yield fused(f"{old}linear1_kv", f"{new}to_k", f"{new}to_v")
    for a, b in (("linear1_q", "to_q"), ("linear2", "to_out"), ("q_norm", "norm_q"), ("k_norm", "norm_k")):
        yield same(f"{old}{a}", f"{new}{b}")
    yield same("face_encoder.conv1_local.conv", "face_encoder.conv1_local")
    yield from (same(f"face_encoder.conv{number}.conv", f"face_encoder.conv{number}") for number in (2, 3))
    yield from (same(f"face_encoder.{name}", f"face_encoder.{name}") for name in ("out_proj", "padding_tokens"))
    motion, convs = "motion_encoder.", "motion_encoder.enc.net_app.convs."
    yield same(f"{motion}dec.direction.weight", f"{motion}motion_synthesis_weight")
    yield same(f"{motion}enc.fc.#", f"{motion}motion_network.#")
    yield same(f"{convs}0.0", f"{motion}conv_in")
    yield same(f"{convs}8", f"{motion}conv_out")
    for number in range(7):
        for a, b in (("conv1.0", "conv1"), ("conv2.1", "conv2"), ("skip.1", "conv_skip")):
            yield same(f"{convs}{number + 1}.{a}", f"{motion}res_blocks.{number}.{b}")


_RULES = (
    *_block("blocks.#"),
    *_block("vace_blocks.#"),
    same("vace_blocks.#.before_proj", "vace_blocks.#.proj_in"),
    same("vace_blocks.#.after_proj", "vace_blocks.#.proj_out"),
    same("vace_patch_embedding", "vace_patch_embedding"),
    same("patch_embedding", "patch_embedding"),
    same("time_embedding.0", f"{_TIME}time_embedder.linear_1"),
    same("time_embedding.2", f"{_TIME}time_embedder.linear_2"),
    same("text_embedding.0", f"{_TIME}text_embedder.linear_1"),
    same("text_embedding.2", f"{_TIME}text_embedder.linear_2"),
    same("time_projection.1", f"{_TIME}time_proj"),
    same("pose_patch_embedding", "pose_patch_embedding"),
    *_animated(),
    same("img_emb.proj.0", f"{_TIME}image_embedder.norm1"),
    same("img_emb.proj.1", f"{_TIME}image_embedder.ff.net.0.proj"),
    same("img_emb.proj.3", f"{_TIME}image_embedder.ff.net.2"),
    same("img_emb.proj.4", f"{_TIME}image_embedder.norm2"),
    same("head.head", "proj_out"),
    same("head.modulation", "scale_shift_table"),
)

NETWORK = Network(
    "Wan",
    (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    (lambda _: _RULES,),
    told_by={"vace_blocks.": "WanVACETransformer3DModel"},
)
