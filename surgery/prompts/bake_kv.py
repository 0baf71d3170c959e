# SPDX-License-Identifier: Apache-2.0
"""Ready keys and values of a soft prompt or a text, in files that transformers and onnxruntime load as a past."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery._version import __version__
from surgery.engine.card import CARD, adapter_table, card, measured_table, model_name, name_of
from surgery.engine.card_metadata import card_metadata
from surgery.engine.recorded import recorded_recipe
from surgery.onnx.export.prompt_past import Prompt, WeightLocation, computed_past, of_adapter, stored_past
from surgery.onnx.graph.build import GraphOptions
from surgery.onnx.graph.target import TARGETS
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery.onnx.run.tokenizer import open_tokenizer
from surgery.prompts.bake_result import BakeResult
from surgery.prompts.conversion import check_positions
from surgery.reports.markdown import markdown_rows
from surgery_formats.adapters.soft_prompts import soft_prompt
from surgery_formats.arrays import all_finite, cast
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.safetensors import layout
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.identity import fingerprint
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["KeyValues", "key_values", "write_key_values"]

CACHE, ONNX = "past.safetensors", "past.onnx_adapter"
_LOADING = """\
past = load_file("{0}/past.safetensors")
pairs = [(past[f"key.{{i}}"], past[f"value.{{i}}"]) for i in range(len(past) // 2)]
model.generate(**inputs, past_key_values=DynamicCache(pairs))"""


@dataclass(frozen=True)
class KeyValues:
    """Keys and values before they are written.

    Attributes:
        adapter: The prompt; None of a text.
        base: The model.
        arrays: ``key.0``, ``value.0`` ...: ``(1, kv_heads, n, head_dim)``.
        dtype: Type to store them in.
        facts: What identifies the inputs.
        result: What will be reported.
    """

    adapter: Adapter | None
    base: Checkpoint
    arrays: Mapping[str, np.ndarray]
    dtype: DType
    facts: Mapping[str, object]
    result: BakeResult


def key_values(adapter: Adapter | None, text: str | None, base: Checkpoint, dtype: DType | None) -> KeyValues:
    """The keys and values that the model computes of a prompt, or of a text; those of prefix tuning are taken as they are.

    Raises:
        FitError: no recipe for the model, another base, no decoder, or an empty text.
    """
    component = base.main
    model = model_of(component.config, component.parameters.keys())
    if not model.generates:
        raise FitError("an encoder has no cache", file=component.folder)
    if adapter is not None:
        if adapter.updates and adapter.prompt is not None:
            raise FitError(f"it also changes {len(adapter.updates)} weights of the model", file=adapter.path)
        check_positions(adapter, soft_prompt(adapter))
        prompt = of_adapter("prompt", adapter, model)
    else:
        ids = tuple(open_tokenizer(component.folder).encode(text or ""))
        if not text or not ids:
            raise FitError("the text to bake is empty")
        prompt = Prompt("text", "TEXT", len(ids), ids=ids)
    if prompt.embeddings is None and not prompt.ids:
        past = stored_past(prompt, len(model.layers))
    else:
        options = GraphOptions(TARGETS["cpu"], DType.F32)
        (past,) = computed_past([prompt], component, model, options, WeightLocation(component.folder))
    stored = dtype or component.dtype
    exact = {_short(name): np.ascontiguousarray(values) for name, values in past.items()}
    arrays = {name: cast(values, stored) for name, values in exact.items()}
    if not all(all_finite(values) for values in arrays.values()):
        raise FitError(f"NaN, Inf, or a value too large for {stored.label}")
    greatest = max(float(np.abs(values).max()) for values in exact.values()) or 1.0
    error = max(float(np.abs(cast(arrays[name], DType.F32) - values).max()) for name, values in exact.items())
    result = BakeResult(
        None,
        "kv",
        None if adapter is None else adapter.path,
        base.path,
        prompt.kind,
        prompt.tokens,
        rounding=error / greatest,
        files={
            CACHE: "keys and values, for transformers' DynamicCache",
            ONNX: "the same as inputs of an exported graph",
        },
        warnings=_warnings(prompt),
    )
    facts = {
        "base": {shard.path.name: fingerprint(shard.file) for shard in component.shards},
        "prompt": text if adapter is None else sorted(fingerprint(file) for file in adapter.files),
        "dtype": stored.label,
    }
    return KeyValues(adapter, base, arrays, stored, facts, result)


def write_key_values(found: KeyValues, output: Path, *, overwrite: bool, inputs: tuple[Path, ...]) -> BakeResult:
    """Write both files, and read them back.

    Raises:
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    job = hashlib.sha256(json.dumps([__version__, "prompt bake", found.facts], sort_keys=True).encode()).hexdigest()
    names = sorted(found.arrays, key=lambda name: (int(name.partition(".")[2]), name))
    metadata = {"format": "pt", "surgery.prompt": found.result.kind, "surgery.tokens": str(found.result.tokens)}
    specs = [(name, found.dtype, found.arrays[name].shape) for name in names]
    header, ranges = layout(specs, metadata, 1)
    data = bytearray(max(offset + nbytes for offset, nbytes in ranges.values()))
    data[: len(header)] = header
    for name, (offset, nbytes) in ranges.items():
        data[offset : offset + nbytes] = as_bytes(np.ascontiguousarray(found.arrays[name]))
    with output_folder(output, job, overwrite=overwrite, inputs=inputs) as folder:
        folder.write_small(CACHE, bytes(data))
        folder.write_small(ONNX, adapter_bytes({_long(name): found.arrays[name] for name in names}))
        folder.write_small(CARD, _card(found))
        written = {tensor.name: tensor for tensor in open_shard(folder.staged / CACHE).tensors}
        for name, values in found.arrays.items():
            if name not in written or bytes(as_bytes(written[name].read())) != bytes(as_bytes(values)):
                raise ProofError("was not written as it was computed", file=output, tensor=name)
        account = {"plan": job, "inputs": dict(found.facts), "bake": found.result.as_manifest()}
        folder.commit(account | recorded_recipe())
    return replace(found.result, output=output, loading=_LOADING.format(output))


def _card(found: KeyValues) -> bytes:
    """The model card."""
    adapter, base, result = found.adapter, found.base, found.result
    told = () if adapter is None else (adapter.base_name,)
    head = card_metadata(
        base.path, hub_name(base, told), relation="adapter", library="transformers", tags=(result.kind.lower(),)
    )
    what = "A text" if adapter is None else name_of(adapter.path)
    tables = [] if adapter is None else [adapter_table([(adapter, 1.0)])]
    title = f"{what} as keys and values of {model_name(base)}"
    return card(head, title, *tables, measured_table(markdown_rows(result.figures())), warnings=result.warnings)


def _short(name: str) -> str:
    """``past_key_values.3.key`` -> ``key.3``."""
    _, number, part = name.split(".")
    return f"{part}.{number}"


def _long(name: str) -> str:
    part, _, number = name.partition(".")
    return f"past_key_values.{number}.{part}"


def _warnings(prompt: Prompt) -> tuple[str, ...]:
    if prompt.ids:
        return ("it has the text's first token: encode what follows without special tokens",)
    return ()
