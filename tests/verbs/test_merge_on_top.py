# SPDX-License-Identifier: Apache-2.0
"""An adapter merged into a merge."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import surgery

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_merge_into_the_recorded_base_is_told_from_another_base(tmp_path: Path) -> None:
    """A LoRA adds the same to it, a DoRA does not; a model that only has the name of one stays another base."""
    lora, dora, merged, out = EXAMPLES / "lora", EXAMPLES / "dora", tmp_path / "merged", tmp_path / "out"
    surgery.merge(EXAMPLES / "base", (dora, 0.5), output=merged, dtype="fp32")
    said = "was trained on 'examples/base', and 'merged' is a merge into it by its card: "
    result = surgery.merge(merged, lora, output=out)
    assert result.warnings == ()
    assert result.ledger.as_json()["notes"] == [
        f"lora: {said}the sum is that of one merge of all of them, in this order"
    ]
    assert f"note: lora: {said}" in str(result)
    surgery.merge(EXAMPLES / "base", [(dora, 0.5), lora], output=tmp_path / "both", dtype="fp32")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "both"))
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    (warning,) = surgery.merge(merged, dora, dry_run=True).warnings
    assert warning.startswith(f"dora: {said}its change depends on the weights")
    (merged / "README.md").unlink()
    (warning,) = surgery.merge(merged, lora, dry_run=True).warnings
    assert warning == "lora: was trained on 'examples/base', the base given is 'merged'"
