# SPDX-License-Identifier: Apache-2.0
"""Inspect: what a checkpoint or an adapter is, from its headers and its configuration alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.engine.inputs import Openable, as_path, opened_or_graph
from surgery.reports.adapter_report import AdapterReport, PromptFacts
from surgery.reports.array_report import ArrayFileReport
from surgery.reports.checkpoint_report import CheckpointReport, ComponentReport, WeightFileReport
from surgery.reports.delta_facts import DeltaFacts
from surgery.reports.graph_report import GraphReport
from surgery.reports.quantisation import quantised_weights
from surgery.reports.result import timed
from surgery.reports.targets import (
    TargetedParameter,
    distribution,
    group_targets,
    site_roles,
    touched,
    trained_parameters,
)
from surgery_formats.adapters.grammar.tools import stated_base, tool_of
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.quantised_base import quantised_base_of
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.containers.onnx_adapter import is_onnx_adapter
from surgery_formats.containers.weight_files import container_of_file, is_weight_file
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.known_files import known_file
from surgery_formats.models.layouts.parts import encoder_name
from surgery_formats.models.module_tree import Node, Totals, leaves, module_graph, role_totals, stored_ties
from surgery_formats.text import listing
from surgery_formats.updates import in_full, is_directed, is_row_setting, is_waiting

__all__ = [
    "AdapterReport",
    "ArrayFileReport",
    "CheckpointReport",
    "GraphReport",
    "inspect",
    "inspect_adapter",
    "inspect_checkpoint",
]

# What transformers' configurations call the same fact, the usual name first.
_FACTS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}


@timed
def inspect(
    reference: Openable, *, spectrum: bool = False
) -> CheckpointReport | AdapterReport | GraphReport | ArrayFileReport:
    """Look at a model, an adapter or an ONNX graph, without reading a single weight unless that is asked for.

    Args:
        reference: File, folder, or what was opened. A folder that is both (a training run's) is an adapter, and one of a
            model that was exported in place is the model.
        spectrum: Of an adapter: read its values, and measure the norm and the singular values of what it adds. Nothing of
            what is no adapter.

    Raises:
        NotFoundError: nothing there, or no weights in the folder.
        MalformedError: a header or a configuration is not what its format says.
        FitError: an adapter of a kind that is not read; with `spectrum`, values that are NaN or infinite.
    """
    try:
        opened = opened_or_graph(reference, "reference")
    except FitError as error:
        if not isinstance(reference, str | os.PathLike) or not is_onnx_adapter(path := as_path(reference, "reference")):
            raise
        from surgery.onnx.survey.arrays import survey_arrays

        return survey_arrays(path, error.message)
    if isinstance(opened, Path):
        from surgery.onnx.survey.survey import survey

        return survey(open_graph(opened))
    if isinstance(opened, Adapter):
        report = inspect_adapter(opened)
        return replace(report, deltas=_deltas(opened)) if spectrum else report
    return inspect_checkpoint(opened)


def _deltas(adapter: Adapter) -> tuple[DeltaFacts, ...]:
    """Of every parameter to which low-rank terms alone are added."""
    from surgery.comparison.additive import are_sums, blocks_of, spectra_of

    roles = site_roles(adapter)
    found = []
    for site, chain in adapter.updates.items():
        told = not any(is_waiting(update) or in_full(update) for update in chain)
        if not (told and are_sums(chain) and any(blocks_of(chain))):
            continue
        squares = [[float(value) ** 2 for value in spectrum] for spectrum in spectra_of(chain)]
        energies = [math.fsum(spectrum) for spectrum in squares]
        strongest = max(squares, key=math.fsum, default=[])
        stable = math.fsum(strongest) / strongest[0] if strongest and strongest[0] else 0.0
        values = tuple(map(math.sqrt, strongest))
        found.append(DeltaFacts(str(site), roles[site], math.sqrt(math.fsum(energies)), stable, values))
    return tuple(found)


def inspect_checkpoint(checkpoint: Checkpoint) -> CheckpointReport:
    """The report of an open checkpoint."""
    shown = [_readable(component) for component in checkpoint.components.values()]
    components = tuple(_component(component) for component, _ in shown)
    notes = [note for _, note in shown if note]
    told = (known_file(component.tensors) for component in checkpoint.components.values())
    notes += [f"it is {known.what}" for known in told if known is not None and known.network]
    if unknown := [
        part.name or part.model_type for part in components if part.model_type and not part.family and not part.networks
    ]:
        notes.append(f"roles are told by names alone, the family is not known: {listing(unknown)}")
    graphs = tuple(name for name in checkpoint.left_behind if name.endswith(ONNX.suffixes))
    return CheckpointReport(
        path=checkpoint.path,
        components=components,
        parameters=sum(component.parameters for component in components),
        nbytes=checkpoint.nbytes,
        side_files=tuple(name for name, _ in checkpoint.side_files),
        left_behind=tuple(name for name in checkpoint.left_behind if name not in graphs),
        graphs=graphs,
        notes=tuple(notes),
    )


def _readable(component: Component) -> tuple[Component, str]:
    """A network to be shown, by its stored tensors where they make no weights; and why that is so."""
    try:
        unread = component.unread
    except (MalformedError, FitError) as error:
        found = f"{error.tensor}: {error.message}" if error.tensor else error.message
        return replace(component, uninterpreted=True), f"{found}; what is listed are stored tensors, not weights"
    if unread is None:
        return component, ""
    return component, f"{unread.message}; the numbers of these are codes, and so is the count of parameters"


def _component(component: Component) -> ComponentReport:
    tree = module_graph(component)
    kind = component.config.get("model_type", component.config.get("_class_name"))
    known = [name for name in component.family.names if name == kind]
    prefix = f"{component.name}/" if component.name else ""
    files = (
        WeightFileReport(prefix + shard.path.name, shard.container, shard.file.size, len(shard.tensors))
        for shard in component.shards
    )
    metadata = component.shards[0].metadata if component.shards else {}
    return ComponentReport(
        name=component.name,
        model_type=kind if isinstance(kind, str) else "",
        family=known[0] if known else "",
        facts=_facts(component.config),
        tree=tree,
        roles=role_totals(leaves(tree)),
        dtypes=_dtypes(leaf for leaf in leaves(tree) if leaf.nbytes or not leaf.tied),
        files=tuple(files),
        ties=stored_ties(component),
        quantised=quantised_weights(component),
        networks=_networks(component),
        stated=stated_base(metadata) or None,
        tool=tool_of((), metadata) or None,
    )


def _networks(component: Component) -> dict[str, str]:
    """The families of diffusion networks that the names tell, by the parts of the file."""
    if "model_type" in component.config:
        return {}
    parts = {part: " or ".join(names.networks) or encoder_name(names.prefix) for part, names in component.parts.items()}
    if parts.keys() - {"denoiser"}:
        return parts
    found = parts.get("denoiser") or " or ".join(component.names.networks)
    return {"": found} if found else {}


def _facts(config: Mapping[str, Any]) -> dict[str, int]:
    """Facts of the configuration that are whole numbers.

    A multimodal model takes those it lacks from its text model.
    """
    inner = config.get("text_config")
    configs = [config, inner] if isinstance(inner, Mapping) else [config]
    facts = {}
    for fact, keys in _FACTS.items():
        values = (holder.get(key) for holder in configs for key in keys)
        value = next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
        if value is not None:
            facts[fact] = value
    return facts


def _dtypes(nodes: Iterable[Node]) -> dict[str, Totals]:
    totals: dict[str, Totals] = {}
    for node in nodes:
        totals[node.dtypes[0]] = totals.get(node.dtypes[0], Totals()).plus(node)
    return dict(sorted(totals.items(), key=lambda entry: (-entry[1].nbytes, entry[0])))


def inspect_adapter(adapter: Adapter) -> AdapterReport:
    """The report of an adapter that was read."""
    modules = touched(adapter)
    dtypes: dict[str, Totals] = {}
    for tensor in adapter.tensors:
        before = dtypes.get(tensor.stored_type, Totals())
        dtypes[tensor.stored_type] = Totals(
            before.tensors + 1, before.parameters + tensor.numel, before.nbytes + tensor.nbytes
        )
    files, quantised = _files(adapter), quantised_base_of(adapter)
    token_rows = {
        str(site): update.indices
        for site, chain in adapter.updates.items()
        for update in chain
        if is_row_setting(update)
    }
    soft = adapter.prompt
    prompt = PromptFacts(soft.kind, soft.virtual_tokens, soft.dim, soft.submodules, soft.prefix) if soft else None
    return AdapterReport(
        path=adapter.path,
        format=adapter.format,
        kind=adapter.kind_name,
        kinds=dict(sorted(Counter(entry.kind for entry in modules).items())),
        ranks=distribution(entry.rank for entry in modules),
        alphas=distribution(entry.alpha for entry in modules),
        scales=distribution(entry.scale for entry in modules),
        rslora=_divides_by_root(adapter),
        dora=any(is_directed(update) for chain in adapter.updates.values() for update in chain),
        targets=group_targets(modules),
        modules=modules,
        in_full=tuple(entry for entry in modules if entry.held != "added"),
        token_rows=token_rows,
        prompt=prompt,
        parameters=trained_parameters(adapter, modules),
        carried=sum(entry.parameters for entry in modules if not entry.trained),
        nbytes=sum(file.nbytes for file in files),
        dtypes=dict(sorted(dtypes.items(), key=lambda entry: (-entry[1].nbytes, entry[0]))),
        files=files,
        base_name=adapter.base_name,
        base_id=adapter.base_id,
        metadata=adapter.metadata,
        ignored={entry.tensor.name: entry.reason for entry in adapter.ignored},
        traps=(*adapter.known_issues(), *_traps(adapter, modules)),
        quantised_base=None if quantised is None else f"{quantised.method} ({quantised.evidence})",
        tool=adapter.provenance.tool or None,
        family=adapter.provenance.family or None,
        made_for=adapter.provenance.base or None,
        scale_sources=adapter.provenance.scales,
        token=adapter.config.get("token") if adapter.kind == "TEXTUAL_INVERSION" else None,
    )


def _divides_by_root(adapter: Adapter) -> bool:
    """Whether an update's scale is ``alpha / sqrt(rank)``: rsLoRA, in whatever way its format says so."""
    return any(
        update.alpha
        and update.scale
        and update.rank not in (None, 1)
        # These are applied twice, which may look the same.
        and site.module_kind != "attention output"
        and math.isclose(update.scale * math.sqrt(update.rank), update.alpha)
        for site, chain in adapter.updates.items()
        for update in chain
    )


def _container(path: Path) -> str:
    """Of a file of weights; of one that adapters alone lie in, its ending."""
    return container_of_file(path).name if is_weight_file(path.name) else path.suffix.removeprefix(".")


def _files(adapter: Adapter) -> tuple[WeightFileReport, ...]:
    counts: dict[Path, int] = {}
    sizes = {file.path: file.size for file in adapter.files}
    for tensor in adapter.tensors:
        path = tensor.path or adapter.path
        counts[path] = counts.get(path, 0) + 1
    return tuple(WeightFileReport(path.name, _container(path), sizes[path], counts[path]) for path in sorted(counts))


def _traps(adapter: Adapter, modules: tuple[TargetedParameter, ...]) -> Iterable[str]:
    """Known issues seen in the tensors; those of the format come from its reader."""
    if left := adapter.unconsumed():
        yield f"{len(left)} tensors have no use, a merge refuses them: {listing(tensor.name for tensor in left)}"
    if carried := [entry.name for entry in modules if not entry.trained]:
        yield f"holds whole weights that were not trained as such: {listing(carried)}"
    if len({entry.scale for entry in modules if entry.scale is not None}) > 1:
        yield "its scale differs from module to module: tools that read one alpha for the file apply it wrongly"
    if _divides_by_root(adapter):
        yield "rsLoRA: its scale is alpha / sqrt(rank); tools that take alpha / rank apply it too weakly"
