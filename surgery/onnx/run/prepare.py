# SPDX-License-Identifier: Apache-2.0
"""A decoder made ready: adapters in its slots, a soft prompt in front of its rows, room for its texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from surgery.engine.inputs import StrPath, as_list
from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.onnx.run.adapters import Past, prompt_past
from surgery.onnx.run.chosen_adapters import choose_adapters, slot_arrays
from surgery.onnx.run.decoder import Decoder, default_past, make_decoder
from surgery.onnx.run.opening import GraphSession

__all__ = ["chosen_past", "prepare_decoder", "sized_decoder"]


def prepare_decoder(
    opened: GraphSession,
    *,
    batch: int,
    max_length: int,
    adapters: StrPath | Sequence[StrPath] = (),
    prompt_adapter: StrPath | None = None,
) -> tuple[Decoder, Past | None]:
    """A decoder with adapters in its slots and a soft prompt in front of its rows.

    Args:
        opened: The graph.
        batch: Rows.
        max_length: Most tokens per row besides virtual ones; cut to what the graph takes.
        adapters: ``.onnx_adapter`` files of LoRA factors, or names, see `choose_adapters`.
        prompt_adapter: ``.onnx_adapter`` file of a soft prompt, instead of the graph's own.

    Raises:
        FitError: an adapter that does not fit the graph.
    """
    slots = slot_arrays(choose_adapters(as_list(adapters), opened), opened)
    past = chosen_past(opened, prompt_adapter)
    return sized_decoder(opened, batch, max_length, slots, past), past


def chosen_past(opened: GraphSession, prompt_adapter: StrPath | None, *, own: bool = True) -> Past | None:
    """The keys and values in front of every row: those of a file, or the graph's `own`; None if there are none.

    Raises:
        NotFoundError: no such file.
        FitError: they do not fit the graph.
    """
    if prompt_adapter is not None:
        check_adapter_file(prompt_adapter, opened.path, prompt=True)
        return prompt_past(read_adapter_file(prompt_adapter), opened.contract, file=os.fspath(prompt_adapter))
    return default_past(opened) if own else None


def sized_decoder(
    opened: GraphSession, batch: int, max_length: int, slots: Mapping[str, npt.NDArray[Any]], past: Past | None
) -> Decoder:
    """A decoder of `batch` rows with `max_length` tokens besides those of `past`, or as many as the graph takes.

    Raises:
        FitError: see `make_decoder`.
    """
    whole = max_length + (past.tokens if past else 0)
    length = min(whole, opened.contract.max_length)
    return make_decoder(opened, batch=batch, max_length=length, slots=slots, past=past)
