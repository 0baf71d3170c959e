# SPDX-License-Identifier: Apache-2.0
"""DeBERTa: attention to contents and to distances apart, and in v2 sometimes a convolution behind the first layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgery_formats.models.families.bert import FAMILY as BERT
from surgery_formats.models.families.decoder import projection, root_of
from surgery_formats.models.families.encoder import (
    LayerNames,
    bert_embedding,
    encoder,
    encoder_norm,
    language_head,
    post_norm_layer,
    read_encoder_sizes,
)
from surgery_formats.models.families.recipe import (
    Activation,
    Convolution,
    Disentangled,
    LanguageHead,
    Layer,
    Model,
    Projection,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes
from surgery_formats.text import show

__all__ = ["DEBERTA"]

_KINDS = ("c2p", "p2c")
_NAMES = LayerNames(
    "attention.self.query_proj",
    "attention.self.key_proj",
    "attention.self.value_proj",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


def recipe(settings: ModelSettings) -> Model:
    """He et al. 2020, arXiv:2006.03654, and 2021, arXiv:2111.09543."""
    first = settings.text("model_type", default="") == "deberta"
    if first:
        sizes = read_encoder_sizes(settings, vocabulary=50265)
        settings.only("talking_head", False)
    else:
        sizes = read_encoder_sizes(settings, vocabulary=128100, hidden=1536, inner=6144, layers=24, heads=24)
    if settings.count("attention_head_size", default=sizes.head_dim) != sizes.head_dim:
        raise settings.fault(f"attention_head_size must be hidden_size / num_attention_heads, {sizes.head_dim}")
    epsilon = settings.positive("layer_norm_eps", default=1e-7)
    activation = settings.activation("hidden_act", default="gelu")
    root = root_of(settings, "deberta.", "embeddings.word_embeddings.weight")
    types = settings.whole("type_vocab_size", default=0) > 0
    narrow = settings.count("embedding_size", default=sizes.hidden)
    widening = projection(f"{root}embeddings.embed_proj", narrow, sizes.hidden) if narrow != sizes.hidden else None
    embedding = bert_embedding(settings, root, epsilon, types=types, projection=widening, projected="sum")
    if not settings.flag("position_biased_input", default=True):
        embedding = replace(embedding, positions="")
    compared = _compared(settings)
    distances = _distances(settings, sizes, f"{root}encoder", epsilon, first=first)
    names = ("pos_proj", "pos_q_proj") if first else ("pos_key_proj", "pos_query_proj")
    if not first and settings.flag("share_att_key", default=False):
        names = ("key_proj", "query_proj")
    scale = (sizes.head_dim * (1 + len(compared))) ** -0.5

    def layers() -> Iterator[Layer]:
        for index in range(sizes.layers):
            at, own = f"{root}encoder.layer.{index}", None
            if distances is not None and compared:
                own = _compared_by(distances, f"{at}.attention.self", names, compared, sizes)
            layer = post_norm_layer(settings, sizes, at, _NAMES, activation, epsilon, scale=scale, disentangled=own)
            yield _of_the_first(layer, f"{at}.attention.self", sizes) if first else layer

    pooling = settings.activation("pooler_hidden_act", default="gelu")
    if settings.count("pooler_hidden_size", default=sizes.hidden) != sizes.hidden:
        raise settings.fault(f"pooler_hidden_size is not hidden_size, {sizes.hidden}")
    added = _convolution(settings, f"{root}encoder.conv", epsilon)
    pooler = projection("pooler.dense", sizes.hidden, sizes.hidden, True)
    step: tuple[Projection, Activation] = (pooler, pooling)

    def language() -> LanguageHead:
        if settings.flag("legacy", default=True):
            dense, output = "cls.predictions.transform.dense", "cls.predictions.decoder"
            norm = encoder_norm(settings, "cls.predictions.transform.LayerNorm", epsilon)
            return language_head(settings, sizes, embedding.tokens, dense, norm, output, activation, width=narrow)
        at = "lm_predictions.lm_head"
        dense_step = projection(f"{at}.dense", sizes.hidden, sizes.hidden, True)
        norm = encoder_norm(settings, f"{at}.LayerNorm", epsilon)
        table = Projection(embedding.tokens, sizes.hidden, sizes.vocabulary, f"{at}.bias")
        return LanguageHead(table, dense_step, activation=activation, norm=norm)

    model = encoder(
        settings, sizes, embedding, layers(), before=step, choice=step, language=language, head_modules=("pooler",)
    )
    unread = {} if distances is not None and compared else _unread(settings, f"{root}encoder")
    return replace(model, convolution=added, unused={**model.unused, **unread})


def _compared_by(
    distances: Disentangled, at: str, names: tuple[str, str], compared: tuple[str, ...], sizes: Sizes
) -> Disentangled:
    """`distances` with a layer's projections of its rows, those of v1's keys without a bias."""
    keys, queries = (
        projection(f"{at}.{name}", sizes.hidden, sizes.hidden, name != "pos_proj") if kind in compared else None
        for name, kind in zip(names, _KINDS, strict=True)
    )
    return replace(distances, keys=keys, queries=queries)


def _of_the_first(layer: Layer, at: str, sizes: Sizes) -> Layer:
    """DeBERTa 1 has queries, keys and values of each head in one projection, and biases of two of them beside it."""
    whole = projection(f"{at}.in_proj", sizes.hidden, 3 * sizes.hidden)
    own = replace(layer.attention, inputs=(whole,), layout="by_head", q_bias=f"{at}.q_bias", v_bias=f"{at}.v_bias")
    return replace(layer, attention=own)


def _compared(settings: ModelSettings) -> tuple[str, ...]:
    """What is compared with what: ``c2p``, ``p2c`` or both; a list, or words with ``|`` between them."""
    value = settings.raw("pos_att_type")
    kinds = [kind.strip() for kind in value.lower().split("|")] if isinstance(value, str) else value or []
    if not isinstance(kinds, list) or any(kind not in (*_KINDS, "") for kind in kinds):
        raise settings.fault(f"pos_att_type is {show(value, 60)}, supported are {' and '.join(_KINDS)}")
    return tuple(kind for kind in _KINDS if kind in kinds)


def _distances(settings: ModelSettings, sizes: Sizes, at: str, epsilon: float, *, first: bool) -> Disentangled | None:
    """The embeddings of distances, or None; those of v1 have neither buckets nor a norm."""
    relative = settings.flag("relative_attention", default=False)
    most = _or_none(settings, "max_relative_positions")
    buckets = 0 if first else _or_none(settings, "position_buckets")
    normed = settings.text("norm_rel_ebd", default="none").lower()
    if unknown := {word.strip() for word in normed.split("|")} - {"none", "layer_norm"}:
        raise settings.fault(f"norm_rel_ebd has '{show(min(unknown), 40)}', supported are none and layer_norm")
    if not relative:
        return None
    most = most or sizes.max_positions
    if buckets % 2 or buckets == 2 or buckets // 2 >= max(most - 1, 1):
        raise settings.fault(f"position_buckets is {buckets}, for distances up to {most}")
    has_norm = "layer_norm" in normed and not first
    norm = encoder_norm(settings, f"{at}.LayerNorm", epsilon) if has_norm else None
    return Disentangled(f"{at}.rel_embeddings.weight", buckets or most, norm, buckets, most)


def _or_none(settings: ModelSettings, key: str) -> int:
    """A size, or 0 if it is not above that."""
    value = settings.raw(key)
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        return 0
    return settings.whole(key, default=0)


def _unread(settings: ModelSettings, at: str) -> dict[str, str]:
    """Embeddings of distances that nothing is compared with."""
    names = (f"{at}.{name}" for name in ("rel_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"))
    return dict.fromkeys((name for name in names if name in settings.names), "no score has distances")


def _convolution(settings: ModelSettings, at: str, epsilon: float) -> Convolution | None:
    width, groups = settings.whole("conv_kernel_size", default=0), settings.count("conv_groups", default=1)
    activation = settings.activation("conv_act", default="tanh")
    if not width:
        return None
    if width % 2 == 0:
        raise settings.fault(f"conv_kernel_size is {width}; it must be odd")
    norm = encoder_norm(settings, f"{at}.LayerNorm", epsilon)
    return Convolution(f"{at}.conv.weight", f"{at}.conv.bias", width, groups, activation, norm)


DEBERTA = replace(BERT, names=("deberta-v2", "deberta"), embedding="deberta.embeddings.word_embeddings", recipe=recipe)
