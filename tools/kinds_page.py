# SPDX-License-Identifier: Apache-2.0
"""Write docs/kinds.md: `python tools/kinds_page.py` merges every generated combination and sweeps all model types (minutes)."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

from tests.support.attached import Outcome, outcome, quiet
from tests.support.peft_kinds import COMBINATIONS, KINDS, Combination, Kind, made
from tests.support.type_sweep import REFUSED, Sweep, fused, sweep

PAGE = ROOT / "docs" / "kinds.md"
HEAD = """# Kinds and model types

Made by `python tools/kinds_page.py`, which makes every adapter with the installed PEFT for a tiny random model of the
installed transformers, merges it here, and compares. No trained number is left at zero or where PEFT began. "Logits" is
the greatest difference between what the merged model gives and what the model with the adapter attached gives, as a share
of what the adapter changes; "weights" the greatest difference from PEFT's own merge, as a share of the greatest number of
that weight. `pytest tests/adapters/test_kinds_by_type.py` tries a fixed part, with `-m slow` all.
"""


def ran(folder: Path) -> list[Outcome]:
    """Every combination, merged."""
    found = []
    for number, one in enumerate(COMBINATIONS):
        print(f"{number + 1} of {len(COMBINATIONS)}: {one}", flush=True)
        found.append(outcome(made(one, folder / str(number))))
        shutil.rmtree(folder / str(number))
    return found


def worst(outcomes: Iterable[Outcome]) -> tuple[str, str]:
    """Greatest differences, of logits and of weights."""
    found = [one for each in outcomes for one in each.found.values()]
    if not found:
        return "refused", "refused"
    return f"{max(one.logits for one in found):.0e}", f"{max(one.weights for one in found):.0e}"


def row(kind: Kind, outcomes: Sequence[tuple[Combination, Outcome]]) -> str:
    """One line of the table."""
    layers = ", ".join(dict.fromkeys(one.layer for one, _ in outcomes))
    types = len({one.model_type for one, _ in outcomes})
    refused = len([one for one, each in outcomes if each.refused])
    cells = [
        kind.name,
        layers,
        str(len(outcomes)),
        str(types),
        str(refused or ""),
        *worst(each for _, each in outcomes),
    ]
    return f"| {' | '.join(cells)} |"


def page(combined: Sequence[tuple[Combination, Outcome]], swept: Sweep) -> str:
    """The document."""
    wrong = {str(one): each.wrong for one, each in combined} | {name: one.wrong for name, one in swept.outcomes.items()}
    refused = {name for name, each in swept.outcomes.items() if each.refused}
    assert not any(wrong.values()), {name: found for name, found in wrong.items() if found}
    assert refused == set(REFUSED), refused ^ set(REFUSED)
    right = [one for one, each in combined if not each.refused]
    second = [name for name, each in swept.outcomes.items() if "code" in each.found]
    stacked = sorted(set(fused()) & {*swept.outcomes, *swept.unmade})
    lines = [
        HEAD,
        f"peft {version('peft')}, transformers {version('transformers')}, torch {version('torch')}, float32.\n",
        "## Kinds by layer and model type\n",
        f"{len(combined)} combinations, {len(right)} of them right and {len(combined) - len(right)} refused, "
        f"{len({one.kind.name for one in right})} kinds, {len({one.model_type for one in right})} model types.\n",
        "| kind | layers | combinations | model types | refused | logits | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(kind, [pair for pair in combined if pair[0].kind.name == kind.name]) for kind in KINDS),
        "",
        "Refused:\n",
        *dict.fromkeys(f"- {reason(one)}" for one, each in combined if each.refused),
        "",
        "## Model types\n",
        "A LoRA of rank 2 on every linear module but `lm_head` and on every stack of experts, for each model type that has a "
        "class for text, images, speech, sound or video. The base is as `save_pretrained` writes it, which is the hub's "
        "layout, and, where the names of the model's code are others, as `save_original_format=False` writes it.\n",
        f"{len(swept.right)} types merge right, {len(second)} of them in two layouts; {len(REFUSED)} are refused; of "
        f"{len(swept.unmade)} there is no model so small, or it does not run on made-up input. Of {len(stacked)} types here "
        f"whose experts transformers stacks, {len(set(stacked) & set(swept.right))} are right and "
        f"{len(set(stacked) & set(swept.unmade))} not made.\n",
        f"Logits within {worst(swept.outcomes.values())[0]}, weights within {worst(swept.outcomes.values())[1]}.\n",
        f"Right: {', '.join(f'`{name}`' for name in swept.right)}.\n",
        "Refused:\n",
        *(f"- `{name}`: {why}" for name, why in REFUSED.items()),
        "",
        f"Not made: {', '.join(f'`{name}`' for name in sorted(swept.unmade))}.",
    ]
    return "\n".join(lines) + "\n"


def reason(one: Combination) -> str:
    """Why a combination is refused."""
    if one.kind.refused:
        return f"{one.kind.name}: {WHY[one.kind.name]}"
    return f"an adapter on the embedding of `{one.model_type}`: {WHY[one.model_type]}"


WHY = {
    "Lily": "a router mixes it anew for every input, so that no weight has its effect; PEFT does not merge it either",
    "PSOFT": "it turns singular vectors of the base, whose signs are those of the library that computed them",
    "t5": "transformers scales the last hidden state only while the head is tied to the embedding, so that they cannot be parted",
}


def main() -> None:
    """Run all, and write the page."""
    with quiet(), tempfile.TemporaryDirectory(prefix="surgery-kinds-") as folder:
        combined = list(zip(COMBINATIONS, ran(Path(folder)), strict=True))
        PAGE.write_text(
            page(combined, sweep(Path(folder) / "types", lambda name: print(name, flush=True))), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
