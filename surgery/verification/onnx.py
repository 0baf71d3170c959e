# SPDX-License-Identifier: Apache-2.0
"""Compare every logit of a graph with the reference: prefill, decode steps, and a padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.onnx.graph.contract import KEEP, Contract
from surgery.reference import Cache, Reference, forward, prompt_cache
from surgery.verification.inserted import is_gated
from surgery.verification.logit_difference import SOFT_PROMPT, LogitDifference
from surgery.verification.session import Arrays, Session
from surgery_formats.arrays import as_torch
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.families.recipe import ClassifierHead, Model, Patches
from surgery_formats.text import show

__all__ = [
    "compare_decoder",
    "compare_encoder",
    "compare_prompt",
    "compare_slots",
    "measured",
    "real_tokens",
    "sides",
    "wrong_tokens",
]

_PROMPT, _STEPS = 13, 8
_SEED = 20
Ids = np.ndarray[Any, Any]


def _prompts(reference: Reference, contract: Contract, rows: int, steps: int) -> tuple[Ids, list[int]]:
    """Random ids, and the length of each row: full, two thirds, one third."""
    model = reference.model
    length = max(1, min(_PROMPT, contract.max_length - contract.virtual_tokens - steps))
    ids = np.random.default_rng(_SEED).integers(0, model.vocabulary, (rows, length))
    if (padding := _padding(model)) is not None:
        ids[ids == padding] = (padding + 1) % model.vocabulary
    return ids, [max(1, length * (rows - row) // rows) for row in range(rows)]


def real_tokens(lengths: list[int], width: int, side: str) -> Ids:
    """Which tokens are no padding ``(rows, width)``, of rows padded on this side."""
    indices = np.arange(width)[None]
    counts = np.array(lengths)[:, None]
    return (indices < counts) if side == "right" else (indices >= width - counts)


def sides(contract: Contract) -> tuple[str, ...]:
    """The sides on which rows may be padded."""
    return ("left", "right") if contract.padding == "any" else (contract.padding,)


def compare_decoder(session: Session, reference: Reference, default: Cache | None = None) -> Iterator[LogitDifference]:
    """Compare prefill and decode steps with greedy tokens, of one row, and of batches padded on every permitted side.

    `default` is the graph's own past (a soft prompt), for one row.
    """
    contract = session.contract
    steps = 0 if is_gated(reference.model) else _steps(contract)  # the reference computes all tokens together
    ids, lengths = _prompts(reference, contract, 3, steps)
    yield from _generated(session, reference, ids[:1], np.ones((1, ids.shape[1]), bool), steps, default, "")
    if default is not None:  # several rows on top of a past are tested by the runner
        return
    if KEEP in session.optional:
        yield _last_positions(session, reference, ids[:1])
    if contract.embedder:
        yield from _images_among_tokens(session, reference, ids)
    for side in sides(contract):
        real = real_tokens(lengths, ids.shape[1], side)
        yield from _generated(session, reference, ids, real, steps, None, side)
    crosses = ids.shape[1] // 2 <= contract.rope_switch < ids.shape[1]  # keys of the first part would have other angles
    together = crosses or is_gated(reference.model)
    if contract.prefill_batch and ids.shape[1] > 1 and not together:
        yield _in_two_parts(session, reference, ids)


def compare_slots(
    session: Session, reference: Reference, default: Cache | None = None, front: torch.Tensor | None = None
) -> Iterator[LogitDifference]:
    """Compare a call through a session with filled slots, every output of it, with the reference plus the same factors."""
    if session.contract.kind == "encoder":
        found = compare_encoder(session, reference, front, default, padded=False)
    else:
        ids, _ = _prompts(reference, session.contract, 1, 0)
        found = _generated(session, reference, ids, np.ones((1, ids.shape[1]), bool), 0, default, "")
    yield from (replace(measure, name=f"{measure.name}, slots filled") for measure in found)


def _steps(contract: Contract) -> int:
    """Number of decode steps, ending before LongRoPE changes its angles: there a runner prefills again."""
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
    outputs = _step(session, ids, mask, session.past(batch) if default is None else {})
    last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
    chosen = [outputs["logits"][np.arange(batch), last].argmax(-1)]
    logits = [outputs["logits"]]
    for _ in range(steps):
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], 1)
        counted = (np.arange(mask.shape[1])[None] < mask.sum(1, keepdims=True)).astype(np.int64)
        # GroupQueryAttention uses only the number of ones
        fed_mask = counted if session.contract.padding == "right" else mask
        outputs = _step(session, chosen[-1][:, None], fed_mask, _present(outputs))
        logits.append(outputs["logits"][:, -1:])
        chosen.append(logits[-1][:, -1].argmax(-1))
    all_ids = np.concatenate([ids, np.stack(chosen, 1)[:, :steps]], 1)
    real_all = np.concatenate([real, np.ones((batch, steps), bool)], 1)
    past = default
    expected = forward(reference, torch.from_numpy(all_ids), real=torch.from_numpy(real_all), past=past).logits.numpy()
    padded = f", padded on the {side}" if side else ""
    rows = "one row" if batch == 1 else f"{batch} rows"
    yield measured(f"prefill of {rows}{padded}", logits[0][real], expected[:, :width][real])
    if steps:
        computed, reference_logits = np.concatenate(logits[1:], 1), expected[:, width:]
        undecided = 2 * float(np.abs(computed - reference_logits).max(initial=0))
        before = np.concatenate([expected[np.arange(batch), last][:, None], reference_logits], 1)
        wrong = wrong_tokens(np.stack(chosen, 1), before, undecided)
        yield measured(f"{steps} decode steps of {rows}{padded}", computed, reference_logits, wrong)


def wrong_tokens(chosen: Ids, expected: Ids, undecided: float) -> int:
    """Count tokens that the reference does not choose, except near ties."""
    picked = np.take_along_axis(expected, chosen[..., None], -1)[..., 0]
    return int((expected.max(-1) - picked > undecided).sum())


def _in_two_parts(session: Session, reference: Reference, ids: Ids) -> LogitDifference:
    """Compare a prefill of several rows on top of a past."""
    half = ids.shape[1] // 2
    outputs = _step(session, ids[:, :half], np.ones((len(ids), half), np.int64), session.past(len(ids)))
    outputs = _step(session, ids[:, half:], np.ones(ids.shape, np.int64), _present(outputs))
    expected = forward(reference, torch.from_numpy(ids)).logits.numpy()[:, half:]
    return measured(f"prefill of {len(ids)} rows on top of a past", outputs["logits"], expected)


def _last_positions(session: Session, reference: Reference, ids: Ids) -> LogitDifference:
    """Compare a prefill that computes the logits of its last positions alone."""
    feed = {"input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64), **session.past(1)}
    kept = min(2, ids.shape[1])
    outputs = session.run({**feed, KEEP: np.array(kept)})
    expected = forward(reference, torch.from_numpy(ids)).logits.numpy()[:, -kept:]
    return measured(f"logits of the last {kept} positions", outputs["logits"], expected)


def _images_among_tokens(session: Session, reference: Reference, ids: Ids) -> Iterator[LogitDifference]:
    """Compare a prefill with images among its tokens, where their places, or what they see, are told apart from a text's."""
    feed = {"input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64), **session.past(len(ids))}
    if session.on_grid:
        places = np.random.default_rng(_SEED).integers(0, min(64, session.contract.max_length), (3, *ids.shape))
        outputs = session.run({**feed, "position_ids": places})
        expected = forward(reference, torch.from_numpy(ids), grid=torch.from_numpy(places)).logits.numpy()
        yield measured(f"prefill of {len(ids)} rows on a grid", outputs["logits"], expected)
    if "token_type_ids" in session.inputs:
        images = (np.arange(ids.shape[1])[None] + np.arange(len(ids))[:, None]) % 5 > 1
        outputs = session.run({**feed, "token_type_ids": images.astype(np.int64)})
        expected = forward(reference, torch.from_numpy(ids), images=torch.from_numpy(images)).logits.numpy()
        yield measured(f"prefill of {len(ids)} rows with images", outputs["logits"], expected)


def _step(session: Session, ids: Ids, mask: Ids, past: Arrays) -> Arrays:
    return session.run({"input_ids": ids, "attention_mask": mask, **past})


def _present(outputs: Arrays) -> Arrays:
    named = (
        (name.replace("present_conv.", "past_conv.").replace("present.", "past_key_values."), name) for name in outputs
    )
    return {past: outputs[name] for past, name in named if past != name}


def compare_encoder(
    session: Session,
    reference: Reference,
    front: torch.Tensor | None = None,
    past: Cache | None = None,
    *,
    padded: bool = True,
) -> Iterator[LogitDifference]:
    """Compare a batch without padding and, if `padded`, one on every permitted side, with token types if supported.

    `front` is a soft prompt ``(n, D)``, which the graph puts before every row and omits from its output; `past` are keys and
    values, for one row, which it puts before those of every layer.

    Raises:
        ProofError: the graph has other outputs than the model.
    """
    if reference.model.embedding.patches is not None:
        yield from _images(session, reference, reference.model.embedding.patches)
        return
    head = reference.model.head
    several = not (isinstance(head, ClassifierHead) and head.tokens == "last" and head.padding_token is None)
    ids, lengths = _prompts(reference, session.contract, 3 if several else 1, 0)
    choices = isinstance(head, ClassifierHead) and head.choices
    for side in ("", *(sides(session.contract) if padded and several else ())):
        real = real_tokens(lengths, ids.shape[1], side) if side else np.ones(ids.shape, bool)
        fed = np.where(real, ids, _padding(reference.model) or 0)
        feed = {"input_ids": fed, "attention_mask": real.astype(np.int64)}
        types = None
        if "token_type_ids" in session.inputs:
            types = (np.arange(ids.shape[1])[None] >= ids.shape[1] // 2).astype(np.int64).repeat(len(ids), 0)
            feed["token_type_ids"] = types
        outputs = session.run({name: array[None] for name, array in feed.items()} if choices else feed)
        expected = forward(
            reference,
            torch.from_numpy(fed),
            real=torch.from_numpy(real),
            types=None if types is None else torch.from_numpy(types),
            virtual=front,
            past=None if past is None else past.expand(len(ids)),
        ).outputs
        where = f", padded on the {side}" if side else ""
        for name in _outputs(outputs, expected):
            computed, wanted = outputs[name], expected[name].numpy()
            if choices:
                computed = computed.T
            if _PER_TOKEN.get(name, computed.ndim == 3):
                wanted = wanted if front is None else wanted[:, len(front) :]
                computed, wanted = computed[real], wanted[real]
            said = _CALLED.get(name, f"{name.replace('_', ' ')} of ") + f"{len(ids)} rows"
            yield measured(f"{said}{where}", computed, wanted)


def _images(session: Session, reference: Reference, patches: Patches) -> Iterator[LogitDifference]:
    """Compare what the graph makes of random images."""
    pixels = np.random.default_rng(_SEED).normal(size=(3, patches.channels, *patches.image)).astype(np.float32)
    outputs = session.run({"pixel_values": pixels})
    expected = forward(reference, torch.from_numpy(pixels)).outputs
    for name in _outputs(outputs, expected):
        said = _CALLED.get(name, f"{name.replace('_', ' ')} of ")
        yield measured(f"{said}{len(pixels)} images", outputs[name], expected[name].numpy())


def _outputs(computed: Arrays, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the outputs, in the graph's order.

    Raises:
        ProofError: graph and model have other outputs.
    """
    if more := [name for name in computed if name not in expected]:
        raise ProofError(f"the model has no output '{show(more[0], 60)}'")
    if less := [name for name in expected if name not in computed]:
        raise ProofError(f"the graph lacks the output '{less[0]}'")
    return list(computed)


_PER_TOKEN = {"start_logits": True, "end_logits": True}
_CALLED = {"logits": "", "last_hidden_state": "", "pooler_output": "pooled output of "}


def _padding(model: Model) -> int | None:
    """The token that the model itself takes for padding, if any."""
    if isinstance(model.head, ClassifierHead) and model.head.tokens == "last":
        return model.head.padding_token
    return model.embedding.padding_token if model.embedding.position_rule == "nonpad" else None


def measured(name: str, computed: Ids, expected: Ids, wrong: int = 0) -> LogitDifference:
    """The comparison of two arrays."""
    if computed.shape != expected.shape:
        return LogitDifference(f"{name}: shape {computed.shape} instead of {expected.shape}", float("inf"), 0.0, wrong)
    difference = np.abs(computed.astype(np.float64) - expected)
    return LogitDifference(name, float(difference.max(initial=0)), float(np.abs(expected).max(initial=0)), wrong)


def compare_prompt(
    graph: Path, adapter: Adapter, reference: Reference, past: Cache | None, front: torch.Tensor | None
) -> LogitDifference:
    """Compare the graph's default past, or its embeddings in front of an encoder, with the soft prompt of `adapter`.

    Raises:
        FitError: the graph has no soft prompt.
        ProofError: the number of virtual tokens differs.
    """
    prompt = adapter.prompt
    assert prompt is not None
    if past is None and front is None:
        raise FitError("the graph has no soft prompt to compare with", file=graph)
    if past is not None:
        computed = [part for layer in past.layers for part in layer]
        if prompt.prefix is None:
            rows = as_torch(prompt.embeddings()).float()
            expected = [part for layer in prompt_cache(reference, rows).layers for part in layer]
        else:
            pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
            expected = [as_torch(part)[None] for pair in pairs for part in pair]
    else:
        assert front is not None
        computed, expected = [front], [as_torch(prompt.embeddings()).float()]
    if [part.shape for part in computed] != [part.shape for part in expected]:
        raise ProofError(f"the graph's soft prompt and that of {adapter.path.name} differ in size", file=graph)
    pairs_of_parts = list(zip(computed, expected, strict=True))
    # numpy's maximum is NaN where one is, and Python's need not be
    difference = np.max([float((a.double() - b.double()).abs().max()) for a, b in pairs_of_parts])
    size = np.max([float(b.abs().max()) for _, b in pairs_of_parts])
    return LogitDifference(SOFT_PROMPT, float(difference), float(size))
