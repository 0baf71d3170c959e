# SPDX-License-Identifier: Apache-2.0
"""Does a graph compute what its model is? Every logit of a prefill, of decode steps and of a padded batch against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgery.reference import Cache, Reference, forward
from surgery.verification.session import Arrays, Session

if TYPE_CHECKING:
    from surgery.onnx.graph.contract import Contract

__all__ = ["LogitDifference", "compare_decoder", "compare_encoder", "compare_slots"]

_PROMPT, _STEPS = 13, 8
_SEED = 20
Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LogitDifference:
    """One comparison.

    Attributes:
        name: What was run.
        difference: Greatest absolute difference of a logit.
        size: Greatest absolute logit of the reference.
        wrong_tokens: Greedy tokens that differ although the reference was not undecided between them.
    """

    name: str
    difference: float
    size: float
    wrong_tokens: int = 0

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance` of the larger of 1 and `size`; NaN is not."""
        return self.difference <= tolerance * max(1.0, self.size) and not self.wrong_tokens


def _prompts(reference: Reference, contract: Contract, rows: int, steps: int) -> tuple[Ids, list[int]]:
    """Random ids, and the length of each row: full, two thirds, one third."""
    model = reference.model
    length = max(1, min(_PROMPT, contract.max_length - contract.virtual_tokens - steps))
    ids = np.random.default_rng(_SEED).integers(0, model.vocabulary, (rows, length))
    if model.embedding.position_rule == "nonpad":
        ids[ids == model.embedding.padding_token] = (model.embedding.padding_token + 1) % model.vocabulary
    return ids, [max(1, length * (rows - row) // rows) for row in range(rows)]


def _real(lengths: list[int], width: int, side: str) -> Ids:
    places = np.arange(width)[None]
    counts = np.array(lengths)[:, None]
    return (places < counts) if side == "right" else (places >= width - counts)


def _sides(contract: Contract) -> tuple[str, ...]:
    return ("left", "right") if contract.padding == "any" else (contract.padding,)


def compare_decoder(session: Session, reference: Reference, default: Cache | None = None) -> Iterator[LogitDifference]:
    """Prefill and decode steps with greedy tokens, of one row; a batch padded on every side that the contract allows.

    Args:
        session: The graph.
        reference: The model.
        default: Past that the graph brings along (a soft prompt), for one row.
    """
    contract = session.contract
    steps = _steps(contract)
    ids, lengths = _prompts(reference, contract, 3, steps)
    yield from _generated(session, reference, ids[:1], np.ones((1, ids.shape[1]), bool), steps, default, "")
    if default is not None:  # several rows on top of a past are the runner's affair
        return
    for side in _sides(contract):
        real = _real(lengths, ids.shape[1], side)
        yield from _generated(session, reference, ids, real, steps, None, side)
    crosses = ids.shape[1] // 2 <= contract.rope_switch < ids.shape[1]  # keys of the first part would keep other angles
    if contract.prefill_batch and ids.shape[1] > 1 and not crosses:
        yield _in_two_parts(session, reference, ids)


def compare_slots(
    session: Session, reference: Reference, default: Cache | None = None, front: torch.Tensor | None = None
) -> LogitDifference:
    """A row through a session whose slots are filled against the reference with the same added; see the others."""
    ids, _ = _prompts(reference, session.contract, 1, 0)
    if session.contract.kind == "encoder":
        name, measure = "encoder", next(compare_encoder(session, reference, front))
    else:
        real = np.ones((1, ids.shape[1]), bool)
        name, measure = "prefill of one row", next(_generated(session, reference, ids, real, 0, default, ""))
    return replace(measure, name=f"{name}, slots filled")


def _steps(contract: Contract) -> int:
    """Decode steps, not across the length where LongRoPE changes its angles: a runner prefills anew there."""
    switch = contract.rope_switch
    length = min(_PROMPT, contract.max_length - contract.virtual_tokens)
    steps = min(_STEPS, max(0, contract.max_length - contract.virtual_tokens - length))
    return min(steps, max(0, switch - length)) if 0 < length <= switch else steps


def _generated(
    session: Session, reference: Reference, ids: Ids, real: Ids, steps: int, default: Cache | None, side: str
) -> Iterator[LogitDifference]:
    """Run the graph on its own greedy tokens, then the reference on all of them at once."""
    batch, width = ids.shape
    ids = np.where(real, ids, 0)
    front = 0 if default is None else default.real.shape[1]
    mask = np.concatenate([np.ones((batch, front), np.int64), real.astype(np.int64)], 1)
    found = _step(session, ids, mask, session.past(batch) if default is None else {})
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    chosen = [found["logits"][np.arange(batch), last].argmax(-1)]
    given = [found["logits"]]
    for _ in range(steps):
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], 1)
        counted = (np.arange(mask.shape[1])[None] < mask.sum(1, keepdims=True)).astype(np.int64)
        seen = counted if session.contract.padding == "right" else mask  # GroupQueryAttention counts, it does not look
        found = _step(session, chosen[-1][:, None], seen, _present(found))
        given.append(found["logits"][:, -1:])
        chosen.append(given[-1][:, -1].argmax(-1))
    whole = np.concatenate([ids, np.stack(chosen, 1)[:, :steps]], 1)
    told = np.concatenate([real, np.ones((batch, steps), bool)], 1)
    past = default
    wanted = forward(reference, torch.from_numpy(whole), real=torch.from_numpy(told), past=past).logits.numpy()
    where = f", padded on the {side}" if side else ""
    rows = "one row" if batch == 1 else f"{batch} rows"
    yield _measured(f"prefill of {rows}{where}", given[0][real], wanted[:, :width][real])
    if steps:
        ours, theirs = np.concatenate(given[1:], 1), wanted[:, width:]
        undecided = 2 * float(np.abs(ours - theirs).max(initial=0))
        before = np.concatenate([wanted[np.arange(batch), last][:, None], theirs], 1)
        wrong = _wrong_tokens(np.stack(chosen, 1), before, undecided)
        yield _measured(f"{steps} decode steps of {rows}{where}", ours, theirs, wrong)


def _wrong_tokens(chosen: Ids, wanted: Ids, undecided: float) -> int:
    """Tokens that the reference does not choose, near ties aside."""
    picked = np.take_along_axis(wanted, chosen[..., None], -1)[..., 0]
    return int((wanted.max(-1) - picked > undecided).sum())


def _in_two_parts(session: Session, reference: Reference, ids: Ids) -> LogitDifference:
    """A prefill of several rows on top of a past."""
    half = ids.shape[1] // 2
    found = _step(session, ids[:, :half], np.ones((len(ids), half), np.int64), session.past(len(ids)))
    found = _step(session, ids[:, half:], np.ones(ids.shape, np.int64), _present(found))
    wanted = forward(reference, torch.from_numpy(ids)).logits.numpy()[:, half:]
    return _measured(f"prefill of {len(ids)} rows on top of a past", found["logits"], wanted)


def _step(session: Session, ids: Ids, mask: Ids, past: Arrays) -> Arrays:
    return session.run({"input_ids": ids, "attention_mask": mask, **past})


def _present(found: Arrays) -> Arrays:
    return {
        f"past_key_values.{name.removeprefix('present.')}": value
        for name, value in found.items()
        if name.startswith("present.")
    }


def compare_encoder(
    session: Session, reference: Reference, front: torch.Tensor | None = None
) -> Iterator[LogitDifference]:
    """A batch without padding, and one padded on every side that the contract allows; token types where the model has them.

    Args:
        session: The graph.
        reference: The model.
        front: Embeddings ``(n, D)`` of a soft prompt, which the graph puts before every row and leaves out of what it
            gives.
    """
    ids, lengths = _prompts(reference, session.contract, 3, 0)
    embedding = reference.model.embedding
    pad = embedding.padding_token if embedding.position_rule == "nonpad" else 0
    for side in ("", *_sides(session.contract)):
        real = _real(lengths, ids.shape[1], side) if side else np.ones(ids.shape, bool)
        fed = np.where(real, ids, pad)
        feed = {"input_ids": fed, "attention_mask": real.astype(np.int64)}
        types = None
        if "token_type_ids" in session.inputs:
            types = (np.arange(ids.shape[1])[None] >= ids.shape[1] // 2).astype(np.int64).repeat(len(ids), 0)
            feed["token_type_ids"] = types
        found = session.run(feed)
        wanted = forward(
            reference,
            torch.from_numpy(fed),
            real=torch.from_numpy(real),
            types=None if types is None else torch.from_numpy(types),
            virtual=front,
        )
        where = f", padded on the {side}" if side else ""
        logits = found["logits"] if "logits" in found else found["last_hidden_state"]
        theirs = wanted.logits.numpy()
        if logits.ndim == 3:
            theirs = theirs if front is None else theirs[:, len(front) :]
            logits, theirs = logits[real], theirs[real]
        yield _measured(f"{len(ids)} rows{where}", logits, theirs)
        if wanted.pooled is not None and "pooler_output" in found:
            yield _measured(f"pooled output{where}", found["pooler_output"], wanted.pooled.numpy())


def _measured(name: str, ours: Ids, theirs: Ids, wrong: int = 0) -> LogitDifference:
    if ours.shape != theirs.shape:
        return LogitDifference(f"{name}: shape {ours.shape} instead of {theirs.shape}", float("inf"), 0.0, wrong)
    difference = np.abs(ours.astype(np.float64) - theirs)
    return LogitDifference(name, float(difference.max(initial=0)), float(np.abs(theirs).max(initial=0)), wrong)
