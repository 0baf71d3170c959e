# SPDX-License-Identifier: Apache-2.0
"""All graphs of a folder against the model that they should be: weight files, weights, and numbers that they compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.graph.pair_names import is_main
from surgery.onnx.run.opening import side_folder
from surgery.reference import Reference
from surgery.reference.stored import watched
from surgery.verification.bytes import compare_files
from surgery.verification.coded_weights import is_written_anew
from surgery.verification.finite import check_finite, fits_half
from surgery.verification.graph_model import check_written_anew, model_of_graphs
from surgery.verification.inserted import with_adapter_modules, with_baked_modules
from surgery.verification.logit_difference import SOFT_PROMPT, LogitDifference
from surgery.verification.onnx import compare_decoder, compare_encoder, compare_prompt, compare_slots
from surgery.verification.pair import halves, measure_half
from surgery.verification.result import Check
from surgery.verification.sentence import own_task, with_sentence_modules
from surgery.verification.session import (
    GraphFile,
    Session,
    check_sizes,
    check_weights,
    default_past,
    embedder_of,
    keys_in_front_of,
    prompt_in_front,
    read_graph,
)
from surgery.verification.slots import random_slots, with_defaults
from surgery.verification.strengths import gated_of, with_gated
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["TOLERANCE", "prove_graphs"]

TOLERANCE = 1e-4
"""Greatest difference of a logit, for graphs of float32, as `LogitDifference.limit` measures it."""
SHORT_TOLERANCE = 1e-2
"""The same for graphs of 16 bits that hold constants (multipliers), which were rounded when the graph was made."""


def prove_graphs(
    path: Path,
    base: Checkpoint | None,
    roles: AdapterRoles,
    hashed: Collection[str],
    renamed: Mapping[str, str],
    tolerance: float | None,
    checks: list[Check],
    notes: list[str],
) -> None:
    """Add a check for everything that holds.

    Args:
        path: The main graph; those that belong to it lie beside it.
        base: The base, if it is named.
        roles: The adapters that are named.
        hashed: Files whose bytes were compared with an account.
        renamed: New names of the base's files.
        tolerance: Greatest difference of a logit, as a share of the greatest; None for `TOLERANCE`.
        checks: Gets what holds.
        notes: Gets what was not compared.

    Raises:
        ProofError: a file, a weight or a number is not as it was meant.
        FitError: see `model_of_graphs`.
    """
    where, main = path.parent, read_graph(path)
    gated, roles = gated_of(main.contract, roles)
    if gated.unnamed:
        notes.append(
            f"{listing(gated.unnamed)} inside the graph: at strength 0; --adapter compares what an adapter adds"
        )
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
    reference = model_of_graphs(holding, names, base, roles, own)
    if is_written_anew(main):
        checks += check_written_anew(main, reference, base, roles.merged, notes)
    for graph in graphs if main.contract.encoder else (main,):
        reference = with_defaults(graph, reference)
    if own_task(main.contract) != main.contract.task:
        reference = with_sentence_modules(reference, side_folder(path) if base is None else base.main.folder)
    if base is not None and roles.insert:
        reference = with_adapter_modules(reference, roles.insert)
    else:
        reference = with_baked_modules(reference, main)
    if base is not None and gated.named:
        reference = with_gated(reference, base, gated, main.contract)
    prompt = next((named.adapter for named in roles.prefix), None)
    for graph in graphs:
        measures = measure_half if main.contract.encoder else partial(_measures, prompt=prompt)
        measure = partial(measures, graph, reference, gated.strengths)
        checks += _judged_graph(graph, measure, tolerance)


def _judged_graph(
    graph: GraphFile, measure: Callable[[], list[LogitDifference]], tolerance: float | None
) -> Iterator[Check]:

    with watched() as seen:
        measures = measure()
    check_finite(graph, measures, seen)
    yield from (_judged(measure, graph, tolerance) for measure in measures)
    if graph.contract.dtype == "fp16" and is_main(graph.path.name):
        yield Check("range", fits_half(graph, seen, measure))


def _not_dequantised(where: Path, names: Sequence[str], base: Checkpoint) -> list[str]:
    """Files that may be the base's: one of a quantised base that was written in elements has another size."""
    if not base.is_quantised:
        return list(names)
    sizes = {shard.path.name: shard.file.size for part in base.components.values() for shard in part.shards}
    return [name for name in names if not (where / name).exists() or sizes.get(name) == (where / name).stat().st_size]


def _measures(
    graph: GraphFile, reference: Reference, strengths: Mapping[str, float], prompt: Adapter | None
) -> list[LogitDifference]:

    kind = "decoder" if reference.model.generates else "encoder"
    if graph.contract.kind != kind:
        raise ProofError(f"the graph is a {graph.contract.kind}, the model a {kind}", file=graph.path)
    check_sizes(graph, reference.model)
    slots = random_slots(graph, reference)
    session, past, front = Session(graph, strengths), None, None
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
        arrays, changed = slots
        session.slot_arrays |= arrays
        differences += compare_slots(session, changed, past, front)
    return differences


def _judged(measure: LogitDifference, graph: GraphFile, tolerance: float | None) -> Check:
    """The check, or the error.

    Raises:
        ProofError: the graph computes something else.
    """
    short = graph.rounded or (
        measure.name == SOFT_PROMPT and graph.contract.dtype != "fp32"
    )  # stored in the cache's type
    share = tolerance or (SHORT_TOLERANCE if short else TOLERANCE)
    limit = measure.limit(share)
    if not measure.within(share):
        tokens = f", {measure.wrong_tokens} greedy tokens differ" if measure.wrong_tokens else ""
        what = "key or value" if measure.name == SOFT_PROMPT else "logit"
        raise ProofError(
            f"{measure.name}: a {what} differs by {measure.difference:.3g} from what the model computes (at most "
            f"{limit:.3g}){tokens}",
            file=graph.path,
            hint="graph and weights do not belong together, or one of them is damaged: export again",
        )
    name = measure.name if is_main(graph.path.name) else f"{graph.path.name}: {measure.name}"
    return Check(name, f"max |d| {measure.difference:.2g} of {measure.size:.3g}", measure.difference, limit)
