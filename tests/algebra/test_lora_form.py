# SPDX-License-Identifier: Apache-2.0
"""Every kind of adapter as LoRAs: exact where it is of low rank, the best of a rank elsewhere, never worse than PEFT's own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file
from torch import Tensor

from surgery import Rank, combine, convert, diff, merge
from surgery_formats.errors import FitError, ProofError
from surgery_formats.updates import LoHa
from tests.adapters import test_peft_kinds, test_peft_variants
from tests.oracles import disk, measure, models, peft_oracle
from tests.support.combinations import best

GLORA = {name: case for name, case in test_peft_variants.OTHERS.items() if name.startswith("glora")}
"""Of which PEFT's own LoRA has no merge: it has biases for all modules or for none."""
OTHERS = {name: case for name, case in test_peft_variants.OTHERS.items() if name not in GLORA}
KINDS = test_peft_kinds.KINDS | OTHERS
RANK = 3
NO_MATRIX = ("beft", "ln_tuning", "layer norms")
"""Kinds that change no matrix: there is nothing that a LoRA could hold."""


def trained(name: str, folder: Path) -> tuple[str, Path, Path]:
    """Architecture, base and adapter."""
    arch, kind, fields = (KINDS | GLORA | test_peft_variants.LORA)[name]
    base = models.build_base(arch, folder / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, folder / "trained", seed=4)
    return arch, base, folder / "trained"


def changes(arch: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's merge makes of the weights that it changes, minus what they were, in float64."""
    before = models.load(arch, base, "float64")
    before = {name: value.double() for name, value in before.state_dict().items()}
    if models.ARCHS[arch].config is not None:
        before = {name: value.double() for name, value in disk.read_tensors(base).items()}
    after = peft_oracle.merge(arch, base, [(adapter, 1.0)], "float64").tensors
    made = {name: after[name].double() - value for name, value in before.items() if name in after}
    return {name: change for name, change in made.items() if float(change.abs().max()) > 1e-9}


def flat(change: Tensor) -> Any:
    return change.reshape(change.shape[0], -1).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_becomes_the_best_lora_of_a_rank(name: str, tmp_path: Path) -> None:
    arch, base, adapter = trained(name, tmp_path)
    out = tmp_path / "lora"
    if name in NO_MATRIX:
        with pytest.raises(FitError, match="changes no matrix"):
            convert(adapter, "peft", output=out, as_lora=True, rank=RANK, base=base)
        return
    result = convert(adapter, "peft", output=out, as_lora=True, rank=RANK, base=base)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    wanted, got = changes(arch, base, adapter), changes(arch, base, out)
    assert got.keys() == wanted.keys()
    worst = 0.0
    for key, change in wanted.items():
        norm, left = float(change.norm()), float((got[key] - change).norm())
        limit = 0.0 if change.ndim == 1 else best(flat(change), RANK)
        assert left <= 1.0001 * limit + 3e-6 * norm, key
        worst = max(worst, left / norm)
    assert result.max_approximation == pytest.approx(worst, abs=3e-6)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NO_MATRIX])
def test_at_the_rank_it_has_nothing_is_lost(name: str, tmp_path: Path) -> None:
    arch, base, adapter = trained(name, tmp_path)
    result = convert(adapter, "peft", output=tmp_path / "lora", as_lora=True, rank=Rank.energy(1.0), base=base)
    assert result.max_approximation < 1e-6
    wanted, got = (peft_oracle.merge(arch, base, [(path, 1.0)], "float64") for path in (adapter, tmp_path / "lora"))
    assert got.tensors.keys() == wanted.tensors.keys()
    for key, value in wanted.tensors.items():
        assert measure.relative_error(got.tensors[key], value) < 1e-5, key
    torch.testing.assert_close(got.attached, wanted.attached, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["glora", "glora by vectors", "raw pissa", "raw olora", "kasa"])
def test_what_peft_cannot_merge_in_float64_does_the_same_attached(name: str, tmp_path: Path) -> None:
    arch, base, adapter = trained(name, tmp_path)
    rank = None if name in test_peft_variants.LORA else Rank.energy(1.0)
    result = convert(adapter, "peft", output=tmp_path / "lora", as_lora=True, rank=rank, base=base)
    assert {entry.outcome for entry in result.entries} == {"folded"} or rank is not None
    models_run = [
        models.run(arch, peft_oracle.attach(arch, base, [(path, 1.0)], "float32"))
        for path in (adapter, tmp_path / "lora")
    ]
    torch.testing.assert_close(models_run[1], models_run[0], rtol=1e-3, atol=1e-4)


def test_changes_of_biases_alone_are_refused(tmp_path: Path) -> None:
    _, base, adapter = trained("glora of biases", tmp_path)
    with pytest.raises(FitError, match="changes no matrix"):
        convert(adapter, "peft", output=tmp_path / "lora", as_lora=True, rank=RANK, base=base)


@pytest.mark.parametrize("name", [name for name, (arch, _, _) in KINDS.items() if arch == "llama"])
def test_peft_converts_none_better(name: str, tmp_path: Path) -> None:
    arch, base, adapter = trained(name, tmp_path)
    model = peft_oracle.attach(arch, base, [(adapter, 1.0)], "float32")
    if name in NO_MATRIX or not model.supports_lora_conversion("a0"):
        return  # of these PEFT makes no LoRA at all
    with peft_oracle.quiet():
        save_as_lora(tmp_path / "theirs", model, rank=RANK, adapter_name="a0")
    factors = load_file(tmp_path / "theirs/adapter_model.safetensors")
    rank = max(value.shape[0] for name, value in factors.items() if "lora_A" in name)  # of MiSS its own, not the asked
    convert(adapter, "peft", output=tmp_path / "ours", as_lora=True, rank=rank, base=base)
    wanted, ours, theirs = (changes(arch, base, path) for path in (adapter, tmp_path / "ours", tmp_path / "theirs"))
    for key, change in wanted.items():
        nothing = torch.zeros_like(change)  # PEFT's conversion of an embedding is of no effect
        lost, peer = (float((got.get(key, nothing) - change).norm()) for got in (ours, theirs))
        assert lost <= 1.0001 * peer + 1e-6 * float(change.norm()), key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base, and adapters for it."""
    folder = tmp_path_factory.mktemp("kinds")
    base = models.build_base("llama", folder / "base")
    fields: dict[str, tuple[str, dict[str, Any]]] = {
        "loha": ("LoHa", {"r": 3, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
        "oft": ("OFT", {"oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]}),
        "ia3": ("IA3", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        "lora": ("Lora", {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
        "dora": ("Lora", {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}),
        "head": ("LoHa", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        "norms": ("LNTuning", {"target_modules": ["input_layernorm"]}),
        "prompt": ("PromptTuning", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    }
    for seed, (name, (kind, config)) in enumerate(fields.items()):
        peft_oracle.train("llama", base, f"{kind}Config", config, folder / name, seed=seed)
    return base, {name: folder / name for name in fields}


def test_a_loha_needs_neither_base_nor_rank(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = made
    result = convert(adapters["loha"], "peft", output=tmp_path / "lora", as_lora=True)
    assert {(entry.outcome, entry.detail) for entry in result.entries} == {("folded", "LoHa as LoRA of rank 9")}
    wanted, got = (peft_oracle.merge("llama", base, [(path, 1.0)]) for path in (adapters["loha"], tmp_path / "lora"))
    torch.testing.assert_close(got.attached, wanted.attached, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["mlx", "compact"])
def test_formats_that_have_no_such_kind_hold_it_as_lora(
    made: tuple[Path, dict[str, Path]], tmp_path: Path, target: str
) -> None:
    base, adapters = made
    out = tmp_path / "lora"
    with pytest.raises(FitError):
        convert(adapters["oft"], target, output=out, base=base)
    result = convert(adapters["oft"], target, output=out, base=base, as_lora=True, rank=8)
    merge(base, adapters["oft"], output=tmp_path / "full")
    merge(base, out, output=tmp_path / "low")
    before, full, low = (disk.read_tensors(path) for path in (base, tmp_path / "full", tmp_path / "low"))
    changed = [name for name in before if not torch.equal(before[name], full[name])]
    assert len(changed) == 4
    for name in changed:
        norm = float((full[name] - before[name]).norm())
        assert 0.01 < float((full[name] - low[name]).norm()) / norm < result.max_approximation + 1e-4


def test_what_replaces_a_weight_is_kept(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = made
    convert(adapters["head"], "peft", output=tmp_path / "lora", as_lora=True)
    wanted, got = (peft_oracle.merge("llama", base, [(path, 1.0)]) for path in (adapters["head"], tmp_path / "lora"))
    torch.testing.assert_close(got.attached, wanted.attached, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_what_has_no_low_rank_is_asked_about_with_its_spectrum(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, adapters = made
    with pytest.raises(FitError, match=r"no low rank .* rank 4 \d+\.\d%, rank 8 .* the knee .* is at rank") as caught:
        convert(adapters["oft"], "peft", output=tmp_path / "lora", as_lora=True, base=base)
    assert "choose `rank=" in str(caught.value.hint)
    assert not (tmp_path / "lora").exists()


def test_a_dry_run_states_what_will_be_measured(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = made
    options: dict[str, Any] = {"as_lora": True, "rank": Rank.error(0.3), "base": base}
    dry = convert(adapters["ia3"], "peft", dry_run=True, **options)
    done = convert(adapters["ia3"], "peft", output=tmp_path / "lora", **options)
    assert [(e.site, e.outcome, e.detail, e.error) for e in dry.entries] == [
        (e.site, e.outcome, e.detail, e.error) for e in done.entries
    ]
    assert 0.2 < dry.max_approximation <= 0.3
    assert done.as_manifest()["as"] == "lora"


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("oft", {"as_lora": True, "rank": 4}, "what it adds depends on the base"),
        ("dora", {"as_lora": True, "rank": 4}, "what it adds depends on the base"),
        ("norms", {"as_lora": True}, "changes no matrix"),
        ("prompt", {"as_lora": True}, "virtual tokens"),
        ("loha", {"rank": 4}, "a rank is chosen for LoRAs"),
        ("loha", {"as_lora": True, "projections": "fused"}, "as they are named"),
        ("loha", {"as_lora": True, "rank": Rank.budget("2M")}, "is for extractions"),
    ],
)
def test_what_cannot_be_is_refused(
    made: tuple[Path, dict[str, Path]], tmp_path: Path, name: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(FitError, match=why):
        convert(made[1][name], "peft", output=tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_a_lora_that_does_something_else_is_not_proved(
    made: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(update: LoHa) -> Any:
        lora = honest(update)
        return lora and lora.scaled(1.001)

    honest = LoHa.expanded
    monkeypatch.setattr(LoHa, "expanded", wrong)
    with pytest.raises(ProofError, match="away from what LoHa does"):
        convert(made[1]["loha"], "peft", output=tmp_path / "lora", as_lora=True)
    assert not (tmp_path / "lora").exists()


def test_the_sum_of_a_loha_and_a_lora_is_exact(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = made
    result = combine([(adapters["lora"], 0.5), (adapters["loha"], -2.0)], output=tmp_path / "sum")
    assert {(module.outcome, module.ranks, module.rank) for module in result.modules} == {("exact", (2, 9), 11)}
    lora, loha, got = (changes("llama", base, path) for path in (adapters["lora"], adapters["loha"], tmp_path / "sum"))
    for key, change in got.items():
        wanted = 0.5 * lora[key] - 2.0 * loha[key]
        assert float((change - wanted).norm()) <= 1e-6 * float(wanted.norm()), key


def test_a_loha_is_compared_with_the_lora_that_it_became(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, adapters = made
    convert(adapters["loha"], "peft", output=tmp_path / "same", as_lora=True)
    lossy = convert(adapters["loha"], "peft", output=tmp_path / "near", as_lora=True, rank=5)
    assert diff(adapters["loha"], tmp_path / "same").equal
    apart = diff(adapters["loha"], tmp_path / "near")
    errors = {entry.site: entry.error for entry in lossy.entries}
    assert {module.name: module.difference for module in apart.modules} == pytest.approx(errors, rel=1e-4)
