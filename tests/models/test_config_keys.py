# SPDX-License-Identifier: Apache-2.0
"""Every key of a configuration, one changed at a time: transformers' numbers, or a refusal. A different number is a fault."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.reference import encode, forward, open_reference
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.parameters import model_of
from tests.oracles import recipes
from tests.oracles.config_keys import Change, changes, compared

SAMPLE = 3
FOUND: list[tuple[str, Change]] = [
    ("t5", (("dense_act_fn",), "silu")),
    ("t5", (("dense_act_fn",), "mish")),
    ("deberta_v2_sequence", (("position_buckets",), 2)),
    ("deepseek_v2", (("rms_norm_eps",), 0.3)),
    ("deepseek_v3", (("rms_norm_eps",), 0.3)),
    ("deepseek_v3", (("head_dim",), 2)),
    ("deepseek_v3", (("rope_interleave",), None)),
    ("falcon_7b", (("multi_query",), None)),
    ("falcon_rw", (("parallel_attn",), None)),
    ("gemma3_images", (("text_config", "final_logit_softcapping"), 0.5)),
    ("gemma3_images", (("tie_word_embeddings",), False)),
    ("mistral3", (("text_config", "tie_word_embeddings"), True)),
    ("llava", (("text_config", "tie_word_embeddings"), True)),
]
"""Faults of before: changes that gave other numbers."""


def _by_type() -> list[str]:
    """A case of every ``model_type``."""
    types = {getattr(transformers, case.config).model_type: name for name, case in recipes.CASES.items()}
    return list(types.values())


def _check(name: str, change: Change) -> str:
    outcome, said = compared(name, change)
    assert outcome in ("equal", "refused", "unbuilt"), f"{name} {'.'.join(change[0])}={change[1]!r}: {outcome} {said}"
    return outcome


@pytest.mark.parametrize(("name", "change"), FOUND, ids=[f"{name}-{'.'.join(path)}" for name, (path, _) in FOUND])
def test_faults_of_before_stay_mended(name: str, change: Change) -> None:
    assert _check(name, change) != "unbuilt"


@pytest.mark.parametrize("name", _by_type())
def test_some_keys_of_every_type(name: str) -> None:
    assert compared(name, None)[0] == "equal"  # or every change might be one that transformers cannot build
    every = list(changes(name))
    for change in random.Random(name).sample(every, min(SAMPLE, len(every))):
        _check(name, change)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.CASES)
def test_every_key_of_every_case(name: str) -> None:
    outcomes = [_check(name, change) for change in changes(name)]
    assert outcomes.count("equal") > len(outcomes) // 8  # a comparison that transformers always refuses is none


def test_a_flag_of_null_is_refused_where_the_default_is_true() -> None:
    with pytest.raises(FitError, match="multi_query is null"):
        model_of({"model_type": "falcon", "multi_query": None}, {"lm_head.weight"})


@pytest.mark.parametrize("name", ["pegasus", "marian", "llama", "gpt2"])
@torch.no_grad()
def test_files_without_the_models_prefix_compute_the_same(tmp_path: Path, name: str) -> None:
    folder = recipes.build(name, tmp_path / "base")
    ids = torch.arange(5, 12)[None]
    weights: dict[str, Any] = load_file(folder / "model.safetensors")

    def logits() -> torch.Tensor:
        reference = open_reference(open_checkpoint(folder).main)
        encoded = encode(reference, ids) if reference.model.encoder else None
        return forward(reference, ids, encoded=encoded).logits

    before = logits()
    bare = {key.removeprefix("model.").removeprefix("transformer."): value for key, value in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(), before)


def test_longrope_of_an_encoder_is_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.1] * 4, "long_factor": [2.0] * 4}
    outcome, said = compared("eurobert_mask", (("rope_parameters",), rope))
    assert outcome == "refused"
    assert "longrope" in said


def _with_a_head_beside_the_embedding(folder: Path, off: float) -> Path:
    """Gemma, whose head is its embedding, with a head in its file that is `off` by so much in one number."""
    base = recipes.build("gemma", folder)
    weights: dict[str, Any] = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][-1, -1] += off
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def test_a_head_that_is_the_embedding_it_is_tied_to_is_exported(tmp_path: Path) -> None:
    base = _with_a_head_beside_the_embedding(tmp_path / "base", 0.0)
    surgery.export_onnx(base, output=tmp_path / "out")
    difference = surgery.verify(tmp_path / "out").difference
    assert difference is not None
    assert difference <= 1e-4


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    base = _with_a_head_beside_the_embedding(tmp_path / "base", 1.0)
    with pytest.raises(FitError, match=r"lm_head.weight.*differs from.*tie_word_embeddings"):
        surgery.export_onnx(base, output=tmp_path / "out")
