# SPDX-License-Identifier: Apache-2.0
"""Shared parts of encoders of images."""

from __future__ import annotations

from typing import Literal

from surgery_formats.models.families.decoder import projection
from surgery_formats.models.families.recipe import (
    Attention,
    ClassifierHead,
    Embedding,
    Head,
    Layer,
    Model,
    Norm,
    Patches,
)
from surgery_formats.models.families.settings import ModelSettings, Sizes, read_sizes
from surgery_formats.models.families.tasks import labels

__all__ = ["classifier_head", "image_model", "image_sizes", "read_pair", "separate_attention"]


def read_pair(settings: ModelSettings, key: str, default: int) -> tuple[int, int]:
    """A height and a width, or one number for both."""
    value = settings.raw(key)
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    size = settings.count(key, default=default)
    return size, size


def image_sizes(settings: ModelSettings) -> Sizes:
    """`read_sizes` without a vocabulary; the number of tokens is told by `Patches`."""
    return read_sizes(
        settings, vocabulary=1, max_positions=1, hidden=768, inner=3072, layers=12, heads=12, grouped=False
    )


def separate_attention(at: str, names: tuple[str, str, str, str], sizes: Sizes, *, bias: bool = True) -> Attention:
    """Attention in module `at` from the modules of queries, keys, values and output; the output has a bias."""
    q, k, v = (projection(f"{at}.{name}", sizes.hidden, sizes.hidden, bias) for name in names[:3])
    output = projection(f"{at}.{names[3]}", sizes.hidden, sizes.hidden, True)
    return Attention((q, k, v), output, sizes.heads, sizes.heads, sizes.head_dim, sizes.head_dim**-0.5)


def classifier_head(
    settings: ModelSettings, sizes: Sizes, tokens: Literal["first", "patches", "first_and_patches"]
) -> ClassifierHead:
    """A projection to the labels of the `tokens` that `ClassifierHead` names."""
    width = 2 * sizes.hidden if tokens == "first_and_patches" else sizes.hidden
    step = projection("classifier", width, labels(settings), True)
    return ClassifierHead(tokens, ((step, None),))


def image_model(
    settings: ModelSettings,
    sizes: Sizes,
    patches: Patches,
    layers: tuple[Layer, ...],
    head: Head,
    *,
    first_norm: Norm | None = None,
    final_norm: Norm | None = None,
    unused: dict[str, str] | None = None,
) -> Model:
    """Assemble the encoder, then check the settings that nobody read.

    `unused` are reasons by the beginnings of names.

    Raises:
        FitError: an image that patches do not divide, or an unread setting that may change the computation.
    """
    settings.raw("quantization_config", "compression_config")  # how weights are stored: their readers see to it
    if any(size % part for size, part in zip(patches.image, patches.patch, strict=True)):
        raise settings.fault(f"patches of {list(patches.patch)} do not divide images of {list(patches.image)}")
    left = {
        name: reason
        for start, reason in (unused or {}).items()
        for name in settings.names
        if name == start or name.startswith(f"{start}.")
    }
    settings.finish()
    return Model(
        kind="encoder",
        hidden=sizes.hidden,
        vocabulary=0,
        embedding=Embedding("", patches=patches, norm=first_norm),
        layers=layers,
        final_norm=final_norm,
        head=head,
        max_positions=patches.in_front + patches.count,
        unused=left,
    )
