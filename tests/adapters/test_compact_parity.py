# SPDX-License-Identifier: Apache-2.0
"""Whatever PEFT writes goes into a compact folder and comes out again: the same updates, the same merge, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError
from tests.oracles.cases import CASES, RECIPES, Case, build
from tests.oracles.disk import read_tensors

_CODED = (
    "LoraConfig",
    "LNTuningConfig",
    "TrainableTokensConfig",
)  # other kinds are small as they are: nothing to gain from codes


def _covering() -> list[Case]:
    """Every architecture and every option of the catalogue at least once, of LoRA and what goes with it."""
    seen: set[str] = set()
    chosen = []
    for case in CASES.values():
        of_lora = all(adapter.kind in _CODED for adapter in RECIPES[case.name].adapters)
        if of_lora and not {case.arch, *case.tags} <= seen:
            seen |= {case.arch, *case.tags}
            chosen.append(case)
    return chosen


@pytest.mark.parametrize("case", _covering(), ids=lambda case: case.name)
def test_a_compact_adapter_merges_as_the_peft_adapter_it_decodes_to(case: Case, tmp_path: Path) -> None:
    built = build(case, tmp_path)
    source, weight = built.adapters[0]
    factors = ("int8", "int4")[len(case.name) % 2]
    result = surgery.convert(source, "compact", output=tmp_path / "compact", factors=factors)
    peft = surgery.convert(tmp_path / "compact", "peft", output=tmp_path / "peft", base=built.base)

    meant, compact, decoded = (read_adapter(path) for path in (source, tmp_path / "compact", tmp_path / "peft"))
    assert compact.updates.keys() == meant.updates.keys() == decoded.updates.keys()
    for site, chain in meant.updates.items():
        assert [update.kind for update in compact.updates[site]] == [update.kind for update in chain]
    assert result.max_approximation < (0.02 if factors == "int8" else 0.25)
    assert {entry.outcome for entry in peft.entries} <= {"exact", "folded"}

    one, other = ([(tmp_path / name, weight)] for name in ("compact", "peft"))
    surgery.merge(built.base, one, output=tmp_path / "a")
    surgery.merge(built.base, other, output=tmp_path / "b")
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", ["llama-ia3", "llama-loha", "llama-lokr", "llama-oft", "llama-vera"])
def test_kinds_without_factors_to_code_are_refused_by_name(name: str, tmp_path: Path) -> None:
    built = build(CASES[name], tmp_path)
    with pytest.raises(FitError, match=r"this format has no (IA3|LoHa|LoKr|OFT|VeRA)"):
        surgery.convert(built.adapters[0][0], "compact", output=tmp_path / "compact")
