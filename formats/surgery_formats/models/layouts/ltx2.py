# SPDX-License-Identifier: Apache-2.0
"""LTX-2: Lightricks' release, pictures and sound (diffusers 0.42.1, ``convert_ltx2_transformer_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same

__all__ = ["NETWORK"]

_BLOCK = "transformer_blocks.#"
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_ADALN = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_TABLES = {
    "scale_shift_table": "scale_shift_table",
    "audio_scale_shift_table": "audio_scale_shift_table",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
}


def _block() -> Iterator[Rule]:
    for attention in _ATTENTIONS:
        at = f"{_BLOCK}.{attention}"
        yield same(f"{at}.q_norm", f"{at}.norm_q")
        yield same(f"{at}.k_norm", f"{at}.norm_k")
        yield from (same(f"{at}.{name}", f"{at}.{name}") for name in ("to_q", "to_k", "to_v", "to_out.0"))
    for mlp in ("ff", "audio_ff"):
        yield from (same(f"{_BLOCK}.{mlp}.{name}", f"{_BLOCK}.{mlp}.{name}") for name in ("net.0.proj", "net.2"))
    yield from (same(f"{_BLOCK}.{old}", f"{_BLOCK}.{new}") for old, new in _TABLES.items())


def _around(old: str, new: str) -> Iterator[Rule]:
    for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"):
        yield same(f"{old}.{name}", f"{new}.{name}")


_RULES = (
    *_block(),
    *(rule for old, new in _ADALN.items() for rule in _around(old, new)),
    same("patchify_proj", "proj_in"),
    same("audio_patchify_proj", "audio_proj_in"),
    *(same(name, name) for name in ("proj_out", "audio_proj_out", "scale_shift_table", "audio_scale_shift_table")),
    *(
        same(f"{side}caption_projection.linear_{number}", f"{side}caption_projection.linear_{number}")
        for side in ("", "audio_")
        for number in (1, 2)
    ),
)

NETWORK = Network("LTX-2", ("LTX2VideoTransformer3DModel",), (lambda _: _RULES,))
