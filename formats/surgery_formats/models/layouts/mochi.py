# SPDX-License-Identifier: Apache-2.0
"""Mochi 1: Genmo's release (diffusers 0.42.1, ``convert_mochi_transformer_checkpoint_to_diffusers``).

Gate and up are one weight in both, the other way round; the last block's text has no gates, and another name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from surgery_formats.models.layouts.rule import Network, Rule, fused, same, swapped

__all__ = ["NETWORK"]

_IN, _OUT = "blocks.#.", "transformer_blocks.#."
_TIME = "time_embed."
_SIDES = (
    ("x", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    ("y", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
)


def _block() -> Iterator[Rule]:
    for side, parts, norms, out, mlp in _SIDES:
        yield fused(f"{_IN}attn.qkv_{side}", *(f"{_OUT}attn1.{part}" for part in parts))
        yield same(f"{_IN}attn.q_norm_{side}", f"{_OUT}attn1.{norms[0]}")
        yield same(f"{_IN}attn.k_norm_{side}", f"{_OUT}attn1.{norms[1]}")
        yield same(f"{_IN}attn.proj_{side}", f"{_OUT}attn1.{out}")
        yield swapped(f"{_IN}mlp_{side}.w1", f"{_OUT}{mlp}.net.0.proj")
        yield same(f"{_IN}mlp_{side}.w2", f"{_OUT}{mlp}.net.2")
    yield same(f"{_IN}mod_x", f"{_OUT}norm1.linear")


_RULES = (
    *_block(),
    same("x_embedder.proj", "patch_embed.proj"),
    same("t_embedder.mlp.0", f"{_TIME}timestep_embedder.linear_1"),
    same("t_embedder.mlp.2", f"{_TIME}timestep_embedder.linear_2"),
    *(same(f"t5_y_embedder.{name}", f"{_TIME}pooler.{name}") for name in ("to_kv", "to_q", "to_out")),
    same("t5_yproj", f"{_TIME}caption_proj"),
    same("pos_frequencies", "pos_frequencies"),
    swapped("final_layer.mod", "norm_out.linear"),
    same("final_layer.linear", "proj_out"),
)


def _rules(names: Collection[str]) -> Collection[Rule]:
    """The rules of all blocks, and for the modulation of the text those of each block that the base has."""
    found = [name.split(".") for name in names if name.startswith(("blocks.", "transformer_blocks."))]
    rules = list(_RULES)
    for number in dict.fromkeys(segments[1] for segments in found if len(segments) > 1):
        of_text = (f"blocks.{number}.attn.proj_y", f"transformer_blocks.{number}.attn1.to_add_out")
        linear = "linear" if any(f"{module}.weight" in names for module in of_text) else "linear_1"
        rules.append(same(f"blocks.{number}.mod_y", f"transformer_blocks.{number}.norm1_context.{linear}"))
    return rules


NETWORK = Network("Mochi", ("MochiTransformer3DModel",), (_rules,))
