# SPDX-License-Identifier: Apache-2.0
"""What part of a diffusion network a parameter is of, by its name in any layout: diffusers', the releases', kohya's.

Names are compared in lower case with underscores between all words, so that dotted and flattened ones tell the same. The
words are those of the networks in `surgery_formats.models.layouts`, to which a test holds them, and of diffusers.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["diffusion_role"]

_LEAF = re.compile(r"\.(weight|bias|scale|gamma)$")  # the latter two of norms
_RANGE = re.compile(r"(?<=\.)(\d+)(?:[-,]\d+)+(?=\.|$)")  # numbers of equal modules in a tree: the first stands for all
_BLOCK = re.compile(r"(?:blocks|layers|refiner)_\d+_|(?:^|_)(?:mid|middle)_block_")
_LONGEST = 500  # characters of a name that are looked at, from its end: a hostile one must not take long

_PATTERNS: tuple[tuple[str, str], ...] = (
    ("embedding", r"(?:^|_)(?:face|motion)_encoder_"),
    ("norm", r"_ln$|(?:^|_)norms_\d+$"),
    # What turns the time and a pooled text into shifts, scales and gates; it is called after the norms that it follows.
    (
        "modulation",
        r"norm\d?(?:_out|_context|_added)?_linear(?:_\d)?$|(?:^|_)(?:mod|modulations?|distilled_guidance_layer)(?:_|$)",
    ),
    ("modulation", r"adaln(?!\w*embedder)|scale_shift(?!\w*embedder)|_gate_linear$|(?:^|_)time_embed_linear$"),
    ("modulation", r"(?:^|_)(?:time_proj|time_projection_1|time_emb_proj|emb_layers_1)$"),
    ("modulation", r"(?:^|_)(?:mod(?:x|c|cx|f)_1|t_block_1|tproj_1)$"),
    (
        "norm",
        r"(?:norm|ln)(?:_?\d)?(?:_(?:added|context|in|out|cross|img|txt|q|k|x|y|norm|final|cam))*$|(?:^|_)ln_\w+$",
    ),
    (
        "norm",
        r"(?:^|_)(?:in_layers_0|out_layers_0|img_emb_proj_[04]|cap_embedder_0|caption_embedder_0|txtmlp_0)$|(?:^|model_)out_0$",
    ),
    (
        "attention+mlp",
        r"(?:^|_)single_(?:transformer_)?blocks_\d+_(?:linear_?[12]|proj_out|attn_to_out|attn_to_qkv_mlp_proj)$",
    ),
    ("mlp", r"(?:^|_)single_transformer_blocks_\d+_proj_mlp$"),
    ("mlp", r"_mlp_\w+_conv_conv$|_ff_conv_\w+$"),
    ("projection", r"(?:^|_)(?:attentions_\d+|(?:input|output)_blocks_\d+_1|middle_block_1)_proj_(?:in|out)$"),
    ("projection", r"(?:^|_)vace_blocks_\d+_(?:before_proj|after_proj|proj_in|proj_out)$"),
    ("embedding", r"(?:^|_)input_blocks_0_0$|(?:^|_)conv_in$"),
)
"""Roles and what names tell of them, in order."""
_IN_BLOCK: tuple[tuple[str, str], ...] = (
    ("embedding", r"(?:timestep|class)_embedder_"),  # of a block's own modulation
    ("attention", r"attn\d?(?:_|$)|attention(?:_|$)|_qkv(?:_|$)|_to_(?:[qkv]|out(?:_\d)?)$|fuser_blocks_\d+_linear"),
    ("mlp", r"(?:^|_)(?:mlp[xc]?|ff|ffn|feed_forward|(?:gate|up|down)_proj)(?:_|$)"),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    (
        "output",
        r"(?:^|_)(?:proj_out(?:_\d)?|final_layer(?:_\d+)*_linear|final_linear|out_layer_out_layer|head_head|conv_out)$"
        r"|(?:^|model_)(?:out_2|last_linear)$",
    ),
    (
        "embedding",
        r"embed|(?:^|_)(?:img|txt|time|guidance|vector|clip|proj|text|image)_(?:in|emb)(?:_|$)|(?:^|_)label_emb_"
        r"|(?:^|_)(?:patchify|input|text|cond|timestep|time_step|global)_proj(?:_|$)|proj_in$|caption_projection_|projector(?:_|$)"
        r"|(?:pad_token|_tokens)$|(?:^|_)patch_|(?:^|_)(?:cond_seq|init_x)_linear$|pos_frequencies$|positional_encoding$"
        r"|(?:^|_)(?:t5_yproj|tmlp_\d|txtmlp_\d)$|(?:^|model_)first$",
    ),
    *_IN_BLOCK,
)

_CONVOLUTION = re.compile(r"_(?:conv\d?|conv_shortcut|in_layers_2|out_layers_3|skip_connection|op)$")


def diffusion_role(parameter: str) -> str:
    """The role of a parameter, or of a module, of a network that removes noise.

    ``attention``, ``mlp``, ``attention+mlp`` for one matrix of both (Flux's single blocks), ``modulation``, ``embedding`` (of
    the input, the time and conditions), ``convolution``, ``projection`` (around a block), ``norm``, ``output``, or ``other``.
    """
    return _role(re.sub(r"\W", "_", _RANGE.sub(r"\1", _LEAF.sub("", parameter[-_LONGEST:]))).lower())


@lru_cache(maxsize=100_000)
def _role(name: str) -> str:
    within = _IN_BLOCK if _BLOCK.search(name) else _OUTSIDE
    found = next((role for role, pattern in (*_PATTERNS, *within) if re.search(pattern, name)), "")
    return found or ("convolution" if _CONVOLUTION.search(name) else "other")
