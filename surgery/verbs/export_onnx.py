# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint as ONNX graphs that use its weight files as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.engine.execute import Run
from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, as_checkpoint, as_list, local_path
from surgery.engine.ledger import Ledger
from surgery.onnx.export.adapters import AdapterRoles, sort_adapters
from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.cautions import code_warnings, graph_warnings, warnings_before
from surgery.onnx.export.export_card import export_card
from surgery.onnx.export.graph_files import GraphFiles, graph_files
from surgery.onnx.export.graphs_asked import GraphsAsked
from surgery.onnx.export.half_range import issues_of_types, measured_values, reach_of_values
from surgery.onnx.export.identity import export_facts, export_id
from surgery.onnx.export.input_options import check_fused
from surgery.onnx.export.layouts import Arrangement, arrange, check_layout, layout_named, layout_warnings
from surgery.onnx.export.pairs import whole_graphs
from surgery.onnx.export.place import ExportJob, ExportOutcome, Mode, choose_mode, write_export
from surgery.onnx.export.prompt_past import WeightLocation
from surgery.onnx.export.request import ExportedWeights, WeightsAsked, in_shares
from surgery.onnx.export.result import ExportResult
from surgery.onnx.export.side_files import side_files_of
from surgery.onnx.export.weight_options import WeightOptions
from surgery.onnx.export.weights_mode import weights_mode
from surgery.onnx.export.weights_to_write import check_written
from surgery.onnx.graph.build import GraphSet
from surgery.onnx.graph.contract import Contract
from surgery.onnx.run.adapter_file import SmallFiles
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File, open_file
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.engine.shares.work import EngineLike
    from surgery.reference.stored import Stored

__all__ = ["ExportResult", "export_onnx"]


@timed
def export_onnx(
    base: CheckpointLike,
    adapters: AdaptersLike = (),
    *,
    output: StrPath,
    task: str | None = None,
    merge: AdaptersLike = (),
    swap: AdaptersLike = (),
    prefix: AdaptersLike = (),
    required: bool = False,
    packed: bool = False,
    bake_prompt: str | Sequence[str] = (),
    prompt_form: str = "auto",
    merge_to: str = "delta",
    target: str = "cpu",
    dtype: str = "auto",
    weights: str = "auto",
    layout: str = "plain",
    weights_type: str = "stored",
    block: int = 32,
    symmetric: bool = True,
    scales: str = "minmax",
    rounding: str | None = None,
    calibration: StrPath | None = None,
    embeddings: str = "auto",
    head: str = "auto",
    budget: int | None = None,
    linear: str = "auto",
    experts: str = "auto",
    range_text: str | None = None,
    max_length: int | None = None,
    position_ids: bool = False,
    inputs_embeds: bool = False,
    logits: str = "auto",
    opset: int | None = None,
    verify_copies: bool = False,
    overwrite: bool = False,
    engine: EngineLike | None = None,
    progress: Callback | None = None,
) -> ExportResult:
    """Write ``model.onnx`` and what belongs to it into a folder.

    Args:
        base: Hugging Face folder, or an opened Checkpoint.
        adapters: One or several, as `surgery.merge` takes them: soft prompts go in front, bottlenecks and invertible adapters
            are inserted, all others are merged.
        output: Folder to make, or the base's own, to which files are only added.
        task: What the graph is for, as the Hub names it: ``text-classification``, ``feature-extraction`` ...; None for what
            the model was saved for.
        merge: Adapters to merge, with or without weights.
        swap: Adapters for slots, with or without weights: the graph is the base until one is given to a run. Heads,
            biases and norms that they hold in full are inputs too.
        prefix: Soft prompts; the first one is the default.
        required: Whether slots are inputs without a default, for runtimes that pass no optional ones (JavaScript, Triton).
        packed: Whether slots of weights with the same input (queries, keys and values; gate and up) are one, whose factors an
            ``.onnx_adapter`` of this export fills: fewer and larger products.
        bake_prompt: Texts that stand in front, read once, now.
        prompt_form: Of soft prompts in a decoder: ``kv``: keys and values, the default past (``auto``); ``rows``:
            behind the vocabulary.
        merge_to: ``delta``: changed tensors in a file beside the base's; ``full``: all weights anew, laid out for
            graphs.
        target: ``cuda``, ``cpu`` or ``portable``.
        dtype: Of arithmetic, logits and cache: ``auto``, ``fp32``, ``fp16``, ``bf16``.
        weights: ``auto``: used where they lie if `output` is their folder, else copied, their blocks shared where the
            file system can; ``reference``, ``link``, ``copy``, ``embed``.
        layout: Names and places of files, as a program looks for them: ``plain``, ``transformers.js`` (an encoder-decoder's
            weights are embedded), ``optimum``, ``sentence-transformers``, ``genai``, ``triton``.
        weights_type: Of the weights: ``stored``: as they are; ``int4``, ``int8``: codes in blocks, for MatMulNBits;
            ``mixed``: of both, and none, where they help most within `budget`; ``fp8``: float8_e4m3fn with a scale for each
            output, which become numbers at load.
        block: Of codes: inputs that share a scale, 32, 64 or 128.
        symmetric: Of codes: no zero points are stored.
        scales: Of codes: ``minmax``: from the extremes of a block; ``search``: of the least error.
        rounding: Of codes: ``feedback``, the default with a `calibration`, makes up for errors along its inputs and those that a
            merged adapter listens to; ``nearest``.
        calibration: Of codes: a file of inputs (docs/extraction.md).
        embeddings: Of codes: the token table: ``auto``: as a head that is tied to it, else kept; ``keep``, ``int8``, ``int4``.
        head: Of codes: the same of the projection onto the vocabulary; ``auto``: as all weights.
        budget: Of ``mixed``: most bytes of all weights.
        linear: ``matmul``: linear maps as MatMul with weights of inputs by outputs, which onnxruntime's quantisers look
            for; all weights are written, in the graph's type.
        experts: ``auto``: codes of a layer's experts in one com.microsoft.QMoE, where the target computes exactly what they
            stand for (4 bits on ``cpu``), which needs onnxruntime 1.31; ``fused``: stored weights in one com.microsoft.MoE,
            too, which a runtime puts together when it loads the graph; ``apart``: each by itself, as with `opset` and for
            transformers.js.
        range_text: File of a text on which the values are measured that a graph of fp16 stores, or ``words``: tokens from
            all over the vocabulary; None does not measure. The model is computed for it once, in float32.
        max_length: Longest sequence; None for as long as the model was made for.
        position_ids: Whether positions are an input of a decoder, as clients of other exporters give them.
        inputs_embeds: Whether a decoder takes embeddings instead of token ids, as from an encoder of images; ``embed_tokens.onnx``
            makes those of a text.
        logits: Of which positions a decoder computes logits: ``all``; ``input``: of as many last ones as the optional input
            ``num_logits_to_keep`` says; ``auto``: ``input`` but for ``cuda``.
        opset: Set of ONNX's operators, 17 to 23, for older runtimes; None for the least that the graph's operators need.
        verify_copies: Compare copied weights byte by byte too, and note the sha256 of every file.
        overwrite: Replace an existing output, atomically.
        engine: Where weights are computed that the graphs do not have from the base's files: None or ``local`` is this process,
            ``ray`` and ``ray:HOST:PORT`` a cluster (docs/scale-out.md). Never changes the result.
        progress: Called with every step of a merge.

    Raises:
        UsageError: an argument of a wrong type.
        InputError: base or adapter cannot be read.
        FitError: an architecture without a recipe; a tensor missing, left over or misshapen; a type the target cannot
            run; an adapter that does not fit, or that a slot or a prompt cannot hold.
        NothingChangedError: the merge would change nothing.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    where = local_path(output, "output")
    options_of_weights = WeightOptions(
        weights_type, block, symmetric, scales, rounding, calibration, embeddings, head, budget, linear, experts
    )
    asked = WeightsAsked(task, merge_to, target, dtype, layout, opset, options_of_weights)
    graphs = GraphsAsked(
        asked, required, packed, tuple(as_list(bake_prompt)), prompt_form, max_length,
        position_ids, inputs_embeds, logits,
    )  # fmt: skip
    run = Run(verify_copies=verify_copies, overwrite=overwrite, progress=progress)
    shared = None
    if engine is not None and engine != "local":
        shared = in_shares(engine, base, (adapters, merge, swap, prefix), asked, run)
    checkpoint = as_checkpoint(base)
    if any(component.made for component in checkpoint.components.values()):
        raise FitError("is not written yet, and a graph refers to files", file=checkpoint.path, hint="write it first")
    roles = sort_adapters(adapters, merge, swap, prefix)
    shape = layout_named(layout)
    planned = asked.planned(checkpoint, roles)
    assembly = graphs.assembly(checkpoint, roles, planned)
    in_place = weights == "auto" and choose_mode("auto", where, checkpoint.main.folder, ()) == "reference"
    if weights == "auto" and shape.numbered and assembly.model.encoder is not None and not in_place:
        weights = "embed"  # one file of weights would have to have two names
    assembly = graphs.completed(assembly, shape, embedded=weights == "embed")
    draft = assembly.draft()
    check_fused(draft, experts)
    check_layout(shape, draft.contract, genai=bool(assembly.for_genai(draft)), embedded=weights == "embed" or in_place)
    sources = tuple(file for file in draft.files if isinstance(file, File))
    mode = weights_mode(weights, where, checkpoint.main, sources, planned.merged, assembly, full=planned.full)
    kind = {"stored": draft.contract.dtype, "mixed": "int4"}.get(weights_type, weights_type)
    written = _ExportOutput(
        where, checkpoint, roles, planned, assembly, draft, sources, mode, arrange(shape, mode, draft, kind)
    )
    if range_text is not None:
        plan = planned.merged.plan if planned.merged else None
        written.seen = measured_values(assembly.component, plan, planned.task, range_text)
    placed = write_export(written.job(kind), where, mode, checkpoint.main.folder, run, shared)
    # a graph beside its weights costs no look at them
    return written.result(placed, read=mode in ("copy", "embed") or verify_copies)


@dataclass(slots=True)
class _ExportOutput:
    """An export while it is written: its graphs are made when their weights lie there.

    Attributes:
        where: The output.
        checkpoint: The base.
        roles: The adapters.
        planned: The weights.
        assembly: What the graphs are made of.
        draft: The graphs, with nothing computed.
        sources: Files of the base that they refer to.
        mode: How weights come to the graphs.
        arrangement: Names and places of files.
        warnings: What the user should know so far.
        seen: Values that were measured on a text, or None.
        built: The graphs and the small files, once they are made.
    """

    where: Path
    checkpoint: Checkpoint
    roles: AdapterRoles
    planned: ExportedWeights
    assembly: Assembly
    draft: GraphSet
    sources: tuple[File, ...]
    mode: Mode
    arrangement: Arrangement
    warnings: list[str] = field(default_factory=list)
    seen: Stored | None = None
    built: GraphFiles | None = None

    def job(self, kind: str) -> ExportJob:
        """What is written; `kind` is the type of the weights, as files of configuration call it."""
        assembly, draft, arrangement, merged = self.assembly, self.draft, self.arrangement, self.planned.merged
        names = [arrangement.path(name) for name in assembly.names(draft)]
        taken = {*names, *(arrangement.path(file.path.name) for file in draft.files)}
        config = arrangement.config(assembly.component.config, kind)
        genai = arrangement.layout.name == "genai" and self.mode != "reference"
        side_files, unsaid = side_files_of(self.checkpoint, merged, assembly, config, taken, genai=genai)
        self.warnings += [*self._known_before(), *unsaid]
        return ExportJob(
            names=names,
            make=self._make,
            weights=() if self.mode == "embed" else self.sources,
            plan=arrangement.plan(merged.plan) if merged else None,
            judge=self._judge,
            side_files=side_files,
            inputs=sorted({adapter.path for adapter in self.roles.adapters}),
            facts=export_facts(draft, self.mode, arrangement),
            id=export_id(draft, assembly, arrangement),
            card=self._card,
            placed=arrangement.files,
        )

    def _known_before(self) -> Iterator[str]:
        """Warnings that wait for nothing."""
        coding, merged, binding = self.planned.coding, self.planned.merged, self.planned.binding
        told = merged.plan.warnings if coding and merged else binding.warnings if binding else ()
        yield from warnings_before(self.mode, self.roles, self.checkpoint, told)
        yield from graph_warnings(self.assembly, self.draft)
        pooled = (self.assembly.component.folder / "modules.json").exists()
        yield from layout_warnings(self.arrangement.layout, self.draft.contract, pooled=pooled)

    @property
    def _own(self) -> dict[str, File]:
        return {file.path.name: file for file in self.sources}

    def _make(self, here: WeightLocation) -> SmallFiles:
        held = None
        if self.mode == "embed":
            merged = self.planned.merged
            computed = merged.plan.files if merged else ()
            paths = {file.name: here.folder / self.arrangement.path(file.name) for file in computed}
            held = self._own | {name: open_file(path) for name, path in paths.items()}
        self.built = graph_files(self.assembly, self.arrangement, here, held, self.where.resolve().name)
        return self.built.files

    def _judge(self, ledger: Ledger) -> None:
        assert self.planned.binding is not None
        self.warnings += check_written(ledger, self.planned.binding, headed=self.assembly.baked is not None)

    def _card(self, ledger: Ledger | None) -> bytes:
        assert self.built is not None
        contract = self.built.graphs.contract
        warnings = (*self.warnings, *self._of_codes(ledger))
        return export_card(
            self.checkpoint, self.roles, contract, ledger, self.arrangement.layout.name, self._reach(contract), warnings
        )

    def _of_codes(self, ledger: Ledger | None) -> list[str]:
        return [] if self.planned.coding is None or ledger is None else code_warnings(ledger)

    def _reach(self, contract: Contract) -> str:
        return "" if self.seen is None else reach_of_values(self.seen, contract.dtype)

    def result(self, placed: ExportOutcome, *, read: bool) -> ExportResult:
        """What became of it all; `read` looks at every weight for values that the graph's type lacks."""
        assert self.built is not None
        self.warnings += self._of_codes(placed.ledger)
        graphs, held = self.built.graphs, self.built.held
        if self.mode != "embed":
            own = self._own
            beside = (file.path.name for file in self.draft.files if file.path.name not in own)
            held = own | {name: open_file(self.where / self.arrangement.path(name)) for name in beside}
        self.warnings += issues_of_types(whole_graphs(self.draft), graphs.contract.dtype, held, self.seen, read=read)
        return ExportResult(
            self.where,
            graphs.contract,
            placed.files,
            self.mode,
            placed.nbytes,
            graphs.nodes,
            tuple(self.warnings),
            placed.ledger,
            value_range=self._reach(graphs.contract),
        )
