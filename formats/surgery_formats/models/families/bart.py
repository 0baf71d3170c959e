# SPDX-License-Identifier: Apache-2.0
"""BART's relatives: encoder and decoder of one shape, over one embedding that is the head as well."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from surgery_formats.models.families.decoder import attention, layer_norm, plain_mlp
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    Attention,
    Branch,
    Cross,
    Embedding,
    HiddenHead,
    LanguageHead,
    Layer,
    Model,
    Projection,
)
from surgery_formats.models.families.settings import MOST_LAYERS, ModelSettings, Sizes
from surgery_formats.models.families.tasks import only_tasks
from surgery_formats.text import show

__all__ = ["BART", "MARIAN", "MBART", "PEGASUS", "seq2seq_layer", "stack_sizes"]

_EPSILON = 1e-5


class _Traits(NamedTuple):
    """How a relative differs: where norms stand, and whether positions are learned."""

    before: bool
    embedding_norm: bool
    final_norm: bool
    learned: bool


_FORMS = {
    "bart": _Traits(before=False, embedding_norm=True, final_norm=False, learned=True),
    "mbart": _Traits(before=True, embedding_norm=True, final_norm=True, learned=True),
    "marian": _Traits(before=False, embedding_norm=False, final_norm=False, learned=False),
    "pegasus": _Traits(before=True, embedding_norm=False, final_norm=True, learned=False),
}
_OFFSET = 2  # of learned positions: rows that fairseq kept for padding


def seq2seq_layer(
    at: str,
    sizes: Sizes,
    settings: ModelSettings,
    *,
    before: bool,
    crossed: bool,
    key_bias: bool = True,
) -> Layer:
    """A layer with BART's names, pre-norm or post-norm; `crossed` ones look at an encoder's result too."""

    def branch(name: str) -> Branch:
        norm = layer_norm(f"{at}.{name}", _EPSILON)
        return Branch(before=norm) if before else Branch(on_sum=norm)

    def attend(name: str) -> Attention:
        made = attention(f"{at}.{name}", sizes, None, bias=True, output="out_proj")
        if key_bias:
            return made
        q, k, v = made.inputs
        return replace(made, inputs=(q, replace(k, bias=""), v))

    return Layer(
        attend("self_attn"),
        branch("self_attn_layer_norm"),
        plain_mlp(f"{at}.fc1", f"{at}.fc2", sizes, settings.activation("activation_function", default="gelu")),
        branch("final_layer_norm"),
        cross=Cross(attend("encoder_attn"), branch("encoder_attn_layer_norm")) if crossed else None,
    )


def stack_sizes(
    settings: ModelSettings,
    side: str,
    *,
    vocabulary: int,
    positions: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
) -> Sizes:
    """The sizes of the ``encoder`` or ``decoder``, which have keys of their own."""
    width = settings.count("d_model", default=hidden)
    number = settings.count(f"{side}_attention_heads", default=heads)
    if width % number:
        raise settings.fault(f"d_model is {width}, which is no multiple of {side}_attention_heads, {number}")
    return Sizes(
        hidden=width,
        inner=settings.count(f"{side}_ffn_dim", default=inner),
        layers=settings.count(f"{side}_layers", default=layers, most=MOST_LAYERS),
        heads=number,
        kv_heads=number,
        head_dim=width // number,
        vocabulary=vocabulary,
        max_positions=positions,
    )


def recipe(settings: ModelSettings) -> Model:
    """Layers of arXiv:1910.13461 (BART), 2001.08210 (mBART), 1804.00344 (Marian) and 1912.08777 (Pegasus)."""
    kind = settings.text("model_type", default="bart")
    form = _FORMS[kind]
    _check(settings, form)
    vocabulary = settings.count("vocab_size", default=58101 if kind == "marian" else 50265)
    settings.only("decoder_vocab_size", vocabulary)
    positions = settings.count("max_position_embeddings", default=1024)
    scaled = settings.flag("scale_embedding", default=False)

    def half(side: str) -> tuple[Sizes, Embedding, tuple[Layer, ...]]:
        sizes = stack_sizes(
            settings, side, vocabulary=vocabulary, positions=positions, hidden=1024, inner=4096, layers=12, heads=16
        )
        at = f"model.{side}"
        table = f"{at}.embed_positions.weight"
        stored = form.learned or not {table, table.removeprefix("model.")}.isdisjoint(settings.names)
        embedding = Embedding(
            "model.shared.weight",
            positions=table if stored else "",
            position_offset=_OFFSET if form.learned else 0,
            scale=sizes.hidden**0.5 if scaled else 1.0,
            norm=layer_norm(f"{at}.layernorm_embedding", _EPSILON) if form.embedding_norm else None,
            sinusoid=0 if stored else positions,
        )
        crossed = side == "decoder"
        made = (
            seq2seq_layer(f"{at}.layers.{n}", sizes, settings, before=form.before, crossed=crossed)
            for n in range(sizes.layers)
        )
        return sizes, embedding, tuple(made)

    sizes, embedding, made = half("encoder")
    encoder = Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=vocabulary,
        embedding=embedding,
        layers=made,
        final_norm=layer_norm("model.encoder.layer_norm", _EPSILON) if form.final_norm else None,
        head=HiddenHead(),
        max_positions=positions,
    )
    sizes, embedding, made = half("decoder")
    head = "lm_head.weight"
    settings.finish()
    return Model(
        kind="decoder",
        hidden=sizes.hidden,
        vocabulary=vocabulary,
        embedding=embedding,
        layers=made,
        final_norm=layer_norm("model.decoder.layer_norm", _EPSILON) if form.final_norm else None,
        head=LanguageHead(
            Projection("model.shared.weight", sizes.hidden, vocabulary),
            bias="final_logits_bias" if "final_logits_bias" in settings.names else "",
        ),
        max_positions=positions,
        unused={head: "tied: the token embedding is used"} if head in settings.names else {},
        encoder=encoder,
    )


def _check(settings: ModelSettings, form: _Traits) -> None:
    """Refuse other classes than those that write text, and switches that say another form."""
    classes = settings.architectures()
    only_tasks(settings, "text2text-generation")
    if classes and not any(name.endswith(("ForConditionalGeneration", "MTModel")) for name in classes):
        raise settings.fault(
            f"architectures is {show(', '.join(classes), 80)}; of this family, only conditional generation is supported"
        )
    for key, said in (
        ("normalize_before", form.before),
        ("normalize_embedding", form.embedding_norm),
        ("add_final_layer_norm", form.final_norm),
        ("static_position_embeddings", not form.learned),
        ("share_encoder_decoder_embeddings", True),
        ("tie_word_embeddings", True),
    ):
        settings.only(key, said)
    settings.raw("quantization_config", "compression_config")


def _family(name: str) -> Family:
    return Family(
        names=(name,),
        embedding="model.shared",
        head="lm_head",
        tied=True,
        inseparable="transformers 5 ties the embeddings of encoder and decoder by the same switch as the head",
        ties=tuple((f"model.{side}.embed_tokens.weight", "model.shared.weight") for side in ("encoder", "decoder")),
        recipe=recipe,
    )


BART, MBART, MARIAN, PEGASUS = map(_family, _FORMS)
