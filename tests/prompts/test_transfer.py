# SPDX-License-Identifier: Apache-2.0
"""A transferred prompt has a score that is right for what it is worth: all of it between models that are one, nothing between strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.prompts import transfer
from surgery.prompts.transfer import shared_tokens
from surgery.prompts.vocabulary import Vocabulary
from surgery_formats.errors import FitError
from tests.oracles import peft_oracle, recipes
from tests.support.kit import ROOT
from tests.support.prompts import write_prompt

PROMPT, BASE, TUNED = (ROOT / "examples" / name for name in ("prompt", "base", "tuned"))
IDS = torch.tensor([[3, 7, 11, 2, 30, 9]])
TEXTS = [[5, 17, 40, 8, 33, 2, 9], [61, 2, 2, 9, 14]]


def turned(folder: Path, into: Path) -> Any:
    """The Llama of `folder`, its norms without gains, and the same in a turned hidden space; returns the rotation."""
    tensors = {
        name: torch.ones_like(tensor) if "norm" in name else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    width = tensors["model.embed_tokens.weight"].shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
        0
    ]
    into.mkdir()
    (into / "config.json").write_text((folder / "config.json").read_text())
    other = {}
    for name, tensor in tensors.items():
        out = name.endswith(("o_proj.weight", "down_proj.weight"))
        new = tensor.double()
        if "norm" not in name:
            new = turn.T @ new if out else new @ turn
        other[name] = new.float().contiguous()
    save_file(other, into / "model.safetensors", {"format": "pt"})
    return turn


def logits(base: Path, prompt: Path) -> Any:
    with peft_oracle.quiet(), torch.no_grad():
        return peft.PeftModel.from_pretrained(recipes.load("llama", base), prompt).eval()(input_ids=IDS).logits[:, -6:]


@pytest.mark.parametrize("method", ["auto", "ridge", "orthogonal"])
def test_between_models_that_are_one_all_of_it_arrives(method: str, tmp_path: Path) -> None:
    recipes.build("llama", tmp_path / "old")
    turn = turned(tmp_path / "old", tmp_path / "new")
    with torch.no_grad():
        one, other = (recipes.load("llama", tmp_path / name)(IDS).logits for name in ("old", "new"))
    assert (one - other).abs().max() < 1e-4
    rows = np.random.default_rng(0).standard_normal((4, len(turn))).astype(np.float32) * 0.1
    prompt = write_prompt(tmp_path / "prompt", rows)
    result = surgery.prompt_transfer(
        prompt, tmp_path / "old", onto=tmp_path / "new", method=method, texts=TEXTS, output=tmp_path / "out"
    )
    score = result.score
    assert score.explained > 0.9999
    assert score.found == 1.0
    assert score.losses["new with"] == pytest.approx(score.losses["old with"], abs=1e-4)
    assert score.fitted + 2 * score.held_out >= 97
    limit = 1e-4 if method != "ridge" else 1e-3
    assert (logits(tmp_path / "old", prompt) - logits(tmp_path / "new", tmp_path / "out")).abs().max() < limit


def test_between_strangers_the_score_says_so_and_nothing_is_written(tmp_path: Path) -> None:
    recipes.build("llama", tmp_path / "old")
    recipes.build("llama", tmp_path / "new")
    file = tmp_path / "new" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = torch.randn(
        tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(9)
    )
    save_file(tensors, file, {"format": "pt"})
    width = tensors["model.embed_tokens.weight"].shape[1]
    prompt = write_prompt(tmp_path / "prompt", np.ones((2, width), np.float32))
    with pytest.raises(FitError, match="is worth nothing"):
        surgery.prompt_transfer(prompt, tmp_path / "old", onto=tmp_path / "new", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = surgery.prompt_transfer(
        prompt, tmp_path / "old", onto=tmp_path / "new", output=tmp_path / "out", accept_loss=True, texts=TEXTS
    )
    assert result.score.explained < 0.05
    assert any("expect little" in text for text in result.warnings)


def test_the_score_is_that_of_plain_numpy(tmp_path: Path) -> None:
    """The share explained of every tenth token, by the ridge that is fitted to eight of ten."""
    old, new = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
        for folder in (BASE, TUNED)
    )
    result = surgery.prompt_transfer(PROMPT, BASE, onto=TUNED, method="orthogonal", dry_run=True)
    fit, test = (np.array([n for n in range(len(old)) if n % 10 in part]) for part in (range(8), (9,)))
    left, values, right = np.linalg.svd(old[fit].T @ new[fit])
    matrix = left @ right * values.sum() / np.square(old[fit]).sum()
    rest = np.square(new[test] - old[test] @ matrix).sum() / np.square(new[test] - new[test].mean(0)).sum()
    assert result.score.explained == pytest.approx(1 - rest, rel=1e-6)
    assert (result.score.fitted, result.score.held_out) == (len(fit), len(test))
    assert result.score.near == 0
    assert any("where no token is" in text for text in result.warnings)
    assert any("only texts tell" in text for text in result.warnings)


def test_rows_are_in_memory_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,536 tokens of 4,096 numbers would be 4 GB in float64."""
    whole = surgery.prompt_transfer(PROMPT, BASE, onto=TUNED, method="ridge", dry_run=True)
    read, chosen = [], Vocabulary.chosen
    monkeypatch.setattr(transfer, "_NUMBERS", 256 * 50)
    monkeypatch.setattr(Vocabulary, "chosen", lambda self, ids: read.append(len(ids)) or chosen(self, ids))
    parts = surgery.prompt_transfer(PROMPT, BASE, onto=TUNED, method="ridge", dry_run=True)
    assert parts.score.explained == pytest.approx(whole.score.explained, rel=1e-9)
    assert parts.score.found == whole.score.found
    assert read.count(50) > 2 * 1230 // 50


def test_tokens_are_shared_by_how_they_are_spelt() -> None:
    assert shared_tokens({0: "a", 1: "b", 2: "c"}, {0: "c", 1: "a", 9: "b"}, (3, 3)) == [(0, 1), (2, 0)]
    assert shared_tokens({}, {}, (2, 2)) == [(0, 0), (1, 1)]
    assert shared_tokens({}, {}, (2, 3)) == shared_tokens({0: "a"}, {}, (2, 2)) == []


def test_what_cannot_be_transferred_is_refused(tmp_path: Path) -> None:
    prefix = write_prompt(tmp_path / "prefix", np.ones((3, 12 * 64), np.float32), prefix=(6, 2, 32))
    with pytest.raises(FitError, match="mean nothing to another model"):
        surgery.prompt_transfer(prefix, BASE, onto=TUNED, dry_run=True)
    recipes.build("llama", tmp_path / "other")
    with pytest.raises(FitError, match="have 0 tokens in common"):
        surgery.prompt_transfer(PROMPT, BASE, onto=tmp_path / "other", dry_run=True)
    with pytest.raises(FitError, match="no method 'guess'"):
        surgery.prompt_transfer(PROMPT, BASE, onto=TUNED, method="guess", dry_run=True)
