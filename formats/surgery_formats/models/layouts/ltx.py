# SPDX-License-Identifier: Apache-2.0
"""LTX-Video: Lightricks' release (diffusers 0.42.1, ``convert_ltx_transformer_checkpoint_to_diffusers``)."""

from __future__ import annotations

from collections.abc import Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same

__all__ = ["NETWORK"]

_BLOCK = "transformer_blocks.#"
_ADALN = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ALIKE = ("proj_out", "scale_shift_table", "caption_projection.linear_1", "caption_projection.linear_2")


def _block() -> Iterator[Rule]:
    for attention in ("attn1", "attn2"):
        at = f"{_BLOCK}.{attention}"
        yield same(f"{at}.q_norm", f"{at}.norm_q")
        yield same(f"{at}.k_norm", f"{at}.norm_k")
        yield from (same(f"{at}.{name}", f"{at}.{name}") for name in ("to_q", "to_k", "to_v", "to_out.0"))
    yield from (same(f"{_BLOCK}.{x}", f"{_BLOCK}.{x}") for x in ("ff.net.0.proj", "ff.net.2", "scale_shift_table"))


_RULES = (
    *_block(),
    same("patchify_proj", "proj_in"),
    *(same(f"adaln_single.{name}", f"time_embed.{name}") for name in _ADALN),
    *(same(name, name) for name in _ALIKE),
)

NETWORK = Network("LTX-Video", ("LTXVideoTransformer3DModel",), (lambda _: _RULES,))
