# SPDX-License-Identifier: Apache-2.0
"""Verify an output: are its bytes those that were written, and does a graph compute what its model is?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, as_checkpoint, as_path, as_weighted
from surgery.onnx.export.adapters import AdapterRoles, sort_adapters
from surgery.onnx.graph.pair_names import graph_in, is_main
from surgery.onnx.run.opening import placed_graph, side_folder
from surgery.reports.result import timed
from surgery.verification.bytes import compare_copied, compare_files, data_shard
from surgery.verification.result import Check, Verification
from surgery.verification.written_files import check_added, check_manifest
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NotFoundError, ProofError, UsageError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.remote.path import on_a_disk
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.text import count, listing, show, summed_up

if TYPE_CHECKING:
    from surgery.reference import Reference
    from surgery.verification.onnx import LogitDifference
    from surgery.verification.session import GraphFile
    from surgery_formats.canonical.adapter import Adapter, WeightedAdapter

__all__ = ["TOLERANCE", "Check", "Verification", "verify"]

TOLERANCE = 1e-4
"""Greatest difference of a logit, as a share of the greatest logit (of 1 where that is less), for graphs of float32."""
SHORT_TOLERANCE = 1e-2
"""The same for graphs of 16 bits that hold constants (multipliers), which were rounded when the graph was made."""
_GRAPH = "model.onnx"


@timed
def verify(
    output: StrPath,
    *,
    against: CheckpointLike | None = None,
    adapters: AdaptersLike = (),
    recompute: int | str | None = None,
    tolerance: float | None = None,
    text: str | None = None,
) -> Verification:
    """Verify a folder that this toolkit made.

    A graph is run by onnxruntime on the CPU, in float32, and compared with a reference computed from config.json and
    weights by arithmetic of its own. A folder of weights is compared with what its manifest recorded.

    Args:
        output: A folder with ``model.onnx`` or a manifest.
        against: The base: weights that were copied are compared with it, and a graph that holds its weights inside is
            computed from it.
        adapters: What was merged into `against`, as `surgery.merge` takes it: a graph must compute what the merge
            would. A soft prompt among them must be the one the graph brings along.
        recompute: How many weights of a merged folder are computed once more from `against` and `adapters`, drawn anew each
            time, or ``all``; None is 8.
        tolerance: Greatest difference of a logit, see `TOLERANCE`; None for the default.
        text: File of a text, or ``words``: tokens from all over the vocabulary, on which the logits of a graph are compared
            with those of `against` and `adapters`: what rounding its weights cost.

    Raises:
        InputError: the folder or something in it cannot be read.
        FitError: neither a graph nor an output of this toolkit, or `against` is another model.
        ProofError: something is not as it was meant.
    """
    where = as_path(output, "output")
    number = _number(recompute)
    if text is not None and against is None:
        raise FitError(
            "a text was named without a base", hint="name the model that the graph was made of: `against=BASE`"
        )
    if (graph := _without_contract(where)) is not None:
        if text is not None:
            raise FitError("logits on a text are measured of graphs of surgery export-onnx", file=graph)
        if against is not None:
            return _by_value(graph, as_checkpoint(against, "against"), as_weighted(adapters))
        if not adapters:
            return _by_manifest(graph)
    if where.name.endswith(".onnx") and where.is_file():
        where = side_folder(where)
    if where.is_file():
        raise FitError(
            "a file, not the folder of an output", file=where, hint="verify the folder that surgery has written"
        )
    if not where.is_dir():
        raise NotFoundError("no such folder", file=where)
    if adapters and against is None:
        raise FitError("adapters were named without a base", hint="name the base they were merged into: `against=BASE`")
    base = None if against is None else as_checkpoint(against, "against")
    graph = placed_graph(where)
    has_manifest, has_graph = (where / MANIFEST).exists(), graph is not None
    if not has_manifest and not has_graph:
        raise FitError(f"neither {_GRAPH} nor {MANIFEST} is there", file=where, hint="verify what surgery has written")
    checks: list[Check] = []
    notes: list[str] = []
    recorded = check_added(where, checks)
    manifest, digest = check_manifest(where, recorded, checks, base) if has_manifest else ({}, "")
    if not has_graph and "ledger" not in manifest:  # an adapter: nothing in it is the base's
        if base is not None:
            notes.append("an adapter has no tensors of the base: --against has nothing to compare")
    elif not has_graph:
        if base is not None:
            copied = compare_copied(open_checkpoint(where), base, manifest)
            checks.append(Check("copied tensors", f"{count(copied)}, each the base's"))
            if weighted := as_weighted(adapters):
                from surgery.verification.recomputed import recomputed_weights

                done, all_of_them = recomputed_weights(where, manifest, base, weighted, number)
                which = "" if done == all_of_them else f" of {count(all_of_them)}, drawn anew each time"
                checks.append(Check("recomputed weights", f"{count(done)}{which}, as base and adapters make them"))
            elif recompute is not None:
                raise UsageError("what was merged is not named", hint="name the adapters that were merged")
        elif not set(manifest["files"]) <= _hashed(manifest["files"]):
            notes.append("copied tensors were not compared with the base: --against BASE does")
    if graph is None and text is not None:
        raise FitError("logits on a text are measured of graphs, and there is none", file=where)
    if graph is None:
        return Verification(where, "folder", tuple(checks), tuple(notes), digest)
    on_a_disk(where, "onnxruntime runs the graph, and reads files")
    if text is not None:  # before the proofs, which take minutes
        from surgery.verification.logit_error import check_measurable

        check_measurable(graph)
    roles = sort_adapters(adapters)
    if len(roles.prefix) > 1:
        raise FitError("a graph has one soft prompt of its own, which is the first", file=roles.prefix[1].adapter.path)
    hashed = _hashed({**manifest.get("files", {}), **recorded})
    exported = manifest.get("export")
    renamed = exported.get("renamed", {}) if isinstance(exported, Mapping) else {}
    _graphs(graph, base, roles, hashed, renamed, tolerance, checks, notes)
    error = None
    if text is not None and base is not None:
        from surgery.verification.logit_error import error_on_text

        error = error_on_text(graph, base, roles.merged, text)
        checks.append(Check("logits on the text", error.said))
    return Verification(where, "graph", tuple(checks), tuple(notes), digest, logits=error)


def _number(recompute: int | str | None) -> int | None:
    """How many weights are computed once more; None is all.

    Raises:
        UsageError: no number.
    """
    from surgery.verification.recomputed import SAMPLE

    if recompute is None or recompute == "all":
        return SAMPLE if recompute is None else None
    if isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 1:
        raise UsageError(f"'{show(recompute)}' is no number of weights", hint="a number above 0, or all")
    return recompute


def _without_contract(where: Path) -> Path | None:
    """The graph that is meant, if no export of this toolkit wrote it."""
    from surgery.onnx.graph.contract import from_metadata
    from surgery.onnx.graph.read_metadata import read_metadata

    found = where
    if where.is_dir():
        graphs = sorted(one for one in where.iterdir() if one.suffix == ".onnx" and one.is_file())
        named = graph_in(where, _GRAPH)
        if named not in graphs and len(graphs) != 1:
            return None
        found = named if named in graphs else graphs[0]
    if found.suffix != ".onnx" or not found.is_file():
        return None
    return found if from_metadata(read_metadata(found), found) is None else None


def _by_value(graph: Path, base: Checkpoint, weighted: Sequence[WeightedAdapter]) -> Verification:
    from surgery.verification.by_value import compare_by_value

    found = compare_by_value(graph, base, [(entry.adapter, entry.weight) for entry in weighted])
    checks: list[Check] = []
    if (graph.parent / MANIFEST).exists():
        check_manifest(graph.parent, {}, checks)
    said = f"{count(found.whole)} as the base has them"
    if found.updated:
        said = f"{count(found.whole)} as base and adapters make them, {count(found.updated)} of these updated"
    checks.append(Check("weights by value", said))
    if found.coded:
        checks.append(Check("codes", f"{count(found.coded)} weights, each within {found.error:.2f} of a step"))
    notes = []
    if found.absent:
        notes.append(
            f"{len(found.absent)} weights of the base are not in the graph: {listing(summed_up(found.absent))}"
        )
    return Verification(graph, "graph", tuple(checks), tuple(notes))


def _by_manifest(graph: Path) -> Verification:
    """Of a graph that others made, and that this toolkit changed, only the files are known without its base.

    Raises:
        FitError: there is no manifest either.
    """
    if not (graph.parent / MANIFEST).exists():
        raise FitError(
            f"the graph was not written by surgery export-onnx, and no {MANIFEST} lies beside it",
            file=graph,
            hint="`against=BASE` compares its weights with those of the model it was made of",
        )
    checks: list[Check] = []
    _, digest = check_manifest(graph.parent, {}, checks)
    note = "the values of the weights were not compared with a model: --against BASE does"
    return Verification(graph, "graph", tuple(checks), (note,), digest)


def _hashed(entries: Mapping[str, Any]) -> set[str]:
    """Files whose bytes were compared with what an account says of them."""
    return {name for name, entry in entries.items() if isinstance(entry, Mapping) and {"xxh3", "sha256"} & set(entry)}


def _graphs(
    path: Path,
    base: Checkpoint | None,
    roles: AdapterRoles,
    hashed: Collection[str],
    renamed: Mapping[str, str],
    tolerance: float | None,
    checks: list[Check],
    notes: list[str],
) -> None:
    from surgery.verification.coded_weights import is_written_anew
    from surgery.verification.inserted import with_adapter_modules, with_baked_modules
    from surgery.verification.pair import halves, measure_half
    from surgery.verification.sentence import own_task, with_sentence_modules
    from surgery.verification.session import check_weights, embedder_of, read_graph
    from surgery.verification.slots import with_defaults

    where, main = path.parent, read_graph(path)
    own = {new: old for old, new in renamed.items() if isinstance(new, str)}
    graphs = [main, *halves(main)]
    if main.contract.prefill:
        graphs.append(read_graph(where / Path(main.contract.prefill).name))
    embedder = embedder_of(main)
    holding = graphs if embedder is None else [*graphs, embedder]
    for graph in holding:
        check_weights(graph)
    names = list(dict.fromkeys(file.name for graph in holding for file in graph.weight_files))
    if names:
        checks.append(Check("weight files", f"{', '.join(names)}: size and header as when the graph was made"))
    if base is not None and not roles.merged:  # a merge may have put them under the names of the base's files
        same = compare_files(
            where, _not_dequantised(where, names, base), base, {new: old for old, new in renamed.items()}
        )
        if same:
            checks.append(Check("weight bytes", f"{', '.join(same)}: the base's"))
    elif base is None and not is_written_anew(main) and not set(names) <= {Path(name).name for name in hashed}:
        notes.append("the weights' bytes were not compared with the base: --against BASE does")
    reference = _reference(holding, names, base, roles, own)
    if is_written_anew(main):
        checks += _written_anew(main, reference, base, roles.merged, notes)
    for graph in graphs if main.contract.encoder else (main,):
        reference = with_defaults(graph, reference)
    if own_task(main.contract) != main.contract.task:
        reference = with_sentence_modules(reference, side_folder(path) if base is None else base.main.folder)
    if base is not None and roles.insert:
        reference = with_adapter_modules(reference, roles.insert)
    else:
        reference = with_baked_modules(reference, main)
    prompt = next((named.adapter for named in roles.prefix), None)
    for graph in graphs:
        measure = partial(
            measure_half if main.contract.encoder else partial(_measures, prompt=prompt), graph, reference
        )
        checks += _judged_graph(graph, measure, tolerance)


def _judged_graph(
    graph: GraphFile, measure: Callable[[], list[LogitDifference]], tolerance: float | None
) -> Iterator[Check]:
    from surgery.reference.stored import watched
    from surgery.verification.finite import check_finite, fits_half

    with watched() as seen:
        measures = measure()
    check_finite(graph, measures, seen)
    yield from (_judged(measure, graph, tolerance) for measure in measures)
    if graph.contract.dtype == "fp16" and is_main(graph.path.name):
        yield Check("range", fits_half(graph, seen, measure))


def _written_anew(
    graph: GraphFile,
    reference: Reference,
    base: Checkpoint | None,
    merged: Sequence[tuple[Adapter, float]],
    notes: list[str],
) -> Iterator[Check]:
    """What a graph of codes, or of matrices the other way round, has of the base and what is merged into it."""
    from surgery.engine.merge.merge_plan import plan_merge
    from surgery.reference.weights import planned_weights, stored_weights
    from surgery.verification.recorded import recorded_errors
    from surgery.verification.written_anew import check_codes, check_kept
    from surgery_formats.binding.bind import bind

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


def _not_dequantised(where: Path, names: Sequence[str], base: Checkpoint) -> list[str]:
    """Files that may be the base's: one of a quantised base that was written in elements has another size."""
    if not base.is_quantised:
        return list(names)
    sizes = {shard.path.name: shard.file.size for part in base.components.values() for shard in part.shards}
    return [name for name in names if not (where / name).exists() or sizes.get(name) == (where / name).stat().st_size]


def _reference(
    graphs: Sequence[GraphFile],
    names: Sequence[str],
    base: Checkpoint | None,
    roles: AdapterRoles,
    own: Mapping[str, str],
) -> Reference:
    """The model that graphs should be together: base and adapters where named, else what lies beside them."""
    from surgery.engine.input_checks import check_base_id
    from surgery.engine.merge.merge_plan import plan_merge
    from surgery.reference import Reference, open_reference
    from surgery.reference.weights import tensor_weights
    from surgery.verification.beside import model_beside
    from surgery.verification.coded_weights import coded_reference, is_written_anew
    from surgery.verification.sentence import own_task
    from surgery_formats.binding.bind import bind
    from surgery_formats.models.families.parameters import model_of

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


def _measures(graph: GraphFile, reference: Reference, prompt: Adapter | None) -> list[LogitDifference]:
    from surgery.verification.onnx import compare_decoder, compare_encoder, compare_prompt, compare_slots
    from surgery.verification.session import Session, check_sizes, default_past, keys_in_front_of, prompt_in_front
    from surgery.verification.slots import random_slots

    kind = "decoder" if reference.model.generates else "encoder"
    if graph.contract.kind != kind:
        raise ProofError(f"the graph is a {graph.contract.kind}, the model a {kind}", file=graph.path)
    check_sizes(graph, reference.model)
    slots = random_slots(graph, reference)
    session, past, front = Session(graph), None, None
    if graph.contract.kind == "encoder":
        past = keys_in_front_of(graph)
        front = prompt_in_front(graph) if past is None else None
        differences = list(compare_encoder(session, reference, front, past))
    else:
        past = default_past(graph)
        differences = list(compare_decoder(session, reference, past))
    if prompt is not None:
        differences.append(compare_prompt(graph.path, prompt, reference, past, front))
    if slots is not None:
        session.slot_arrays, changed = slots
        differences += compare_slots(session, changed, past, front)
    return differences


def _judged(measure: LogitDifference, graph: GraphFile, tolerance: float | None) -> Check:
    """The check, or the error.

    Raises:
        ProofError: the graph computes something else.
    """
    short = graph.rounded or (
        measure.name == "soft prompt" and graph.contract.dtype != "fp32"
    )  # stored in the cache's type
    share = tolerance or (SHORT_TOLERANCE if short else TOLERANCE)
    limit = share * max(1.0, measure.size)
    if not measure.within(share):
        tokens = f", {measure.wrong_tokens} greedy tokens differ" if measure.wrong_tokens else ""
        what = "key or value" if measure.name == "soft prompt" else "logit"
        raise ProofError(
            f"{measure.name}: a {what} differs by {measure.difference:.3g} from what the model computes (at most "
            f"{limit:.3g}){tokens}",
            file=graph.path,
            hint="graph and weights do not belong together, or one of them is damaged: export again",
        )
    name = measure.name if is_main(graph.path.name) else f"{graph.path.name}: {measure.name}"
    return Check(name, f"max |d| {measure.difference:.2g} of {measure.size:.3g}", measure.difference, limit)
