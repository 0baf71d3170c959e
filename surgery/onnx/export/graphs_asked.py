# SPDX-License-Identifier: Apache-2.0
"""The graphs of an export, as they are asked for: what they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.input_options import (
    with_embeddings,
    with_experts,
    with_logits,
    with_positions,
    with_required,
    with_sentence,
)
from surgery.onnx.export.layouts import Layout
from surgery.onnx.export.new_assembly import new_assembly
from surgery.onnx.export.request import ExportedWeights, WeightsAsked
from surgery.onnx.export.weight_options import WITHOUT_ATTENTION
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.tasks import SENTENCE

__all__ = ["GraphsAsked"]


@dataclass(frozen=True, slots=True)
class GraphsAsked:
    """All options that decide the graphs of an export, as `surgery.export_onnx` takes them; `weights` decide their bytes too."""

    weights: WeightsAsked
    required: bool
    packed: bool
    bake_prompt: tuple[str, ...]
    prompt_form: str
    max_length: int | None
    position_ids: bool
    inputs_embeds: bool
    logits: str

    def assembly(self, checkpoint: Checkpoint, roles: AdapterRoles, planned: ExportedWeights) -> Assembly:
        """The model with what adapters, texts and the task add to it.

        Raises:
            FitError, InputError: see `surgery.export_onnx`.
        """
        asked = self.weights
        assembly = new_assembly(
            checkpoint, roles, planned.merged, planned.task, asked.target, asked.dtype,
            self.max_length, self.bake_prompt, self.prompt_form,
        )  # fmt: skip
        assembly = with_experts(assembly, asked.options.experts, older=asked.older)
        required = self.required or (asked.layout == "triton" and bool(assembly.slots))
        return with_required(with_sentence(assembly) if asked.task == SENTENCE else assembly, required, self.packed)

    def completed(self, assembly: Assembly, layout: Layout, *, embedded: bool) -> Assembly:
        """The same with inputs, outputs, operators and companions.

        Args:
            assembly: See `assembly`.
            layout: What program the graphs are for.
            embedded: Whether the graphs will hold their weights.

        Raises:
            FitError: see `surgery.export_onnx`.
        """
        if embedded and assembly.model.encoder is not None:  # every graph holds the weights that it reads
            assembly = replace(assembly, options=replace(assembly.options, prefill=False))
        assembly = with_positions(with_embeddings(assembly, self.inputs_embeds, layout.name), self.position_ids)
        assembly = with_logits(assembly, self.logits)
        opset = self.weights.opset
        if opset is None and self.weights.options.linear == "matmul":
            opset = WITHOUT_ATTENTION
        options = replace(assembly.options, opset=opset, prefill=assembly.options.prefill and layout.companions)
        return replace(assembly, options=options, companions=layout.companions)
