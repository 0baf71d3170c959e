# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint as ONNX graphs that use its weight files as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.engine.execute import Run
from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, as_checkpoint, as_list, local_path
from surgery.engine.ledger import Ledger
from surgery.onnx.export.adapters import sort_adapters
from surgery.onnx.export.cautions import code_warnings, graph_warnings, warnings_before
from surgery.onnx.export.export_card import export_card
from surgery.onnx.export.graph_files import GraphFiles, graph_files
from surgery.onnx.export.half_range import issues_of_types, measured_values, reach_of_values
from surgery.onnx.export.identity import export_facts, export_id
from surgery.onnx.export.input_options import (
    check_fused,
    with_embeddings,
    with_experts,
    with_logits,
    with_positions,
    with_required,
    with_sentence,
)
from surgery.onnx.export.layouts import arrange, check_layout, layout_named, layout_warnings
from surgery.onnx.export.new_assembly import new_assembly
from surgery.onnx.export.pairs import whole_graphs
from surgery.onnx.export.place import ExportJob, choose_mode, write_export
from surgery.onnx.export.prompt_past import WeightLocation
from surgery.onnx.export.request import WeightsAsked, in_shares
from surgery.onnx.export.result import ExportResult
from surgery.onnx.export.side_files import side_files_of
from surgery.onnx.export.weight_options import WITHOUT_ATTENTION, WeightOptions
from surgery.onnx.export.weights_mode import weights_mode
from surgery.onnx.export.weights_to_write import check_written
from surgery.onnx.run.adapter_file import SmallFiles
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File, open_file
from surgery_formats.models.families.tasks import SENTENCE

if TYPE_CHECKING:
    from surgery.engine.shares.work import EngineLike

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
    run = Run(verify_copies=verify_copies, overwrite=overwrite, progress=progress)
    shared = None
    if engine is not None and engine != "local":
        shared = in_shares(engine, base, (adapters, merge, swap, prefix), asked, run)
    checkpoint = as_checkpoint(base)
    if any(component.made for component in checkpoint.components.values()):
        raise FitError("is not written yet, and a graph refers to files", file=checkpoint.path, hint="write it first")
    roles = sort_adapters(adapters, merge, swap, prefix)
    shape = layout_named(layout)
    own, coding, full, binding, merged = asked.planned(checkpoint, roles)
    texts: tuple[str, ...] = tuple(as_list(bake_prompt))
    assembly = new_assembly(checkpoint, roles, merged, own, target, dtype, max_length, texts, prompt_form)
    assembly = with_experts(assembly, experts, older=asked.older)
    required = required or (layout == "triton" and bool(assembly.slots))
    assembly = with_required(with_sentence(assembly) if task == SENTENCE else assembly, required, packed)
    in_place = weights == "auto" and choose_mode("auto", where, checkpoint.main.folder, ()) == "reference"
    if weights == "auto" and shape.numbered and assembly.model.encoder is not None and not in_place:
        weights = "embed"  # one file of weights would have to have two names
    if weights == "embed" and assembly.model.encoder is not None:  # every graph holds the weights that it reads
        assembly = replace(assembly, options=replace(assembly.options, prefill=False))
    assembly = with_logits(with_positions(with_embeddings(assembly, inputs_embeds, layout), position_ids), logits)
    if opset is None and linear == "matmul":
        opset = WITHOUT_ATTENTION
    options = replace(assembly.options, opset=opset, prefill=assembly.options.prefill and shape.companions)
    assembly = replace(assembly, options=options, companions=shape.companions)
    draft = assembly.draft()
    check_fused(draft, experts)
    check_layout(shape, draft.contract, genai=bool(assembly.for_genai(draft)), embedded=weights == "embed" or in_place)
    sources = tuple(file for file in draft.files if isinstance(file, File))
    chosen = weights_mode(weights, where, checkpoint.main, sources, merged, assembly, full=full)
    kind = {"stored": draft.contract.dtype, "mixed": "int4"}.get(weights_type, weights_type)
    arrangement = arrange(shape, chosen, draft, kind)
    told = merged.plan.warnings if coding and merged else binding.warnings if binding else ()
    warnings = warnings_before(chosen, roles, checkpoint, told) + graph_warnings(assembly, draft)
    warnings += layout_warnings(shape, draft.contract, pooled=(assembly.component.folder / "modules.json").exists())
    own_files = {file.path.name: file for file in sources}
    built: list[GraphFiles] = []

    def make(here: WeightLocation) -> SmallFiles:
        held = None
        if chosen == "embed":
            computed = merged.plan.files if merged else ()
            held = own_files | {file.name: open_file(here.folder / arrangement.path(file.name)) for file in computed}
        built.append(graph_files(assembly, arrangement, here, held, where.resolve().name))
        return built[-1].files

    def check(ledger: Ledger) -> None:
        assert binding is not None
        warnings.extend(check_written(ledger, binding, headed=assembly.baked is not None))

    seen = None
    if range_text is not None:
        seen = measured_values(assembly.component, merged.plan if merged else None, own, range_text)

    def describe(ledger: Ledger | None) -> bytes:
        contract = built[-1].graphs.contract
        codes = code_warnings(ledger) if coding is not None and ledger is not None else ()
        reach = "" if seen is None else reach_of_values(seen, contract.dtype)
        return export_card(checkpoint, roles, contract, ledger, layout, reach, (*warnings, *codes))

    names = [arrangement.path(name) for name in assembly.names(draft)]
    taken = {*names, *(arrangement.path(file.path.name) for file in draft.files)}
    config = arrangement.config(assembly.component.config, kind)
    genai = shape.name == "genai" and chosen != "reference"
    side_files, unsaid = side_files_of(checkpoint, merged, assembly, config, taken, genai=genai)
    warnings += unsaid
    parcel = ExportJob(
        names=names,
        make=make,
        weights=() if chosen == "embed" else sources,
        plan=arrangement.plan(merged.plan) if merged else None,
        judge=check,
        side_files=side_files,
        inputs=sorted({adapter.path for adapter in roles.adapters}),
        facts=export_facts(draft, chosen, arrangement),
        id=export_id(draft, assembly, arrangement),
        card=describe,
        placed=arrangement.files,
    )
    placed = write_export(parcel, where, chosen, checkpoint.main.folder, run, shared)
    if coding is not None and placed.ledger is not None:
        warnings += code_warnings(placed.ledger)
    done = built[-1].graphs
    held = built[-1].held
    if chosen != "embed":
        beside = (file.path.name for file in draft.files if file.path.name not in own_files)
        held = own_files | {name: open_file(where / arrangement.path(name)) for name in beside}
    read = chosen in ("copy", "embed") or verify_copies  # a graph beside its weights costs no look at them
    warnings += issues_of_types(whole_graphs(draft), done.contract.dtype, held, seen, read=read)
    return ExportResult(
        where,
        done.contract,
        placed.files,
        chosen,
        placed.nbytes,
        done.nodes,
        tuple(warnings),
        placed.ledger,
        value_range="" if seen is None else reach_of_values(seen, done.contract.dtype),
    )
