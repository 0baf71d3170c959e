# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint as ONNX graphs that use its weight files as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery._version import __version__
from surgery.engine.execute import Run
from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, as_checkpoint, as_list, local_path
from surgery.engine.ledger import Ledger
from surgery.engine.plan import SideFile
from surgery.onnx.export.adapters import AdapterRoles, sort_adapters
from surgery.onnx.export.assemble import Assembly, prompt_form
from surgery.onnx.export.cautions import code_warnings, graph_warnings, warnings_before
from surgery.onnx.export.half_range import issues_of_types, measured_values
from surgery.onnx.export.input_options import (
    with_embeddings,
    with_logits,
    with_positions,
    with_required,
    with_sentence,
)
from surgery.onnx.export.inserted import INSERTED, baked_modules
from surgery.onnx.export.layouts import (
    Arrangement,
    Layout,
    arrange,
    check_layout,
    layout_named,
    layout_warnings,
    triton_config,
)
from surgery.onnx.export.pairs import check_pair, whole_graphs
from surgery.onnx.export.place import ExportJob, Mode, choose_mode, embed, write_export
from surgery.onnx.export.prompt_past import Prompt, WeightLocation, of_adapter, unique
from surgery.onnx.export.result import ExportResult
from surgery.onnx.export.sentence import SENTENCE_FILE
from surgery.onnx.export.tied_head import check_tied_head
from surgery.onnx.export.weight_options import WITHOUT_ATTENTION, WeightOptions
from surgery.onnx.graph.build import GraphOptions, GraphSet
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.graph.target import choose, io_type
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.files.raw import File, open_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.families.tasks import FEATURES, SENTENCE, check_task

if TYPE_CHECKING:
    from surgery.onnx.export.merged import MergedWeights
    from surgery.onnx.export.slots import Swappable
    from surgery.onnx.export.weight_coding import WeightCoding
    from surgery_formats.binding.bind import Binding

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
    range_text: str | None = None,
    max_length: int | None = None,
    position_ids: bool = False,
    inputs_embeds: bool = False,
    logits: str = "auto",
    opset: int | None = None,
    verify_copies: bool = False,
    overwrite: bool = False,
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
        weights_type: Of the weights: ``stored``: as they are; ``int4``, ``int8``: codes in blocks, for MatMulNBits; ``mixed``: of both, and
            none, where they help most within `budget`;
        block: Of codes: inputs that share a scale, 32, 64 or 128.
        symmetric: Of codes: no zero points are stored.
        scales: Of codes: ``minmax``: from the extremes of a block; ``search``: of the least error.
        rounding: Of codes: ``feedback``, the default with a `calibration`, makes up for errors along its inputs and those that a
            merged adapter listens to; ``nearest``.
        calibration: Of codes: a file of inputs (docs/extraction.md).
        embeddings: Of codes: the token table: ``auto``: as a head that is tied to it, else kept; ``keep``, ``int8``, ``int4``.
        head: Of codes: the same of the projection onto the vocabulary; ``auto``: as all weights.
        layout: Names and places of files, as a program looks for them: ``plain``, ``transformers.js``, ``optimum``,
            ``sentence-transformers``, ``genai``, ``triton``.
        budget: Of ``mixed``: most bytes of all weights.
        linear: ``matmul``: linear maps as MatMul with weights of inputs by outputs, which onnxruntime's quantisers look
            for; all weights are written, in the graph's type.
        range_text: File of a text on which the values are measured that a graph of fp16 stores, or ``words``: tokens from
            all over the vocabulary; None does not measure. The model is computed for it once, in float32.
        max_length: Longest sequence; None for as long as the model was made for.
        position_ids: Whether positions are an input of a decoder, as clients of other exporters give them.
        inputs_embeds: Whether a decoder takes embeddings instead of token ids, as from an encoder of images; ``embed_tokens.onnx``
            makes those of a text.
        logits: Of which positions a decoder computes logits: ``all``; ``input``: of as many last ones as the optional input
            ``num_logits_to_keep`` says; ``auto``: ``input`` but for ``cuda``.
        opset: Set of ONNX's operators, 17 to 23, for older runtimes; None for the least that the graph's operators need.
        verify_copies: Compare copied weights byte by byte, and note their hash for ``surgery verify``.
        overwrite: Replace an existing output, atomically.
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
    checkpoint = as_checkpoint(base)
    if any(component.made for component in checkpoint.components.values()):
        raise FitError("is not written yet, and a graph refers to files", file=checkpoint.path, hint="write it first")
    roles = sort_adapters(adapters, merge, swap, prefix)
    if merge_to not in ("delta", "full"):
        raise FitError(f"merge_to is 'delta' or 'full', not '{merge_to}'")
    if any(shard.container == "gguf" for shard in checkpoint.main.shards):
        merge_to = "full"  # no graph refers to such a file
    coding = WeightOptions(
        weights_type, block, symmetric, scales, rounding, calibration, embeddings, head, budget, linear
    ).coding()
    if coding is not None:
        merge_to = "full"  # all weights are written
    check_task(task)
    shape = layout_named(layout)
    full = merge_to == "full"
    own = FEATURES if task == SENTENCE else task or ""
    binding, merged = _merged(checkpoint, roles, own, full=full, coding=coding, io=(target, dtype))
    texts: tuple[str, ...] = tuple(as_list(bake_prompt))
    assembly = _assembly(checkpoint, roles, merged, own, target, dtype, max_length, texts, prompt_form)
    required = required or (layout == "triton" and bool(assembly.slots))
    assembly = with_required(with_sentence(assembly) if task == SENTENCE else assembly, required, packed)
    if weights == "embed" and assembly.model.encoder is not None:  # every graph holds the weights that it reads
        assembly = replace(assembly, options=replace(assembly.options, prefill=False))
    assembly = with_logits(with_positions(with_embeddings(assembly, inputs_embeds, layout), position_ids), logits)
    if opset is None and linear == "matmul":
        opset = WITHOUT_ATTENTION
    options = replace(assembly.options, opset=opset, prefill=assembly.options.prefill and shape.companions)
    assembly = replace(assembly, options=options, companions=shape.companions)
    draft = assembly.draft()
    check_layout(shape, draft.contract, genai=bool(assembly.for_genai(draft)), embedded=weights == "embed")
    sources = tuple(file for file in draft.files if isinstance(file, File))
    chosen = _mode(weights, where, checkpoint.main, sources, merged, full=merge_to == "full")
    if chosen == "embed" and merged is not None and not full and assembly.prompts:
        raise FitError(
            "keys and values of a prompt are computed over files in one folder, and merged weights are not in the base's",
            hint='`merge_to="full"`',
        )
    if chosen == "reference" and assembly.headed:
        raise _another_configuration(checkpoint.main)
    kind = {"stored": draft.contract.dtype, "mixed": "int4"}.get(weights_type, weights_type)
    arrangement = _arrangement(shape, chosen, draft, kind)
    told = merged.plan.warnings if coding and merged else binding.warnings if binding else ()
    warnings = warnings_before(chosen, roles, checkpoint, told) + graph_warnings(assembly, draft)
    warnings += layout_warnings(shape, draft.contract, pooled=(assembly.component.folder / "modules.json").exists())
    built: list[GraphSet] = []

    def make(here: WeightLocation) -> Mapping[str, bytes]:
        files, graph_set, graphs = assembly.files(here)
        small = (name for name in (INSERTED, SENTENCE_FILE) if chosen == "embed" and name in files)
        inside = {name: files.pop(name) for name in [*small]}
        held = {file.path.name: file for file in sources}
        if chosen == "embed" and merged is not None:
            held |= {file.name: open_file(here.folder / arrangement.path(file.name)) for file in merged.plan.files}
        for name, graph in graphs.items():
            if chosen == "embed":
                embed(graph, held, inside)
            arrangement.apply(graph)
            if layout == "triton":
                files["config.pbtxt"] = triton_config(graph, where.resolve().name)
            files[name] = graph.SerializeToString(deterministic=True)
        built.append(replace(graph_set, contract=arrangement.contract(graph_set.contract)))
        return {arrangement.path(name): data for name, data in files.items()}

    def check(ledger: Ledger) -> None:
        from surgery.engine.output_checks import check_output

        assert binding is not None
        if not binding.adapters:
            return  # nothing but dequantised
        try:
            warnings.extend(check_output(ledger, checkpoint, [weight for _, weight in binding.adapters]))
        except NothingChangedError:
            if assembly.baked is None:  # a head that came along with a module may be the base's own
                raise

    names = [arrangement.path(name) for name in assembly.names(draft)]
    taken = {*names, *(arrangement.path(file.path.name) for file in draft.files)}
    parcel = ExportJob(
        names=names,
        make=make,
        weights=() if chosen == "embed" else sources,
        plan=arrangement.plan(merged.plan) if merged else None,
        judge=check,
        side_files=_side_files(
            checkpoint, merged, assembly, arrangement.config(assembly.component.config, kind), taken
        ),
        inputs=sorted({adapter.path for adapter in roles.adapters}),
        facts=_facts(draft, chosen, arrangement),
        id=_id(draft, assembly, arrangement),
        placed=arrangement.files,
    )
    seen = None
    if range_text is not None:
        seen = measured_values(assembly.component, merged.plan if merged else None, own, range_text)
    run = Run(verify_copies=verify_copies, overwrite=overwrite, progress=progress)
    placed = write_export(parcel, where, chosen, checkpoint.main.folder, run)
    if coding is not None and placed.ledger is not None:
        warnings += code_warnings(placed.ledger)
    done = built[-1]
    lie = {file.path.name: file.path for file in sources}
    warnings += issues_of_types(
        whole_graphs(draft),
        done.contract.dtype,
        lambda name: lie.get(name) or where / arrangement.path(name),
        seen,
    )
    return ExportResult(
        where, done.contract, placed.files, chosen, placed.nbytes, done.nodes, tuple(warnings), placed.ledger
    )


def _merged(
    checkpoint: Checkpoint,
    roles: AdapterRoles,
    task: str,
    *,
    full: bool,
    coding: WeightCoding | None,
    io: tuple[str, str],
) -> tuple[Binding | None, MergedWeights | None]:
    """The adapters to merge, bound, and the merged weights: also those that a graph needs in elements, not in codes.

    Imports only what is needed: adapters would cost a plain export as much as all the rest.
    """
    checkpoint.main.check_read()
    coded = checkpoint.is_quantised or any(shard.container == "gguf" for shard in checkpoint.main.shards)
    if not roles.adapters and not coded and coding is None:
        return None, None
    from surgery.engine.input_checks import check_base_id
    from surgery.onnx.export.merged import merged_weights
    from surgery_formats.binding.bind import bind

    check_base_id(checkpoint, roles.adapters)
    if not (pairs := roles.merged) and not coded and coding is None:
        return None, None
    binding = bind(pairs, checkpoint, new_biases=True)
    if coding is not None:
        from surgery.onnx.export.coded_plan import coded_weights

        return binding, coded_weights(binding, coding, task, io_type(*io, checkpoint.main.dtype))
    return binding, merged_weights(binding, "full" if full else "delta", task)


def _assembly(
    checkpoint: Checkpoint,
    roles: AdapterRoles,
    merged: MergedWeights | None,
    task: str,
    target: str,
    dtype: str,
    max_length: int | None,
    texts: tuple[str, ...],
    form: str,
) -> Assembly:
    component = merged.component if merged else checkpoint.main
    overrides = merged.overrides if merged else {}
    io = io_type(target, dtype, checkpoint.main.dtype)
    model = merged.model if merged else model_of(component.config, frozenset(component.parameters), task)
    check_tied_head(checkpoint.main, model)
    slots, given = _slots(checkpoint, roles, model), component
    check_pair(model, texts=texts, modules=bool(roles.insert) or any(adapter.modules for adapter in slots))
    prompts = [of_adapter(named.name, named.adapter, model) for named in roles.prefix]
    for text in texts:
        if not model.generates:
            raise FitError("a text has nothing to be read into: this model has no cache")
        name = unique([prompt.name for prompt in prompts], "text")
        ids = _ids(checkpoint.main.folder, text)
        prompts.append(Prompt(name, TEXT, len(ids), ids=ids))
    coded = merged.coded if merged else {}
    operators = choose(target, io)
    if merged is not None and merged.across:
        operators = replace(operators, linear="matmul")
    options = GraphOptions(operators, io, max_length, overrides=overrides, coded=coded)
    form = prompt_form(form, tuple(prompts), model)
    baked = baked_modules(roles.insert)
    if baked is not None:
        options = replace(options, overrides={**overrides, **baked.overrides})
    if prompts and (baked is not None or any(adapter.modules for adapter in slots)):
        raise FitError("soft prompts beside modules that an adapter inserts: export them apart")
    if any(adapter.replaced for adapter in slots):
        from surgery.onnx.export.replaced import headed

        component, model = headed(component, model, [(slot.adapter, slot.replaced) for slot in slots], task)
    return Assembly(
        component, model, options, roles, slots, tuple(prompts), form, component.config != given.config, baked
    )


def _slots(checkpoint: Checkpoint, roles: AdapterRoles, model: Model) -> tuple[Swappable, ...]:
    if not roles.swap:
        return ()
    from surgery.onnx.export.slots import swappable

    return tuple(swappable(named, checkpoint, model) for named in roles.swap)


def _ids(folder: Path, text: str) -> tuple[int, ...]:
    from surgery.onnx.run.tokenizer import open_tokenizer

    ids = tuple(open_tokenizer(folder).encode(text))
    if not ids:
        raise FitError("the text to bake in is empty")
    return ids


def _mode(
    asked: str, output: Path, base: Component, sources: Sequence[File], merged: MergedWeights | None, *, full: bool
) -> Mode:
    """Choose how the graph gets its weights.

    Raises:
        FitError: what was asked for cannot be.
    """
    if merged is None:
        return choose_mode(asked, output, base.folder, sources)
    if full:
        if asked not in ("auto", "copy", "embed"):
            raise FitError("a full merge writes its weights itself", hint='`weights="auto"`, or `merge_to="delta"`')
        if choose_mode("auto", output, base.folder, ()) == "reference":
            raise FitError("a full merge needs a folder of its own", file=output, hint='`merge_to="delta"`')
        return "embed" if asked == "embed" else "copy"
    chosen = choose_mode(asked, output, base.folder, sources)
    if chosen == "reference":
        _check_same_sides(merged, base)
    return chosen


def _check_same_sides(merged: MergedWeights, base: Component) -> None:
    """Refuse to write into the base's folder if configuration or tokenizer would differ.

    A tie of head and embedding is no difference: only the graph needs to know of it.
    """
    differing = {key: value for key, value in merged.component.config.items() if key != "tie_word_embeddings"}
    same = differing == {key: value for key, value in base.config.items() if key != "tie_word_embeddings"}
    tokenizers = [side.name for side in merged.side_files if side.source and side.source.parent != base.folder]
    if not same or tokenizers:
        raise _another_configuration(base)


def _another_configuration(base: Component) -> FitError:
    return FitError(
        "the model with its adapters has another configuration or tokenizer than the base, whose folder this is",
        file=base.folder,
        hint="write to another folder: blocks are shared where the file system can",
    )


def _side_files(
    checkpoint: Checkpoint,
    merged: MergedWeights | None,
    assembly: Assembly,
    config: Mapping[str, Any] | None,
    taken: set[str],
) -> list[SideFile]:
    """Tokenizer, configuration and the like, but for names that the export itself takes; `config` replaces the base's."""
    if merged is not None:
        side_files = list(merged.side_files)
    else:
        source = checkpoint.main.folder / "config.json"
        side_files = [SideFile(name, source=path) for name, path in checkpoint.side_files]
        side_files += [SideFile("config.json", source=source)] if source.exists() else []
    if assembly.headed or config is not None:
        data = json.dumps(dict(config or assembly.component.config), indent=2, ensure_ascii=False).encode() + b"\n"
        side_files = [side for side in side_files if side.name != "config.json"]
        side_files.append(SideFile("config.json", data=data))
    if assembly.sentence is not None:
        side_files += [SideFile(name, source=path) for name, path in assembly.sentence.modules.files.items()]
    return [side for side in side_files if side.name not in taken]


def _arrangement(layout: Layout, mode: Mode, draft: GraphSet, kind: str) -> Arrangement:
    """The names of all files.

    Raises:
        FitError: the layout's are not those of the base's folder.
    """
    files = () if mode == "embed" else draft.files
    base = [file.path.name for file in files if isinstance(file, File)]
    computed = [file.path.name for file in files if not isinstance(file, File)]
    if mode == "reference":
        if layout.below:
            raise FitError(f"the layout of {layout.name} needs a folder of its own", hint="write to another folder")
        return Arrangement(layout)
    return arrange(layout, base, computed, list(draft.graphs), kind)


def _facts(draft: GraphSet, mode: Mode, arrangement: Arrangement) -> dict[str, Any]:
    contract = draft.contract
    layout = arrangement.layout.name
    return {
        **({"layout": layout} if layout != "plain" else {}),
        **({"renamed": dict(arrangement.weights)} if arrangement.weights else {}),
        "target": contract.target,
        "dtype": contract.dtype,
        "weights": mode,
        "adapters": [dict(facts) for facts in contract.adapters],
        "virtual_tokens": contract.virtual_tokens,
        "slots": [slot.weight for slot in contract.slots],
    }


def _id(draft: GraphSet, assembly: Assembly, arrangement: Arrangement) -> str:
    """Digest of everything that decides the files: the draft's graphs name weights and adapters by content."""
    state = hashlib.sha256(json.dumps([__version__, assembly.form]).encode())
    for name, graph in draft.graphs.items():
        state.update(name.encode() + graph.SerializeToString(deterministic=True))
    if arrangement.files or arrangement.layout.name != "plain":
        state.update(json.dumps([arrangement.layout.name, dict(arrangement.files)], sort_keys=True).encode())
    return state.hexdigest()
