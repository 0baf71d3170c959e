# SPDX-License-Identifier: Apache-2.0
"""Weights that an adapter gives more columns: the input of a network that gets more channels (BFL's control LoRAs).

ComfyUI (``reshape_weight``) and diffusers (``_maybe_expand_transformer_param_shape_or_error_``) fill such a weight up
with zeros, and then add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.arrays import Array, namespace
from surgery_formats.models.names import WeightSlice, extent
from surgery_formats.storage.base import Storage
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.views import whole
from surgery_formats.updates import Update, is_replacing

__all__ = ["grown", "widest"]


def grown(update: Update, places: tuple[WeightSlice, ...]) -> tuple[WeightSlice, ...]:
    """The weight at `places` with as many columns as `update` has, those that the base lacks being zero.

    It is unchanged where the base has them all, and where no zeros can be put behind its rows: a quantised weight, one
    that is a part of another or in parts, one of other rows. That they do not fit is said later.
    """
    height, width = extent(places)
    parameter = places[0].parameter
    storage = parameter.storage
    kernel = math.prod(storage.sizes[2:])
    fits = update.shape[0] == height and update.shape[1] > width and update.shape[1] % kernel == 0
    simple = len(places) == 1 and parameter.is_whole and not parameter.view.transposed and len(storage.sizes) > 1
    if is_replacing(update) or not (fits and simple) or (stored := storage.elements) is None:
        return places
    sizes = (height, update.shape[1] // kernel, *storage.sizes[2:])

    def make() -> Array:
        values = stored.read().reshape(height, width)
        xp = namespace(values)
        return xp.concat([values, xp.zeros((height, update.shape[1] - width), dtype=values.dtype)], axis=1)

    wide = Plain.of(computed(storage.name, sizes, [stored], make, storage.dtype))
    return (replace(places[0], parameter=replace(parameter, storage=wide, view=whole(wide.shape))),)


def widest(storages: Sequence[Storage]) -> Storage:
    """Of one weight before and after it grew, the one with the most columns, in which the others' elements are where they were."""
    return max(storages, key=lambda storage: storage.shape[1])
