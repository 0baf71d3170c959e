# SPDX-License-Identifier: Apache-2.0
"""Keys of a prefix for programs that count positions differently.

PEFT's tokens stand behind a prefix, at positions n and on; AdapterHub's at 0 and on, as if there were none. With rotary positions
``(R_p q) . k = (R_(p+n) q) . (R_n k)``, so keys that are turned by n positions do the same. With learned positions nothing does.
"""

from __future__ import annotations

import numpy as np

from surgery.onnx.graph.frequencies import frequencies
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model

__all__ = ["turned_keys"]

_FIXED = ("default", "linear", "llama3", "yarn")


def turned_keys(table: np.ndarray, model: Model, positions: int) -> np.ndarray:
    """A table of keys and values ``(tokens, 2 * layers * kv_heads * head_dim)`` with every key turned by `positions`.

    Raises:
        FitError: positions that are not rotary, or whose frequencies depend on the length; a window; keys of which rotation
            is not all (latent attention, a norm behind the rotation, queries scaled by position).
    """
    layers = [layer.attention for layer in model.layers]
    first = layers[0]
    pairs = np.array(table, np.float64).reshape(len(table), len(layers), 2, first.kv_heads, first.head_dim)
    for number, attention in enumerate(layers):
        rope = attention.rope
        if model.embedding.positions or rope is None or rope.parameters["rope_type"] not in _FIXED:
            raise FitError(
                "the two programs give the tokens behind a prefix other positions, which only keys with rotary positions "
                "of one set of frequencies can make up for",
                hint="train it again, or use it with its own program",
            )
        if attention.window is not None:
            raise FitError("the model looks at a window, in which the two programs count a prefix differently")
        angles = frequencies(rope).usual.astype(np.float64) * positions
        if attention.latent is not None or attention.norm_after_rope or attention.query_scale is not None:
            raise FitError(
                "keys of this model cannot be turned: rotation is not all that their scores know of their position"
            )
        half = rope.dims // 2
        keys = pairs[:, number, 0]
        low, high = (
            (slice(0, rope.dims, 2), slice(1, rope.dims, 2))
            if rope.interleaved
            else (slice(half), slice(half, rope.dims))
        )
        one, two = keys[..., low].copy(), keys[..., high].copy()
        keys[..., low] = one * np.cos(angles) - two * np.sin(angles)
        keys[..., high] = two * np.cos(angles) + one * np.sin(angles)
    turned: np.ndarray = pairs.reshape(len(table), -1).astype(np.float32)
    return turned
