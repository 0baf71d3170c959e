# SPDX-License-Identifier: Apache-2.0
"""Whisper: an encoder of sound, and a decoder whose embedding is the head, named ``proj_out``."""

from __future__ import annotations

from surgery_formats.models.families.bart import seq2seq_layer, stack_sizes
from surgery_formats.models.families.decoder import layer_norm
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    AudioStem,
    Embedding,
    HiddenHead,
    LanguageHead,
    Layer,
    Model,
    Projection,
    TimeConvolution,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes
from surgery_formats.models.families.tasks import only_tasks
from surgery_formats.text import show

__all__ = ["FAMILY"]

_TOKENS = "model.decoder.embed_tokens.weight"


def recipe(settings: ModelSettings) -> Model:
    """Pre-norm layers, a stem of two convolutions, no bias of keys (arXiv:2212.04356)."""
    classes = settings.architectures()
    only_tasks(settings, "automatic-speech-recognition")
    if classes and not any(name.endswith("ForConditionalGeneration") for name in classes):
        raise settings.fault(
            f"architectures is {show(', '.join(classes), 80)}; of this family, only conditional generation is supported"
        )
    settings.only("tie_word_embeddings", True)
    settings.raw("quantization_config", "compression_config", "scale_embedding")  # the program has no use for the last
    vocabulary = settings.count("vocab_size", default=51865)
    source, target = (
        settings.count(f"max_{name}_positions", default=n) for name, n in (("source", 1500), ("target", 448))
    )

    def half(side: str, positions: int) -> tuple[Sizes, tuple[Layer, ...]]:
        sizes = stack_sizes(
            settings, side, vocabulary=vocabulary, positions=positions, hidden=384, inner=1536, layers=4, heads=6
        )
        crossed = side == "decoder"
        return sizes, tuple(
            seq2seq_layer(f"model.{side}.layers.{n}", sizes, settings, before=True, crossed=crossed, key_bias=False)
            for n in range(sizes.layers)
        )

    sizes, layers = half("encoder", source)
    bins = settings.count("num_mel_bins", default=80)
    steps = tuple(
        TimeConvolution(f"model.encoder.conv{n}.weight", f"model.encoder.conv{n}.bias", inputs, sizes.hidden, stride=n)
        for n, inputs in ((1, bins), (2, sizes.hidden))
    )
    encoder = Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=vocabulary,
        embedding=Embedding(
            "", positions="model.encoder.embed_positions.weight", stem=AudioStem(bins, 2 * source, steps)
        ),
        layers=layers,
        final_norm=layer_norm("model.encoder.layer_norm", 1e-5),
        head=HiddenHead(),
        max_positions=source,
    )
    sizes, layers = half("decoder", target)
    settings.finish()
    return Model(
        kind="decoder",
        hidden=sizes.hidden,
        vocabulary=vocabulary,
        embedding=Embedding(_TOKENS, positions="model.decoder.embed_positions.weight"),
        layers=layers,
        final_norm=layer_norm("model.decoder.layer_norm", 1e-5),
        head=LanguageHead(Projection(_TOKENS, sizes.hidden, vocabulary)),
        max_positions=target,
        unused={"proj_out.weight": "tied: the token embedding is used"} if "proj_out.weight" in settings.names else {},
        encoder=encoder,
    )


FAMILY = Family(names=("whisper",), embedding="model.decoder.embed_tokens", head="proj_out", tied=True, recipe=recipe)
