# SPDX-License-Identifier: Apache-2.0
"""The graphs of an encoder-decoder, each compared with the reference by itself: a graph gets what the reference made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.onnx.graph.pair_names import BEGUN, FIRST, MASK, STATES, SWITCH, kept_names
from surgery.reference import Cache, Encoded, Reference, encode, forward
from surgery.reference.attention import kept_of
from surgery.verification.logit_difference import LogitDifference
from surgery.verification.onnx import measured, real_tokens, sides, wrong_tokens
from surgery.verification.session import Arrays, GraphFile, Session, check_sizes, read_graph
from surgery.verification.slots import random_slots
from surgery_formats.errors import ProofError

__all__ = ["halves", "measure_half"]

_ROWS, _READ, _BEGIN, _STEPS, _SEED = 3, 13, 3, 6, 22

Ids = np.ndarray[Any, Any]


def halves(main: GraphFile) -> list[GraphFile]:
    """The other graphs of the pair whose decoder is `main`: its encoder, and its decoder's two runs where they are there.

    Raises:
        ProofError: the encoder is not there.
    """
    if not main.contract.encoder:
        return []
    folder = main.path.parent
    encoder = folder / Path(main.contract.encoder).name
    if not encoder.is_file():
        raise ProofError("the decoder's contract names an encoder that is not there", file=encoder)
    return [read_graph(path) for path in (encoder, folder / FIRST, folder / BEGUN) if path.is_file()]


def measure_half(
    graph: GraphFile, reference: Reference, strengths: Mapping[str, float] | None = None
) -> list[LogitDifference]:
    """Compare one graph, without adapters and with its slots filled, with the `reference` of the pair."""
    assert reference.model.encoder is not None
    own = reference
    if graph.contract.kind == "encoder":
        own = replace(reference, model=reference.model.encoder)
    check_sizes(graph, own.model)
    session, slots = Session(graph, strengths), random_slots(graph, own)
    found = list(_measures(session, own, reference))
    if slots is not None:
        arrays, changed = slots
        session.slot_arrays |= arrays
        filled = _measures(session, changed, reference)
        found += [replace(measure, name=f"{measure.name}, slots filled") for measure in filled]
    return found


def _measures(session: Session, reference: Reference, pair: Reference) -> Iterator[LogitDifference]:
    for side, source, real in _sources(session, pair):
        padded = f"{_ROWS} rows{f', padded on the {side}' if side else ''}"
        if session.contract.kind == "encoder":
            yield _encoder(session, reference, source, real, padded)
            continue
        encoded = encode(pair, source, real)
        mask = {MASK: encoded.real.numpy().astype(np.int64)} if MASK in session.inputs else {}
        if SWITCH in session.inputs:
            yield from _merged(session, reference, encoded, mask, padded)
        elif STATES in session.inputs:
            ids = _begin(reference)
            outputs = session.run({**mask, STATES: encoded.values.numpy(), "input_ids": ids})
            expected = forward(reference, torch.from_numpy(ids), encoded=encoded)
            yield measured(f"first run of {padded}", outputs["logits"], expected.logits.numpy())
        else:
            yield _begun(session, reference, encoded, mask, padded)


def _sources(session: Session, pair: Reference) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """What the encoder reads: without padding, and padded on every permitted side."""
    encoder = pair.model.encoder
    assert encoder is not None
    draw = np.random.default_rng(_SEED)
    if (stem := encoder.embedding.stem) is not None:
        sound = draw.normal(size=(_ROWS, stem.bins, stem.frames)).astype(np.float32)
        yield "", torch.from_numpy(sound), None
        return
    width = min(_READ, encoder.max_positions)
    ids = draw.integers(0, encoder.vocabulary, (_ROWS, width))
    lengths = [max(1, width * (_ROWS - row) // _ROWS) for row in range(_ROWS)]
    yield "", torch.from_numpy(ids), None
    for side in sides(session.contract):
        real = real_tokens(lengths, width, side)
        yield side, torch.from_numpy(np.where(real, ids, 0)), torch.from_numpy(real)


def _begin(reference: Reference) -> Ids:
    draw = np.random.default_rng(_SEED + 1)
    return draw.integers(0, reference.model.vocabulary, (_ROWS, min(_BEGIN, reference.model.max_positions)))


def _encoder(
    session: Session, reference: Reference, source: torch.Tensor, real: torch.Tensor | None, padded: str
) -> LogitDifference:
    if "input_features" in session.inputs:
        feed = {"input_features": source.numpy()}
    else:
        mask = torch.ones_like(source) if real is None else real.long()
        feed = {"input_ids": source.numpy(), "attention_mask": mask.numpy()}
    computed = session.run(feed)["last_hidden_state"]
    encoded = encode(reference, source, real)
    return measured(padded, computed[encoded.real.numpy()], encoded.values.numpy()[encoded.real.numpy()])


def _past(reference: Reference, cache: Cache, encoded: Encoded) -> Arrays:
    """Inputs of a run that has begun: the reference's own cache, and what its layers keep of the encoder's result."""
    number = len(reference.model.layers)
    crossed = [layer.cross for layer in reference.model.layers if layer.cross is not None]
    theirs = (kept_of(encoded.values, cross.attention, reference.load) for cross in crossed)
    named = {"decoder": cache.layers, "encoder": tuple(theirs)}
    return {
        name: part.numpy()
        for side, layers in named.items()
        for name, part in zip(kept_names(number, side), (part for layer in layers for part in layer), strict=True)
    }


@torch.no_grad()
def _begun(session: Session, reference: Reference, encoded: Encoded, mask: Arrays, padded: str) -> LogitDifference:
    ids = torch.from_numpy(_begin(reference))
    before = forward(reference, ids[:, :-1], encoded=encoded).cache
    outputs = session.run({**mask, **_past(reference, before, encoded), "input_ids": ids[:, -1:].numpy()})
    expected = forward(reference, ids[:, -1:], past=before, encoded=encoded)
    return measured(f"a later run of {padded}", outputs["logits"], expected.logits.numpy())


def _merged(
    session: Session, reference: Reference, encoded: Encoded, mask: Arrays, padded: str
) -> Iterator[LogitDifference]:
    """Run both branches on the graph's own greedy tokens, then the reference on all of them at once."""
    begin = _begin(reference)
    steps = max(0, min(_STEPS, session.contract.max_length - begin.shape[1]))
    feed: Arrays = {**mask, STATES: encoded.values.numpy(), **session.past(len(begin))}
    outputs = session.run({**feed, "input_ids": begin, SWITCH: np.array([False])})
    logits = [outputs["logits"]]
    chosen = [outputs["logits"][:, -1].argmax(-1)]
    for _ in range(steps):
        feed |= {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items()
            if name.startswith("present.") and value.size  # a branch gives out nothing for what it was given
        }
        outputs = session.run({**feed, "input_ids": chosen[-1][:, None], SWITCH: np.array([True])})
        logits.append(outputs["logits"])
        chosen.append(outputs["logits"][:, -1].argmax(-1))
    ids = np.concatenate([begin, np.stack(chosen, 1)[:, :steps]], 1)
    expected = forward(reference, torch.from_numpy(ids), encoded=encoded).logits.numpy()
    width = begin.shape[1]
    yield measured(f"first run of {padded}", logits[0], expected[:, :width])
    if not steps:
        return
    computed, wanted = np.concatenate(logits[1:], 1), expected[:, width:]
    undecided = 2 * float(np.abs(computed - wanted).max(initial=0))
    wrong = wrong_tokens(np.stack(chosen, 1), expected[:, width - 1 :], undecided)
    yield measured(f"{steps} later runs of {padded}", computed, wanted, wrong)
