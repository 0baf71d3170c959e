# SPDX-License-Identifier: Apache-2.0
"""Graphs of other exporters: a contract inferred from their inputs, their nodes and the files beside them.

The names are common to optimum, onnxruntime-genai's builder and this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from surgery.onnx.graph.contract import Contract, Slot
from surgery.onnx.run.ports import Port
from surgery.onnx.run.token_tables import token_tables
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.bounded_json import read_object

__all__ = ["guessed_contract", "longest_of", "named_slots"]

_BESIDE = "copy the file that the exporter wrote, or the config.json of the base, beside the graph"
_ENDLESS = 2**31 - 1  # a cache that grows, over positions that are computed: nothing in the graph ends it
_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def guessed_contract(
    path: Path, inputs: Mapping[str, Port], outputs: Mapping[str, Port], device: Literal["cpu", "cuda"] | str
) -> Contract:
    """Infer the contract of the graph `path`.

    Raises:
        FitError: the inputs are not those of a language model, or the length limit is unknown.
    """
    if "input_ids" not in inputs:
        raise FitError("there is no input 'input_ids': not a language model, or one with other names", file=path)
    config = _beside(path, "config.json")
    genai = _object(_beside(path, "genai_config.json"), "model")
    keys = [name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")]
    if not keys:
        first = next(iter(outputs.values()))
        return Contract(
            kind="encoder",
            task="feature-extraction",
            target=device,
            dtype=_NAMES.get(first.dtype.name, ""),
            padding="any",
            cache="none",
            layers=0,
            kv_heads=0,
            head_dim=0,
            vocabulary=0,
            max_length=longest_of(path),
        )
    key, logits = inputs[keys[0]], outputs.get("logits")
    if logits is None or len(key.shape) != 4 or not isinstance(key.shape[1], int):
        raise FitError("the cache is not [batch, heads, past, size], or there is no output 'logits'", file=path)
    size = key.shape[3]  # onnxruntime-genai's builder leaves it symbolic
    if not isinstance(size, int):
        size = _object(genai, "decoder").get("head_size") or config.get("head_dim")
    if not isinstance(size, int) or size < 1:
        raise FitError(
            "neither the graph, genai_config.json nor config.json gives the size of a head", file=path, hint=_BESIDE
        )
    grouped = _has_grouped_attention(path)
    length = longest_of(path)
    if not length and grouped:
        raise FitError(
            "neither the graph, genai_config.json nor config.json gives the greatest sequence length",
            file=path,
            hint=_BESIDE,
        )
    width = logits.shape[-1] if isinstance(logits.shape[-1], int) else config.get("vocab_size")
    if not isinstance(width, int) or width < 1:
        raise FitError("neither the graph nor config.json gives the size of the vocabulary", file=path, hint=_BESIDE)
    return Contract(
        kind="decoder",
        task="text-generation",
        target=device,
        dtype=_NAMES.get(key.dtype.name, ""),
        padding="right" if grouped else "left",
        cache="shared" if grouped else "growing",
        layers=len(keys),
        kv_heads=key.shape[1],
        head_dim=size,
        vocabulary=width,
        max_length=length or _ENDLESS,
        prefill_batch=not grouped,
    )


def longest_of(path: Path) -> int:
    """Most tokens of a row: by the files beside the graph `path`, else by its table of positions; 0 if nothing says."""
    beside = _object(_beside(path, "genai_config.json"), "model").get("context_length")
    for limit in (beside, _beside(path, "config.json").get("max_position_embeddings")):
        if isinstance(limit, int) and limit > 0:
            return limit
    return token_tables(path).places


def named_slots(names: Iterable[str]) -> tuple[Slot, ...]:
    """The slots that the names of inputs tell: Olive's, TensorRT Edge-LLM's and ours."""
    from surgery_formats.adapters.onnx_adapter.names import factor_name, factor_pairs

    named = [(factor_name(A), A, B) for A, B in factor_pairs(names)]
    return tuple(Slot(f"{found.module}.weight", A, B) for found, A, B in named if found is not None)


def _beside(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(path.parent / name)
    except NotFoundError:
        return {}


def _object(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, or an empty one."""
    inner = parent.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _has_grouped_attention(path: Path) -> bool:
    """Whether attention keeps past and present in one buffer."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return any(node.op_type == "GroupQueryAttention" for node in graph.node)
