# SPDX-License-Identifier: Apache-2.0
"""The model that the graphs of a folder should be, and what graphs that were written anew have of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from surgery.engine.input_checks import check_base_id
from surgery.engine.merge.merge_plan import plan_merge
from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.run.opening import side_folder
from surgery.reference import Reference, open_reference
from surgery.reference.weights import planned_weights, stored_weights, tensor_weights
from surgery.verification.beside import model_beside
from surgery.verification.bytes import data_shard
from surgery.verification.coded_weights import coded_reference, is_written_anew
from surgery.verification.recorded import recorded_errors
from surgery.verification.result import Check
from surgery.verification.sentence import own_task
from surgery.verification.session import GraphFile
from surgery.verification.written_anew import check_codes, check_kept
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.parameters import model_of
from surgery_formats.text import count

__all__ = ["check_written_anew", "model_of_graphs"]


def model_of_graphs(
    graphs: Sequence[GraphFile],
    names: Sequence[str],
    base: Checkpoint | None,
    roles: AdapterRoles,
    own: Mapping[str, str],
) -> Reference:
    """The model that graphs should be together: base and adapters where named, else what lies beside them.

    Args:
        graphs: All that hold weights, the main one first.
        names: Of their weight files.
        base: The base, if it is named.
        roles: The adapters that are named.
        own: The base's names of files that the export renamed.

    Raises:
        FitError: the weights are inside the graph and no base is named, or an adapter was made for another base.
        MalformedError: the files beside the graph are no model.
    """
    graph = graphs[0]
    contract, folder = graph.contract, graph.path.parent
    task = own_task(contract)
    if is_written_anew(graph):
        return coded_reference(graphs, names)
    if base is not None and roles.merged:
        binding = bind(roles.merged, base)
        check_base_id(base, [adapter for adapter, _ in binding.adapters])
        return open_reference(base.main, plan_merge(binding), task=task)
    # of a quantised base, a graph has the values in 16 bits
    dequantised = plan_merge(bind([], base)) if base is not None and base.is_quantised else None
    if not names:
        if base is None:
            raise FitError("the weights are inside the graph", file=graph.path, hint="name the base: `against=BASE`")
        return open_reference(base.main, dequantised, task=task)
    in_files = any(facts.get("mode") in ("merged", "inserted") for facts in contract.adapters)
    if base is not None and (roles.insert or not in_files):
        return open_reference(base.main, dequantised, task=task)
    component = model_beside(graph, own)
    tensors = dict(component.tensors)
    known = {shard.path.name for shard in component.shards}
    for name in names:
        if name not in known:  # what a merge changed lies in a file of its own
            tensors |= {tensor.name: tensor for tensor in data_shard(folder / name).tensors}
    return Reference(model_of(component.config, tensors.keys(), task), tensor_weights(tensors, component.names))


def check_written_anew(
    graph: GraphFile,
    reference: Reference,
    base: Checkpoint | None,
    merged: Sequence[tuple[Adapter, float]],
    notes: list[str],
) -> Iterator[Check]:
    """What a graph of codes, or of matrices the other way round, has of the base and what is merged into it.

    Raises:
        ProofError: a weight is not what base and adapters make, within the error that was recorded.
    """
    quantised, folder = graph.contract.quantised, side_folder(graph.path)
    kinds = {"fp8" if "type" in entry else f"{entry['bits']} bits" for entry in quantised}
    said = f"{sum(len(entry['weights']) for entry in quantised)} weights of {' and '.join(sorted(kinds))}"
    if base is None:
        if quantised:
            yield Check("quantised weights", said)
        notes.append(f"the {'codes' if quantised else 'weights'} were not compared with the base: --against BASE does")
        return
    binding = bind(merged, base, new_biases=True) if merged else None
    wanted = stored_weights(base.main) if binding is None else planned_weights(plan_merge(binding))
    if quantised:
        exact = wanted if binding is None else planned_weights(plan_merge(binding, dtype=DType.F32))
        found = check_codes(graph, reference, exact, folder)
        yield Check("quantised weights", f"{said}: {found}")
        if not recorded_errors(folder):
            notes.append(f"no {MANIFEST} says how far the codes were from the base when they were written")
    if number := check_kept(graph, reference, wanted, merged=bool(merged)):
        yield Check(
            "kept weights",
            f"{count(number)} as base and adapters make them" if merged else f"{count(number)} as the base has them",
        )
