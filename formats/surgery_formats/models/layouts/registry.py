# SPDX-License-Identifier: Apache-2.0
"""All families of networks with several layouts, and which of them a base is. To add one, add its file here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from surgery_formats.models.layouts import (
    anima,
    auraflow,
    chroma,
    flux,
    flux2,
    hidream,
    hunyuan_video,
    krea2,
    ltx,
    ltx2,
    lumina2,
    mochi,
    openclip,
    qwen_image,
    sana,
    sd3,
    unet,
    wan,
    z_image,
)
from surgery_formats.models.layouts.index import LayoutIndex
from surgery_formats.models.layouts.rule import Network

__all__ = ["NETWORKS", "indexes_of"]

NETWORKS: tuple[Network, ...] = (
    unet.NETWORK,
    sd3.NETWORK,
    flux.NETWORK,
    chroma.NETWORK,
    flux2.NETWORK,
    wan.NETWORK,
    qwen_image.NETWORK,
    qwen_image.NETWORK_21,
    z_image.NETWORK,
    hunyuan_video.NETWORK,
    ltx.NETWORK,
    ltx2.NETWORK,
    lumina2.NETWORK,
    anima.NETWORK,
    hidream.NETWORK,
    mochi.NETWORK,
    sana.NETWORK,
    auraflow.NETWORK,
    krea2.NETWORK,
    openclip.NETWORK,
)
_ENOUGH = 0.5  # of a base's names have to be a family's


def indexes_of(names: Collection[str], config: Mapping[str, Any]) -> tuple[LayoutIndex, ...]:
    """The families that a base may be of, by its class or else by its names; several where they tell no more.

    Args:
        names: Of its parameters.
        config: Its config.json, or empty.
    """
    if (told := config.get("_class_name", config.get("model_type"))) is not None:
        of_class = tuple(LayoutIndex.of(network, names) for network in NETWORKS if told in network.classes)
        if of_class or "_class_name" not in config:  # diffusers has more classes of a family than are listed
            return of_class
    return _by_names(frozenset(names))


@lru_cache(maxsize=4)  # the parts of a base are told first, then each asks for its own
def _by_names(names: frozenset[str]) -> tuple[LayoutIndex, ...]:
    found = [LayoutIndex.of(network, names) for network in NETWORKS]
    most = max((index.known for index in found), default=0)
    return tuple(index for index in found if index.known == most >= max(1, _ENOUGH * len(names)))
