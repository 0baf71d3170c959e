# SPDX-License-Identifier: Apache-2.0
"""Model cards, read by huggingface_hub's own classes."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["check_card"]


def check_card(card: Path) -> ModelCardData:
    """What a card's head says; huggingface_hub reads it, and would write it in the same bytes."""
    text = card.read_text()
    read = ModelCard.load(card)
    assert ModelCardData(**read.data.to_dict()).to_yaml() + "\n" == text.split("---\n")[1]
    assert str(read).strip() == text.strip()
    assert str(card.parent.parent) not in text
    assert "| measured |  |" in text
    assert "\n\n\n" not in text
    return read.data
