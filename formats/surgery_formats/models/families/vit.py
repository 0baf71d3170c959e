# SPDX-License-Identifier: Apache-2.0
"""ViT and its relatives: transformers 5 flattened the module tree, but checkpoints keep the old names."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.models.families.decoder import layer_norm, plain_mlp, pre_norm, projection, root_of
from surgery_formats.models.families.family import Family, Rename
from surgery_formats.models.families.recipe import Head, HiddenHead, Layer, Model, Patches
from surgery_formats.models.families.settings import ModelSettings, Sizes
from surgery_formats.models.families.vision import (
    classifier_head,
    image_model,
    image_sizes,
    read_pair,
    separate_attention,
)
from surgery_formats.text import show

__all__ = ["ATTENTION_NAMES", "FAMILY", "NAMES_ONLY", "embedded_patches"]

ATTENTION_NAMES = ("attention.query", "attention.key", "attention.value", "output.dense")
"""Of queries, keys, values and output, below a layer's attention."""


def recipe(settings: ModelSettings) -> Model:
    """Pre-norm layers over patches and a class token, of which the class token is classified (arXiv:2010.11929)."""
    sizes = image_sizes(settings)
    epsilon = settings.positive("layer_norm_eps", default=1e-12)
    activation = settings.activation("hidden_act", default="gelu")
    bias = settings.flag("qkv_bias", default=True)
    classes = settings.architectures()
    if not all(name in ("ViTForImageClassification", "ViTModel") for name in classes):
        raise settings.fault(
            f"architectures is {show(', '.join(classes), 80)}; supported are ViTForImageClassification, ViTModel"
        )
    root = root_of(settings, "vit.", "embeddings.cls_token")
    at = f"{root}embeddings"
    patches = embedded_patches(settings, at, sizes, 16)

    def layer(at: str) -> Layer:
        return Layer(
            separate_attention(f"{at}.attention", ATTENTION_NAMES, sizes, bias=bias),
            pre_norm(layer_norm(f"{at}.layernorm_before", epsilon)),
            plain_mlp(f"{at}.intermediate.dense", f"{at}.output.dense", sizes, activation),
            pre_norm(layer_norm(f"{at}.layernorm_after", epsilon)),
        )

    head: Head = classifier_head(settings, sizes, "first")
    if any(name.endswith("Model") for name in classes):
        settings.only("pooler_act", "tanh")
        size = settings.count("pooler_output_size", default=sizes.hidden)
        pooler = projection(f"{root}pooler.dense", sizes.hidden, size, True)
        head = HiddenHead(pooler if pooler.weight in settings.names else None)
    return image_model(
        settings,
        sizes,
        patches,
        tuple(layer(f"{root}encoder.layer.{index}") for index in range(sizes.layers)),
        head,
        final_norm=layer_norm(f"{root}layernorm", epsilon),
        unused={f"{at}.mask_token": "only pretraining reads it"}
        | ({} if isinstance(head, HiddenHead) else {f"{root}pooler": "the head does not read the pooler"}),
    )


def embedded_patches(settings: ModelSettings, at: str, sizes: Sizes, patch: int, registers: int = 0) -> Patches:
    """The patches of ViT's module `at`, behind a class token and `registers`; `patch` is their size by default."""
    patches = Patches(
        f"{at}.patch_embeddings.projection.weight",
        f"{at}.patch_embeddings.projection.bias",
        settings.count("num_channels", default=3),
        read_pair(settings, "image_size", 224),
        read_pair(settings, "patch_size", patch),
        f"{at}.position_embeddings",
        (),
        f"{at}.cls_token",
        (1, 1, sizes.hidden),
        f"{at}.register_tokens" if registers else "",
        registers,
    )
    return replace(patches, positions_shape=(1, patches.count + 1, sizes.hidden))


_RENAMES = (
    Rename("layers", "encoder.layer"),
    Rename("attention.q_proj", "attention.attention.query"),
    Rename("attention.k_proj", "attention.attention.key"),
    Rename("attention.v_proj", "attention.attention.value"),
    Rename("attention.o_proj", "attention.output.dense"),
    Rename("mlp.fc1", "intermediate.dense"),
    Rename("mlp.fc2", "output.dense"),
)
FAMILY = Family(names=("vit",), renames=_RENAMES, recipe=recipe)
NAMES_ONLY = Family(
    names=("deit", "beit", "vit_mae", "vit_msn", "ijepa", "vivit", "audio-spectrogram-transformer"),
    renames=_RENAMES,
)
