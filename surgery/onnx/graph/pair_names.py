# SPDX-License-Identifier: Apache-2.0
"""Names of the files, inputs and outputs of an encoder-decoder's graphs: optimum's, which other programs look for."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BEGUN",
    "ENCODER",
    "FIRST",
    "MASK",
    "MERGED",
    "STATES",
    "SWITCH",
    "graph_in",
    "graphs_in",
    "is_main",
    "kept_names",
    "only_graph",
]

ENCODER = "encoder_model.onnx"
FIRST, BEGUN, MERGED = "decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"
"""The decoder's first run, all others, and both in one file."""
_STEM = MERGED.removesuffix(".onnx")  # a layout may tell the type behind it

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""Inputs of decoders: the encoder's result, and which of its tokens are none of padding."""

SWITCH = "use_cache_branch"
"""Input ``(1,)``, bool: whether the branch with a past is meant."""


def kept_names(layers: int, side: str, prefix: str = "past_key_values") -> list[str]:
    """``past_key_values.0.decoder.key``, ``past_key_values.0.decoder.value``, ...; of the `side` ``encoder`` likewise."""
    return [f"{prefix}.{layer}.{side}.{part}" for layer in range(layers) for part in ("key", "value")]


def graph_in(folder: Path, name: str = "model.onnx") -> Path:
    """The main graph of a folder: `name`, or the decoder of a pair, which names its encoder."""
    whole = folder / name
    pairs = sorted(folder.glob(f"{_STEM}*.onnx"))
    return whole if whole.exists() or not pairs else pairs[0]


def graphs_in(folder: Path) -> list[Path]:
    """The files of graphs in a folder."""
    return sorted(one for one in folder.glob("[!.]*.onnx") if one.is_file())


def only_graph(folder: Path) -> Path | None:
    """The graph of a folder that has one alone."""
    return graphs[0] if len(graphs := graphs_in(folder)) == 1 else None


def is_main(name: str) -> bool:
    """Whether a graph of this name stands for its folder: ``model.onnx``, ``model_fp16.onnx``, the decoder of a pair."""
    return name.startswith(("model", _STEM))
