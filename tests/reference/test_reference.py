# SPDX-License-Identifier: Apache-2.0
"""The reference computes what transformers computes, for every family and every switch its recipe reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.reference import Reference, forward, greedy, open_reference
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.parameters import parameters
from tests.oracles import recipes

Pair = Callable[[str], tuple[Any, Reference]]

LIMIT = 1e-4
PROMPT, STEPS = 13, 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Reference]]:
    """From the name of a case to transformers' model and ours, of one checkpoint."""
    root = tmp_path_factory.mktemp("recipes")

    def made(name: str) -> tuple[Any, Reference]:
        folder = root / name if (root / name).exists() else recipes.build(name, root / name)
        return recipes.load(name, folder), _reference(folder)

    kept = functools.cache(made)
    # transformers' dynamic frequencies remember the longest sequence they have seen: every test takes a fresh model.
    return lambda name: made(name) if "dynamic" in name else kept(name)


def _reference(folder: Path) -> Reference:
    return open_reference(open_checkpoint(folder).main)


def _ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(4, recipes.VOCAB, (rows, columns), generator=torch.Generator().manual_seed(3))


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", [*recipes.DECODERS, *recipes.ENCODERS])
def test_recipes_use_every_tensor_of_the_checkpoint(name: str, pair: Pair) -> None:
    _, reference = pair(name)
    model, asked = reference.model, parameters(reference.model)
    stored = {key: tuple(reference.weights.load(key).shape) for key in reference.weights.names}
    assert set(asked) | set(model.unused) == set(stored)
    for key, shape in asked.items():
        assert all(want in (-1, have) for want, have in zip(shape, stored[key], strict=True)), key


@pytest.mark.parametrize("name", recipes.DECODERS)
@torch.no_grad()
def test_prefill_and_decode_steps_match_transformers(name: str, pair: Pair) -> None:
    (model, reference), ids = pair(name), _ids(2, PROMPT + STEPS)
    theirs, ours = model(ids[:, :PROMPT], use_cache=True), forward(reference, ids[:, :PROMPT])
    gaps = [_gap(ours.logits, theirs.logits)]
    assert float(theirs.logits.abs().max()) > 0.5  # logits that say something
    for step in range(PROMPT, PROMPT + STEPS):
        theirs = model(ids[:, step : step + 1], past_key_values=theirs.past_key_values, use_cache=True)
        ours = forward(reference, ids[:, step : step + 1], past=ours.cache)
        gaps.append(_gap(ours.logits, theirs.logits))
    assert max(gaps) <= LIMIT, gaps


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", recipes.DECODERS)
@torch.no_grad()
def test_a_padded_batch_matches_transformers(name: str, side: str, pair: Pair) -> None:
    (model, reference), ids = pair(name), _ids(3, PROMPT)
    real = torch.ones_like(ids)
    for row, pads in enumerate((0, 2, 6)):
        real[row, slice(0, pads) if side == "left" else slice(PROMPT - pads, PROMPT)] = 0
    ids = ids * real
    positions = (real.cumsum(1) - 1).clamp(min=0)
    theirs = model(ids, attention_mask=real, position_ids=None if "opt" in name else positions).logits
    ours = forward(reference, ids, real=real).logits
    assert _gap(ours[real.bool()], theirs[real.bool()]) <= LIMIT
    alone = forward(reference, ids[2][real[2].bool()][None]).logits
    if "dynamic" not in name and "longrope_long" not in name:  # their frequencies depend on the longest row
        assert _gap(ours[2][real[2].bool()], alone[0]) <= LIMIT


@pytest.mark.parametrize("name", [name for name in recipes.DECODERS if name != "phi3_longrope_long"])
@torch.no_grad()
def test_greedy_tokens_of_a_left_padded_batch_match_transformers(name: str, pair: Pair) -> None:
    (model, reference), ids = pair(name), _ids(2, PROMPT)
    real = torch.ones_like(ids)
    real[1, :4] = 0
    ids = ids * real
    theirs = model.generate(ids, attention_mask=real, max_new_tokens=STEPS, do_sample=False, num_beams=1)
    assert torch.equal(greedy(reference, ids, STEPS, real=real).tokens, theirs[:, PROMPT:])


@torch.no_grad()
def test_greedy_tokens_across_the_longrope_switch_match_transformers(tmp_path: Path) -> None:
    folder = recipes.build("phi3_longrope_long", tmp_path / "m", original_max_position_embeddings=PROMPT + 3)
    model, ids = recipes.load("phi3_longrope_long", folder), _ids(1, PROMPT)
    theirs = model.generate(ids, max_new_tokens=STEPS, do_sample=False, num_beams=1)
    assert torch.equal(greedy(_reference(folder), ids, STEPS).tokens, theirs[:, PROMPT:])


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", recipes.ENCODERS)
@torch.no_grad()
def test_encoder_outputs_match_transformers(name: str, side: str, pair: Pair) -> None:
    (model, reference), ids = pair(name), _ids(3, PROMPT)
    real = torch.ones_like(ids)
    if side != "none":
        for row, pads in enumerate((0, 2, 6)):
            real[row, slice(0, pads) if side == "left" else slice(PROMPT - pads, PROMPT)] = 0
    ids = torch.where(real.bool(), ids, model.config.pad_token_id)
    typed = (
        reference.model.embedding.types != "" and reference.weights.load(reference.model.embedding.types).shape[0] > 1
    )
    types = torch.zeros_like(ids)
    types[:, PROMPT // 2 :] = 1
    theirs = model(ids, attention_mask=real, **({"token_type_ids": types} if typed else {}))
    ours = forward(reference, ids, real=real, types=types if typed else None)
    logits = theirs.logits if "logits" in theirs else theirs.last_hidden_state
    if logits.ndim == 3:
        assert _gap(ours.logits[real.bool()], logits[real.bool()]) <= LIMIT
    else:  # DeBERTa's padding sees nothing and ModernBERT's its neighbours: a first token that is padding says nothing
        read = (
            real[:, 0].bool() if "deberta" in name or "modernbert" in name else torch.ones(len(ids), dtype=torch.bool)
        )
        assert _gap(ours.logits[read], logits[read]) <= LIMIT
    if getattr(theirs, "pooler_output", None) is not None:
        assert _gap(ours.outputs["pooler_output"], theirs.pooler_output) <= LIMIT


def test_the_trained_example_matches_transformers() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("examples/base", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("examples/base")
    ids = tokenizer("def read(self, path):\n    return", return_tensors="pt").input_ids
    reference = _reference(Path("examples/base"))
    with torch.no_grad():
        assert _gap(forward(reference, ids).logits, model(ids).logits) <= LIMIT
        theirs = model.generate(ids, max_new_tokens=16, do_sample=False)
    ours = greedy(reference, ids, 16).tokens[0].tolist()
    wanted = theirs[0, ids.shape[1] :].tolist()
    assert ours[: len(wanted)] == wanted
