# SPDX-License-Identifier: Apache-2.0
"""A graph's weights as a checkpoint, under the names of the base that it was made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from surgery._version import __version__
from surgery.engine.execute import Run, execute
from surgery.engine.layout import planned_file
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Compute, Plan, PlannedTensor, SideFile
from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.search import Located
from surgery.onnx.locate.wanted import Wanted
from surgery.onnx.recover.graph_weight import GraphWeight, stored_type
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import fingerprint
from surgery_formats.storage.plain import Elements
from surgery_formats.text import listing, summed_up

__all__ = ["graph_weights", "write_checkpoint"]

_LAYOUT = "the graph before the fine-tune, in the place of the base, tells where its weights lie"


def graph_weights(located: Located, *, changed: bool = False) -> tuple[tuple[GraphWeight, ...], tuple[str, ...]]:
    """Every weight of the base as the graph has it, and remarks.

    Args:
        located: What was found.
        changed: Take weights that have other values from where they were found near, too: of a graph of a fine-tune.

    Raises:
        FitError: a weight is not in the graph.
    """
    owners = {weight.label: weight for weight in located.weights}
    near: dict[str, list[LocatedPiece]] = {}
    for one in located.near if changed else ():
        near.setdefault(one.piece.weight.label, []).append(one.piece)
    found: list[GraphWeight] = []
    lost: list[str] = []
    for weight in located.weights:
        whole = located.covered[weight.label] == 1
        pieces = located.of_weight[weight.label] if whole else tuple(near.get(weight.label, ())[:1])
        if not pieces:
            lost.append(weight.label)
            continue
        pieces = _enough(weight, pieces)
        folds = tuple(owners[piece.fold] if piece.fold else None for piece in pieces)
        found.append(GraphWeight(weight, pieces, stored_type(pieces), folds))
    if lost:
        hint = "of a graph of a fine-tune, extract-lora takes weights with other values" if not changed else _LAYOUT
        raise FitError(
            f"{len(lost)} weights of the base are not in the graph: {listing(summed_up(lost), 6)}",
            file=located.graph.path,
            hint=hint,
        )
    coded = sum(isinstance(weight.pieces[0].place, CodedMatrix) for weight in found)
    remarks = (f"{coded} weights are what codes stand for, not what was quantised",) if coded else ()
    return tuple(found), remarks


def _enough(weight: Wanted, pieces: tuple[LocatedPiece, ...]) -> tuple[LocatedPiece, ...]:
    """One piece that is all of the weight, if there is one; what a graph holds twice is read once."""
    size = weight.rows * weight.cols if weight.is_vector else weight.rows
    whole = [piece for piece in pieces if not piece.flipped and len(piece.rows) == size]
    return (whole[0],) if whole else pieces


def write_checkpoint(
    located: Located, checkpoint: Checkpoint, folder: Path, run: Run, *, changed: bool = False
) -> tuple[Ledger, tuple[str, ...]]:
    """Write the graph's weights as safetensors under the base's names, with the base's side files.

    Raises:
        FitError: a weight is not in the graph, or the base is a pipeline.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    component = checkpoint.main
    weights, remarks = graph_weights(located, changed=changed)
    planned = []
    for weight in weights:
        dtype = weight.dtype if weight.dtype.is_float else DType.F32
        target = Elements(weight.sizes, weight.shape, dtype)
        step = Compute(weight, (), target)
        nbytes = dtype.nbytes(weight.shape[0] * weight.shape[1])
        planned.append(PlannedTensor(weight.name, "", weight.name, dtype, weight.sizes, step, "copied", 0, nbytes))
    others = [
        name
        for name in component.tensors
        if name not in component.parameters or not component.parameters[name].storage.is_float
    ]
    if others:
        remarks = (*remarks, f"not numbers, and so not written: {listing(summed_up(others))}")
    file = planned_file("model.safetensors", planned)
    side = [SideFile(name, path) for name, path in checkpoint.side_files]
    if component.config:
        side.append(SideFile("config.json", data=json.dumps(component.config, indent=2).encode()))
    facts = {
        "graph": {one.path.name: fingerprint(one) for one in located.graph.files},
        "base": {shard.path.name: fingerprint(shard.file) for shard in component.shards},
    }
    named = [__version__, "graph to checkpoint", facts, changed]
    plan = Plan(
        verb="locate",
        files=(file,),
        side_files=tuple(side),
        accounts=(),
        ignored=(),
        inputs=(*located.graph.files, *(shard.file for shard in component.shards)),
        roots=(located.graph.path, checkpoint.path),
        id=hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest(),
        facts=facts,
        warnings=remarks,
    )
    return execute(plan, folder, run), remarks
