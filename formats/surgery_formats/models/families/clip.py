# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP, each tower by itself: transformers 5 dropped ``text_model.`` from the module paths, so files have both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from surgery_formats.models.families.decoder import attention, layer_norm, plain_mlp, pre_norm, projection, root_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.families.recipe import (
    Activation,
    Embedding,
    Head,
    Layer,
    Model,
    Patches,
    PooledHead,
    Probe,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.models.families.vision import classifier_head, image_model, image_sizes, read_pair
from surgery_formats.text import show

__all__ = ["CLIP", "CLIP_TEXT", "CLIP_VISION", "SIGLIP", "SIGLIP_TEXT", "SIGLIP_VISION"]

_OLD_END = 2  # ``eos_token_id`` of the first configurations, which is not the id of the end token
_UNREAD = "the head does not read it"


class _Defaults(NamedTuple):
    """What holds of a kind where config.json is silent; `text` are the sizes of the encoder of texts."""

    activation: str
    epsilon: float
    patch: int
    text: Mapping[str, Any]


_CLIP = _Defaults(
    "quick_gelu",
    1e-5,
    32,
    {"vocabulary": 49408, "max_positions": 77, "hidden": 512, "inner": 2048, "layers": 12, "heads": 8},
)
_SIGLIP = _Defaults(
    "gelu_pytorch_tanh",
    1e-6,
    16,
    {"vocabulary": 32000, "max_positions": 64, "hidden": 768, "inner": 3072, "layers": 12, "heads": 12},
)


def clip_text(settings: ModelSettings) -> Model:
    """A causal text encoder; the state of the end token is the text's (arXiv:2103.00020)."""
    settings.only("add_cross_attention", False)
    root, sizes, layers = _text(settings, _CLIP)
    end = settings.whole("eos_token_id", default=49407)
    head = PooledHead("pooler_output", "greatest" if end == _OLD_END else "end", end)
    if _projects(settings):
        size = settings.count("projection_dim", default=512)
        head = replace(head, output="text_embeds", projection=projection("text_projection", sizes.hidden, size))
    else:
        settings.raw("projection_dim")
    return _text_model(settings, root, sizes, layers, head, _CLIP, "decoder")


def siglip_text(settings: ModelSettings) -> Model:
    """A text encoder that sees both ways; the state of the last token, padding or not, is the text's (arXiv:2303.15343)."""
    root, sizes, layers = _text(settings, _SIGLIP)
    size = settings.count("projection_size", default=sizes.hidden)
    head = PooledHead("pooler_output", "last", projection=projection(f"{root}head", sizes.hidden, size, True))
    return _text_model(settings, root, sizes, layers, head, _SIGLIP, "encoder")


def clip_vision(settings: ModelSettings) -> Model:
    """A class token in front of the patches, and a norm before the first layer."""
    root, sizes, layers, patches = _image(settings, _CLIP, "class_embedding")
    norm = layer_norm(f"{root}post_layernorm", _epsilon(settings, _CLIP))
    head: Head = PooledHead("pooler_output", norm=norm)
    unused: dict[str, str] = {}
    if any(name.endswith("ForImageClassification") for name in settings.architectures()):
        head, unused = classifier_head(settings, sizes, "patches"), {norm.weight: _UNREAD, norm.bias: _UNREAD}
    elif _projects(settings):
        made = projection("visual_projection", sizes.hidden, settings.count("projection_dim", default=512))
        head = PooledHead("image_embeds", norm=norm, projection=made)
    settings.raw("projection_dim")
    first = replace(norm, weight=f"{root}pre_layrnorm.weight", bias=f"{root}pre_layrnorm.bias")
    return image_model(settings, sizes, patches, layers, head, first_norm=first, unused=unused)


def siglip_vision(settings: ModelSettings) -> Model:
    """No class token: a learned query attends to the patches (arXiv:2303.15343)."""
    root, sizes, layers, patches = _image(settings, _SIGLIP)
    epsilon = _epsilon(settings, _SIGLIP)
    has_head = settings.flag("vision_use_head", default=True)
    unused: dict[str, str] = {}
    head: Head
    if any(name.endswith("ForImageClassification") for name in settings.architectures()):
        head, unused = classifier_head(settings, sizes, "patches"), {f"{root}head": _UNREAD}
    elif not has_head:
        raise settings.fault("vision_use_head is False, which is not supported")
    else:
        at = f"{root}head"
        inputs = projection(f"{at}.attention.in_proj", sizes.hidden, 3 * sizes.hidden, True)
        probe = Probe(
            f"{at}.probe",
            replace(inputs, weight=f"{at}.attention.in_proj_weight", bias=f"{at}.attention.in_proj_bias"),
            projection(f"{at}.attention.out_proj", sizes.hidden, sizes.hidden, True),
            sizes.heads,
            layer_norm(f"{at}.layernorm", epsilon),
            plain_mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2", sizes, _activation(settings, _SIGLIP)),
        )
        head = PooledHead("pooler_output", probe=probe)
    final = layer_norm(f"{root}post_layernorm", epsilon)
    return image_model(settings, sizes, patches, layers, head, final_norm=final, unused=unused)


def _classifier_of(tower: Callable[[ModelSettings], Model], single: str) -> Callable[[ModelSettings], Model]:
    def whole(settings: ModelSettings) -> Model:
        """The image tower of a model of both with a classifier; both towers at once are no single graph."""
        classes = settings.architectures()
        inner = settings.mapping("vision_config")
        if inner is None or not any(name.endswith("ForImageClassification") for name in classes):
            raise settings.fault(
                f"architectures is {show(', '.join(classes), 80)}: two towers, each of which is a model of its own; "
                f"save the one that is wanted by its class in transformers ({single})"
            )
        shared = {key: settings.raw(key) for key in ("id2label", "num_labels", "architectures")}
        return tower(ModelSettings({**inner, **shared}, settings.names, settings.task))

    return whole


def _projects(settings: ModelSettings) -> bool:
    return any(name.endswith("WithProjection") for name in settings.architectures())


def _activation(settings: ModelSettings, defaults: _Defaults) -> Activation:
    return settings.activation("hidden_act", default=defaults.activation)


def _epsilon(settings: ModelSettings, defaults: _Defaults) -> float:
    return settings.positive("layer_norm_eps", default=defaults.epsilon)


def _layers(settings: ModelSettings, sizes: Sizes, root: str, defaults: _Defaults) -> tuple[Layer, ...]:
    activation, epsilon = _activation(settings, defaults), _epsilon(settings, defaults)
    return tuple(
        Layer(
            attention(f"{at}.self_attn", sizes, None, bias=True, output="out_proj"),
            pre_norm(layer_norm(f"{at}.layer_norm1", epsilon)),
            plain_mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2", sizes, activation),
            pre_norm(layer_norm(f"{at}.layer_norm2", epsilon)),
        )
        for at in (f"{root}encoder.layers.{index}" for index in range(sizes.layers))
    )


def _text(settings: ModelSettings, defaults: _Defaults) -> tuple[str, Sizes, tuple[Layer, ...]]:
    """What the names begin with, the sizes and the layers of an encoder of texts."""
    sizes = read_sizes(settings, grouped=False, **defaults.text)
    root = root_of(settings, "text_model.", "embeddings.token_embedding.weight")
    return root, sizes, _layers(settings, sizes, root, defaults)


def _text_model(
    settings: ModelSettings,
    root: str,
    sizes: Sizes,
    layers: tuple[Layer, ...],
    head: PooledHead,
    defaults: _Defaults,
    kind: Literal["decoder", "encoder"],
) -> Model:
    settings.raw("quantization_config", "compression_config")  # how weights are stored: their readers see to it
    at = f"{root}embeddings"
    final = layer_norm(f"{root}final_layer_norm", _epsilon(settings, defaults))
    settings.finish()
    return Model(
        kind=kind,
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        embedding=Embedding(f"{at}.token_embedding.weight", positions=f"{at}.position_embedding.weight"),
        layers=layers,
        final_norm=final,
        head=head,
        max_positions=sizes.max_positions,
    )


def _image(
    settings: ModelSettings, defaults: _Defaults, first: str = ""
) -> tuple[str, Sizes, tuple[Layer, ...], Patches]:
    """As `_text` of an encoder of images, and its patches; `first` is the name of the class token, if there is one."""
    sizes = image_sizes(settings)
    root = root_of(settings, "vision_model.", "embeddings.patch_embedding.weight")
    at = f"{root}embeddings"
    patches = Patches(
        f"{at}.patch_embedding.weight",
        "" if first else f"{at}.patch_embedding.bias",
        settings.count("num_channels", default=3),
        read_pair(settings, "image_size", 224),
        read_pair(settings, "patch_size", defaults.patch),
        f"{at}.position_embedding.weight",
        (),
        f"{at}.{first}" if first else "",
        (sizes.hidden,),
    )
    patches = replace(patches, positions_shape=(patches.count + bool(first), sizes.hidden))
    return root, sizes, _layers(settings, sizes, root, defaults), patches


_TEXT = "text_model.embeddings.token_embedding"
CLIP_TEXT = Family(names=("clip_text_model",), embedding=_TEXT, recipe=clip_text)
CLIP_VISION = Family(names=("clip_vision_model",), recipe=clip_vision)
CLIP = Family(
    names=("clip",),
    embedding=_TEXT,
    recipe=_classifier_of(clip_vision, "CLIPVisionModelWithProjection or CLIPTextModelWithProjection"),
)
SIGLIP_TEXT = Family(names=("siglip_text_model",), embedding=_TEXT, recipe=siglip_text)
SIGLIP_VISION = Family(names=("siglip_vision_model",), recipe=siglip_vision)
SIGLIP = Family(
    names=("siglip",), embedding=_TEXT, recipe=_classifier_of(siglip_vision, "SiglipVisionModel or SiglipTextModel")
)
