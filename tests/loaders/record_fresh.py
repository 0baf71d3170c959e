# SPDX-License-Identifier: Apache-2.0
"""Gives fresh adapters to AdapterHub's library and to mlx-lm, and prints how far the base is then from the base alone (docs/insert.md).

``python -m tests.loaders.record_fresh`` runs the programs whose environments are named (``SURGERY_LOADER_ADAPTERS``,
``SURGERY_LOADER_MLX_LM``), and ends with exit code 1 where one refuses an adapter, or where logits move by more than 1e-6 of the
greatest. PEFT is asked by tests/insertion/test_fresh_in_peft.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import surgery
from tests.loaders.acting import program_of, start
from tests.loaders.judging import command_of
from tests.support.tiny_models import tiny

__all__ = ["FRESH", "moved"]

_PLACES = "q_proj,v_proj,up_proj"
FRESH: dict[str, list[tuple[str, str, str]]] = {
    "adapters": [
        *[(kind, "bottleneck", "") for kind in ("bert", "roberta", "gpt2", "llama", "mistral")],
        ("llama", "lora", _PLACES),
        ("llama", "dora", _PLACES),
        ("llama", "ia3", "k_proj,v_proj"),
        ("bert", "ia3", "key,value"),
    ],
    "mlx-lm": [("llama", "lora", "all"), ("llama", "dora", "all"), ("mistral", "rslora", "attention")],
}
"""By program: model types, kinds and targets."""
_FORMATS = {"adapters": "adapterhub", "mlx-lm": "mlx"}
_MOST = 1e-6


def _base(model_type: str, folder: Path) -> Path:
    """With a vocabulary for the ids that every loader is given."""
    if not folder.exists():
        model = tiny(model_type)
        model.config.vocab_size = 160
        type(model)(model.config).save_pretrained(folder)
    return folder


def moved(program: str, work: Path) -> dict[str, float]:
    """By model type and kind: the greatest change of a logit, of the greatest logit.

    Raises:
        RuntimeError: the program does not run, or refuses an adapter.
    """
    jobs: dict[str, tuple[Path, Path]] = {}
    words: list[str] = []
    for number, (model_type, kind, targets) in enumerate(FRESH[program]):
        base, new = _base(model_type, work / model_type), work / str(number)
        surgery.insert(base, new=kind, rank=4, targets=targets or None, format=_FORMATS[program], output=new)
        before, after = work / f"{number}-base", work / f"{number}-with"
        words += [str(base), "-", str(before), str(base), str(new), str(after)]
        jobs[f"{kind} on {model_type}"] = before, after
    start([*program_of(program), *words])
    found = {}
    for name, (before, after) in jobs.items():
        said = json.loads(after.with_suffix(".json").read_text())
        if "refused" in said:
            raise RuntimeError(f"{program} refuses {name}: {said['refused']}")
        plain, logits = (np.load(out.with_suffix(".npz"))["logits"].astype(float) for out in (before, after))
        found[name] = float(np.abs(logits - plain).max() / np.abs(plain).max())
    return found


def main() -> int:
    worst = 0.0
    for program in FRESH:
        if command_of(program) is None:
            continue
        with tempfile.TemporaryDirectory() as work:
            for name, share in moved(program, Path(work)).items():
                worst = max(worst, share)
                print(f"| {program} | {name} | {share:.1e} |", flush=True)
    return int(worst > _MOST)


if __name__ == "__main__":
    sys.exit(main())
