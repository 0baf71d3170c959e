# SPDX-License-Identifier: Apache-2.0
"""Verify an output: are its bytes those that were written, and does a graph compute what its model is?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.inputs import AdaptersLike, CheckpointLike, StrPath, as_checkpoint, as_path, as_weighted
from surgery.onnx.graph.pair_names import graph_in
from surgery.onnx.run.opening import placed_graph, side_folder
from surgery.reports.result import timed
from surgery.verification.bytes import compare_copied
from surgery.verification.result import Check, Verification
from surgery.verification.written_files import check_added, check_manifest
from surgery_formats.errors import FitError, NotFoundError, UsageError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.remote.path import on_a_disk
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.text import count, listing, show, summed_up

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import WeightedAdapter

__all__ = ["Verification", "verify"]

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
    where = _folder(where)
    if adapters and against is None:
        raise FitError("adapters were named without a base", hint="name the base they were merged into: `against=BASE`")
    base = None if against is None else as_checkpoint(against, "against")
    graph, has_manifest = placed_graph(where), (where / MANIFEST).exists()
    if not has_manifest and graph is None:
        raise FitError(f"neither {_GRAPH} nor {MANIFEST} is there", file=where, hint="verify what surgery has written")
    checks: list[Check] = []
    notes: list[str] = []
    recorded = check_added(where, checks)
    manifest, digest = check_manifest(where, recorded, checks, base) if has_manifest else ({}, "")
    if graph is None:
        if "ledger" in manifest and base is not None:
            checks += _against_base(where, manifest, base, adapters, number, asked=recompute is not None)
        else:
            notes += _not_compared(manifest, base)
        if text is not None:
            raise FitError("logits on a text are measured of graphs, and there is none", file=where)
        return Verification(where, "folder", tuple(checks), tuple(notes), digest)
    on_a_disk(where, "onnxruntime runs the graph, and reads files")
    if text is not None:  # before the proofs, which take minutes
        from surgery.verification.logit_error import check_measurable

        check_measurable(graph)
    from surgery.onnx.export.adapters import sort_adapters

    roles = sort_adapters(adapters)
    if len(roles.prefix) > 1:
        raise FitError("a graph has one soft prompt of its own, which is the first", file=roles.prefix[1].adapter.path)
    hashed = _hashed({**manifest.get("files", {}), **recorded})
    exported = manifest.get("export")
    renamed = exported.get("renamed", {}) if isinstance(exported, Mapping) else {}
    from surgery.verification.graph_proof import prove_graphs

    prove_graphs(graph, base, roles, hashed, renamed, tolerance, checks, notes)
    error = None
    if text is not None and base is not None:
        from surgery.verification.logit_error import error_on_text

        error = error_on_text(graph, base, roles, text)
        checks.append(Check("logits on the text", error.said))
    return Verification(where, "graph", tuple(checks), tuple(notes), digest, logits=error)


def _folder(where: Path) -> Path:
    """The folder of an output that is named by itself, or by a graph in it."""
    if where.name.endswith(".onnx") and where.is_file():
        where = side_folder(where)
    if where.is_file():
        raise FitError(
            "a file, not the folder of an output", file=where, hint="verify the folder that surgery has written"
        )
    if not where.is_dir():
        raise NotFoundError("no such folder", file=where)
    return where


def _against_base(
    where: Path,
    manifest: Mapping[str, Any],
    base: Checkpoint,
    adapters: AdaptersLike,
    number: int | None,
    *,
    asked: bool,
) -> Iterator[Check]:
    """Compare a folder of weights with its base, and, with adapters, `number` of them with what these make of it.

    Raises:
        ProofError: they are others.
        UsageError: computing some was `asked` for, without adapters.
    """
    copied = compare_copied(open_checkpoint(where), base, manifest)
    yield Check("copied tensors", f"{count(copied)}, each the base's")
    if weighted := as_weighted(adapters):
        from surgery.verification.recomputed import recomputed_weights

        done, all_of_them = recomputed_weights(where, manifest, base, weighted, number)
        which = "" if done == all_of_them else f" of {count(all_of_them)}, drawn anew each time"
        yield Check("recomputed weights", f"{count(done)}{which}, as base and adapters make them")
    elif asked:
        raise UsageError("what was merged is not named", hint="name the adapters that were merged")


def _not_compared(manifest: Mapping[str, Any], base: Checkpoint | None) -> Iterator[str]:
    """A note on weights of a folder that no base was compared with."""
    if "ledger" not in manifest:  # an adapter: nothing in it is the base's
        if base is not None:
            yield "an adapter has no tensors of the base: --against has nothing to compare"
    elif not set(manifest["files"]) <= _hashed(manifest["files"]):
        yield "copied tensors were not compared with the base: --against BASE does"


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
