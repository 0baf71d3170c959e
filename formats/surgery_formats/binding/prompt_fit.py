# SPDX-License-Identifier: Apache-2.0
"""Whether a soft prompt fits a model: the width of its embeddings, or the layers and heads of its cache."""

from __future__ import annotations

from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model

__all__ = ["check_prompt"]

_HINT = "is this the base it was trained on?"


def check_prompt(prompt: SoftPrompt, model: Model, *, encoders: bool = False) -> None:
    """Refuse a prompt for a model of other sizes, or for an encoder and its decoder.

    Keys and values are refused for an encoder unless `encoders`, which holds for graphs alone, and its class takes some.

    Raises:
        FitError: it does not fit.
    """
    file, tensor = prompt.table.path, prompt.table.name
    if prompt.submodules != 1:
        raise FitError("the soft prompt is for an encoder and its decoder", file=file, tensor=tensor)
    if prompt.prefix is not None:
        layers = model.caching if model.kind == "decoder" or (encoders and model.takes_past) else ()
        sizes = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in layers}
        size = (prompt.prefix.kv_heads, prompt.prefix.head_dim)
        if not layers:
            raise FitError(
                "the prompt holds keys and values of every layer (P-tuning v2, prefix tuning), which "
                + ("this encoder's class does not take" if encoders else "no encoder takes here"),
                file=file,
                tensor=tensor,
                hint="prompt tuning and P-tuning, whose virtual tokens are embeddings, work in front of an encoder",
            )
        if prompt.prefix.layers != len(layers) or sizes != {size}:
            expected = ", ".join(f"{heads} heads of {dim}" for heads, dim in sorted(sizes))
            raise FitError(
                f"was made for {prompt.prefix.layers} layers with {size[0]} heads of {size[1]}, "
                f"but the model has {len(layers)} with {expected}",
                file=file,
                tensor=tensor,
                hint=_HINT,
            )
        return
    width = model.embedding.projection.inputs if model.embedding.projection else model.hidden
    if prompt.dim != width:
        raise FitError(
            f"the embeddings have {prompt.dim} values, but the model's have {width}",
            file=file,
            tensor=tensor,
            hint=_HINT,
        )
