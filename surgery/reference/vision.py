# SPDX-License-Identifier: Apache-2.0
"""The two ends of models of images: patches in, one vector out."""

from __future__ import annotations

import torch

from surgery.reference.experts import transform
from surgery.reference.primitives import Load, normalise, project
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Model, Patches, PooledHead, Probe

__all__ = ["cut_up", "mean_of_patches", "pool"]


def cut_up(pixels: torch.Tensor, patches: Patches, load: Load) -> torch.Tensor:
    """Images ``(B, channels, height, width)`` as tokens ``(B, S, D)``.

    Raises:
        FitError: images of another size.
    """
    if tuple(pixels.shape[1:]) != (patches.channels, *patches.image):
        raise FitError(f"images of {list(pixels.shape[1:])}, but the model takes {[patches.channels, *patches.image]}")
    (height, width), (rows, columns) = patches.image, patches.patch
    down, across = height // rows, width // columns
    cut = pixels[:, :, : down * rows, : across * columns]
    cut = cut.reshape(len(pixels), patches.channels, down, rows, across, columns)
    flat = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), down * across, -1)
    weight = load(patches.weight)
    values = flat @ weight.reshape(len(weight), -1).T
    if patches.bias:
        values = values + load(patches.bias)
    places = load(patches.positions).reshape(-1, values.shape[-1])
    if not patches.first:
        return values + places
    front = [load(patches.first).reshape(1, -1) + places[:1]]
    if patches.registers:
        front.append(load(patches.registers)[0])
    return torch.cat((torch.cat(front).expand(len(pixels), -1, -1), values + places[1:]), dim=1)


def mean_of_patches(values: torch.Tensor, model: Model, with_first: bool) -> torch.Tensor:
    """The mean of the patches, ``(B, D)``, behind the first token's state if `with_first`."""
    assert model.embedding.patches is not None
    mean = values[:, model.embedding.patches.in_front :].mean(1)
    return torch.cat((values[:, 0], mean), dim=-1) if with_first else mean


def pool(values: torch.Tensor, ids: torch.Tensor, head: PooledHead, load: Load) -> torch.Tensor:
    """The vector of each row, ``(B, ...)``."""
    if head.probe is not None:
        return _asked(values, head.probe, load)
    if head.token == "last":
        places = [values.shape[1] - 1] * len(values)
    elif head.token == "first":
        places = [0] * len(values)
    elif head.token == "greatest":
        places = [row.index(max(row)) for row in ids.tolist()]
    else:
        places = [row.index(head.end) if head.end in row else 0 for row in ids.tolist()]
    chosen = normalise(torch.stack([row[place] for row, place in zip(values, places, strict=True)]), head.norm, load)
    return chosen if head.projection is None else project(chosen, head.projection, load)


def _asked(values: torch.Tensor, probe: Probe, load: Load) -> torch.Tensor:
    batch, _, width = values.shape
    query = load(probe.query).expand(batch, 1, width)
    q = project(query, probe.inputs, load)[..., :width]
    k, v = project(values, probe.inputs, load)[..., width:].chunk(2, dim=-1)
    q, k, v = (part.reshape(batch, -1, probe.heads, width // probe.heads).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * (width // probe.heads) ** -0.5
    mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, 1, width)
    result = project(mixed, probe.output, load)
    result = result + transform(normalise(result, probe.norm, load), probe.mlp, load)
    return result[:, 0]
