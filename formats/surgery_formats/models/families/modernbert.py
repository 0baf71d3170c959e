# SPDX-License-Identifier: Apache-2.0
"""ModernBERT: rotary positions, layers that see their neighbours between layers that see all, gated MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from surgery_formats.models.families.decoder import fused_attention, layer_norm, projection, root_of, windows
from surgery_formats.models.families.encoder import encoder
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    MLP,
    Branch,
    ClassifierHead,
    Embedding,
    Head,
    LanguageHead,
    Layer,
    Model,
    Norm,
    Projection,
    Rope,
    SpanHead,
)
from surgery_formats.models.families.rope import ropes_of
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.models.families.tasks import labels as labels_of

__all__ = ["FAMILY"]


def recipe(settings: ModelSettings) -> Model:
    """Warner et al. 2024, arXiv:2412.13663."""
    sizes = read_sizes(
        settings,
        vocabulary=50368,
        max_positions=8192,
        hidden=768,
        inner=1152,
        layers=22,
        heads=12,
        grouped=False,
    )
    epsilon = settings.positive("norm_eps", default=1e-5)
    settings.raw("layer_norm_eps")  # published beside it, and read by nothing
    norm_bias, attention_bias, mlp_bias = (
        settings.flag(key, default=False) for key in ("norm_bias", "attention_bias", "mlp_bias")
    )
    activation = settings.activation("hidden_activation", default="gelu")
    places = _places(settings, sizes)
    root = root_of(settings, "model.", "embeddings.tok_embeddings.weight")

    def norm(name: str) -> Norm:
        return layer_norm(name, epsilon, bias=norm_bias)

    def layer(index: int) -> Layer:
        at, (window, rope) = f"{root}layers.{index}", places[index]
        wide = projection(f"{at}.mlp.Wi", sizes.hidden, 2 * sizes.inner, mlp_bias)
        down = projection(f"{at}.mlp.Wo", sizes.inner, sizes.hidden, mlp_bias)
        return Layer(
            fused_attention(f"{at}.attn.Wqkv", f"{at}.attn.Wo", sizes, rope=rope, bias=attention_bias, window=window),
            Branch(before=norm(f"{at}.attn_norm") if index else None),  # the first layer has the embedding's
            MLP((wide,), down, activation, gated=True),
            Branch(before=norm(f"{at}.mlp_norm")),
        )

    table = f"{root}embeddings.tok_embeddings.weight"
    return encoder(
        settings,
        sizes,
        Embedding(table, norm=norm(f"{root}embeddings.norm")),
        (layer(index) for index in range(sizes.layers)),
        final_norm=norm(f"{root}final_norm"),
        head_modules=("head", "decoder"),
        heads=_heads(settings, sizes, table, norm("head.norm")),
    )


def _heads(settings: ModelSettings, sizes: Sizes, table: str, norm: Norm) -> dict[str, Callable[[], Head]]:
    """What makes the head of each task: all begin with one projection, its activation and a norm."""
    dense = projection("head.dense", sizes.hidden, sizes.hidden, settings.flag("classifier_bias", default=False))
    step = (dense, settings.activation("classifier_activation", default="gelu"))
    decoder_bias = settings.flag("decoder_bias", default=True)
    pooling = settings.text("classifier_pooling", default="cls")
    if pooling not in ("cls", "mean"):
        raise settings.fault("classifier_pooling must be cls or mean")

    def scores(labels: int, *, every: bool = False, choices: bool = False) -> ClassifierHead:
        tokens: Literal["every", "first", "mean"] = "every" if every else "first" if pooling == "cls" else "mean"
        last = projection("classifier", sizes.hidden, labels, True)
        return ClassifierHead(tokens, (step, (last, None)), choices=choices, norm=norm)

    def spans() -> SpanHead:
        return SpanHead(projection("classifier", sizes.hidden, 2, True), step, norm)

    def language() -> LanguageHead:
        weight = table if settings.flag("tie_word_embeddings", default=True) else "decoder.weight"
        output = Projection(weight, sizes.hidden, sizes.vocabulary, "decoder.bias" if decoder_bias else "")
        return LanguageHead(output, step[0], activation=step[1], norm=norm)

    return {
        "text-classification": lambda: scores(labels_of(settings)),
        "token-classification": lambda: scores(labels_of(settings), every=True),
        "multiple-choice": lambda: scores(1, choices=True),
        "fill-mask": language,
        "question-answering": spans,
    }


def _places(settings: ModelSettings, sizes: Sizes) -> list[tuple[int | None, Rope]]:
    """Window and rotation of each layer; ``local_attention`` is the whole width of a window."""
    every = settings.count("global_attn_every_n_layers", default=3)
    near = settings.count("local_attention", default=128) // 2 + 1
    window = windows(settings, sizes, near, (index % every > 0 for index in range(sizes.layers)))
    whole = settings.positive("global_rope_theta", default=160_000.0)
    local = settings.optional_positive("local_rope_theta", 10_000.0) or whole
    settings.only("rope_scaling")  # which would hold for both kinds of layers
    near_rope, whole_rope = ropes_of(settings, sizes, (local, whole))
    return [(near, whole_rope if near is None else near_rope) for near in window]


FAMILY = Family(
    names=("modernbert",),
    embedding="model.embeddings.tok_embeddings",
    head="decoder",
    tied=True,
    recipe=recipe,
)
