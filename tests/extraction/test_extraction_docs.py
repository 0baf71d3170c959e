# SPDX-License-Identifier: Apache-2.0
"""The table of docs/extraction.md says what an extraction writes: every row is extracted, and its cells are compared with the files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.oracles import disk, models
from tests.support.extractions import Change, everything, only, tune

PAGE = Path(__file__).parents[2] / "docs" / "extraction.md"


def table() -> dict[str, tuple[str, str]]:
    """First cell -> the two others."""
    section = PAGE.read_text().partition("## What becomes of a tensor")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert [len(row) for row in rows] == [3] * len(rows)
    return {first: (second, third) for first, second, third in rows[2:]}


def two_rows(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if "embed_tokens" not in name:
        return value
    return torch.cat([value[:3], value[3:5] + 0.5 * torch.randn(2, value.shape[1], generator=generator), value[5:]])


def grow(tuned: Path) -> None:
    tensors = disk.read_tensors(tuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(3, models.HIDDEN)])
    disk.write_safetensors(tuned / "model.safetensors", tensors)
    (tuned / "tokenizer.json").write_text("{}")


def cut(tuned: Path) -> None:
    tensors = disk.read_tensors(tuned)
    head = {"lm_head.weight": 0.9 * tensors["model.embed_tokens.weight"]}
    disk.write_safetensors(tuned / "model.safetensors", {**tensors, **head})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def untouched(tuned: Path) -> None:
    pass


MATRIX = "a matrix, a convolution, GPT-2's Conv1D"
FULL = "embedding, head, with `--embeddings full`"
LOSSY = "norms with `--dense none --allow-loss`"
Case = tuple[str, str, str, Change, Callable[[Path], None], dict[str, Any]]
CASES: list[Case] = [
    (MATRIX, "llama", "_proj.weight", everything, untouched, {"rank": surgery.Rank.energy(0.9)}),
    (MATRIX, "resnet", "convolution.weight", everything, untouched, {"rank": surgery.Rank.energy(0.9)}),
    (MATRIX, "gpt2", ".c_", everything, untouched, {"rank": surgery.Rank.energy(0.9)}),
    ("experts stacked in one 3-D tensor", "mixtral", ".experts.", everything, untouched, {}),
    ("embedding, head", "llama", "embed_tokens", everything, untouched, {}),
    ("embedding, head", "llama", "lm_head", everything, untouched, {}),
    (FULL, "llama", "embed_tokens", everything, untouched, {"embeddings": "full"}),
    (FULL, "llama", "lm_head", everything, untouched, {"embeddings": "full"}),
    ("a few rows of an embedding", "llama", "embed_tokens", two_rows, untouched, {}),
    ("more rows than BASE (added tokens)", "llama", "", everything, grow, {}),
    ("a bias, also beside a LoRA", "qwen2", "q_proj.bias", everything, untouched, {}),
    ("a bias, also beside a LoRA", "qwen2", "q_proj", everything, untouched, {}),
    ("norms, other vectors", "llama", "layernorm", everything, untouched, {}),
    ("norms, other vectors", "resnet", "normalization", everything, untouched, {}),
    (LOSSY, "llama", "layers.0", everything, untouched, {"dense": ["none"], "allow_loss": True}),
    ("head tied to the embedding", "llama_tied", "embed_tokens", everything, untouched, {}),
    ("a tie that tuning cut", "qwen2", "embed_tokens", everything, cut, {}),
]


def test_every_row_of_the_table_is_extracted() -> None:
    assert {case[0] for case in CASES} == set(table())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2]}-{case[0][:20]}")
def test_the_table_says_what_is_written(case: Case, tmp_path: Path) -> None:
    change, arch, part, values, edit, options = case
    form, ledger = table()[change]
    base = models.build_base(arch, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only(part, values))
    edit(tuned)
    out = tmp_path / "out"
    result = surgery.extract_lora(base, tuned, output=out, **options)
    changed = {(row.kind, row.form) for row in result.rows if row.kind not in ("unchanged", "alias", "derivable")}
    kind, _, stored = ledger.partition(", ")
    assert (kind, stored) in changed
    config = json.loads((out / "adapter_config.json").read_text())
    for word in re.findall(r"`([^`]+)`", form):
        key, colon, value = word.partition(": ")
        assert (config[key] == json.loads(value)) if colon else config[key], word
    assert (out / "tokenizer.json").exists() == ("tokenizer files" in form)
