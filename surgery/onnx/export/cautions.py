# SPDX-License-Identifier: Apache-2.0
"""What an export warns of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.export.assemble import ROWS, Assembly
from surgery.onnx.export.place import Mode
from surgery.onnx.export.weight_options import OWN
from surgery.onnx.graph.build import GraphSet
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import count, listing, summed_up

if TYPE_CHECKING:
    from surgery.engine.ledger import Ledger

__all__ = ["code_warnings", "graph_warnings", "warnings_before"]

_LOST = 0.5
"""Error of a weight, relative to it, that no rounding to 4 bits makes."""


def graph_warnings(assembly: Assembly, draft: GraphSet) -> list[str]:
    """Warn of what is slow, and of where onnxruntime-genai differs from the graph's contract."""
    contract, warnings = draft.contract, list[str]()
    if assembly.sentence is not None:
        warnings += assembly.sentence.modules.warnings
    if contract.kind != "decoder" or contract.encoder:
        return warnings
    if contract.target == "cuda" and contract.dtype == "fp32":
        warnings.append(
            "fp32 on CUDA has no GroupQueryAttention: the cache grows with every token; --dtype fp16 or bf16 is much "
            "faster"
        )
    if (assembly.component.folder / "modules.json").exists() and contract.task == "text-generation":
        warnings.append(
            "the model has modules of sentence-transformers, and this graph generates text: --task sentence-similarity "
            "makes an embedder of it"
        )
    graph = assembly.for_genai(draft)
    if graph and assembly.options.required:
        warnings.append("onnxruntime-genai runs it with an adapter only: the slots have no default")
    if not graph and not assembly.companions:
        return warnings
    if not graph:
        warnings.append(
            "no genai_config.json: onnxruntime-genai always passes a past of its own, so it cannot stand on keys and "
            "values of a prompt"
        )
        return warnings
    if graph == ROWS or assembly.form == "rows":
        first = assembly.model.vocabulary
        warnings.append(
            f"onnxruntime-genai gets {graph}: there the soft prompt is the token ids {first} to "
            f"{first + assembly.prompts[0].tokens - 1}, to be put in front of a text"
        )
    generation = assembly.component.folder / "generation_config.json"
    ends = [assembly.component.config, read_object(generation) if generation.exists() else {}]
    if all(config.get("eos_token_id") is None for config in ends):
        warnings.append("the model names no eos_token_id; onnxruntime-genai takes token 0 for the end of a text")
    return warnings


def code_warnings(ledger: Ledger) -> list[str]:
    """Warn of weights that scales of 16 bits cannot hold, and of codes that were taken as they are but for some rows."""
    warnings = []
    if lost := [tensor.weight for tensor, error in ledger.coded if error.relative > _LOST]:
        warnings.append(
            f"codes lose most of {count(len(lost))} weights, whose values are too small or too large for scales of 16 "
            f"bits: {listing(summed_up(lost))}"
        )
    if mended := [tensor.weight for tensor, error in ledger.coded if tensor.why.endswith(OWN) and error.error]:
        warnings.append(
            f"some rows of {count(len(mended))} weights are rounded a second time: these codes do not hold their scales: "
            f"{listing(summed_up(mended))}"
        )
    return warnings


def warnings_before(mode: Mode, roles: AdapterRoles, checkpoint: Checkpoint, told: Sequence[str]) -> list[str]:
    """Warn of adapters, of another base, and of weights that two files share."""
    warnings = list(told)
    if others := [named.adapter for named in (*roles.swap, *roles.prefix, *roles.insert)]:
        from surgery_formats.binding.bind import warn_of_other_base

        texts = [f"{adapter.path.name}: {trap}" for adapter in others for trap in adapter.known_issues()]
        warnings += [text for text in (*texts, *warn_of_other_base(others, checkpoint)) if text not in warnings]
    if mode == "link":
        warnings.append(
            "the weights are hard links: onnxruntime loads them, onnx.load refuses them, and a program that writes "
            "into one file changes both"
        )
    return warnings
