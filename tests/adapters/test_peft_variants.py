# SPDX-License-Identifier: Apache-2.0
"""Variants and rarer kinds of PEFT, every trained number random: merged here as PEFT merges and computes them, and written again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import surgery
from surgery_formats import open_checkpoint
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import NOT_READ
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError
from surgery_formats.testing.format import save
from surgery_formats.testing.memory import in_memory
from tests.oracles import disk, measure, models, peft_oracle

Q_UP = {"target_modules": ["q_proj", "up_proj"]}
LORA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "raw pissa": ("llama", "Lora", {**Q_UP, "r": 3, "init_lora_weights": "pissa", "lora_alpha": 5}),
    "raw pissa with ranks": (
        "llama",
        "Lora",
        {**Q_UP, "r": 3, "init_lora_weights": "pissa", "rank_pattern": {"up_proj": 5}, "use_rslora": True},
    ),
    "raw pissa on conv1d": ("gpt2", "Lora", {"target_modules": ["c_attn"], "r": 4, "init_lora_weights": "pissa"}),
    "raw olora": ("llama", "Lora", {**Q_UP, "r": 3, "init_lora_weights": "olora", "lora_alpha": 7}),
    "kasa": ("llama", "Lora", {**Q_UP, "r": 3, "kasa_config": peft.KasaConfig(), "lora_alpha": 5}),
    "mica": ("llama", "Lora", {**Q_UP, "r": 3, "init_lora_weights": "mica"}),
    "mica on embedding": ("llama", "Lora", {"target_modules": ["embed_tokens"], "r": 3, "init_lora_weights": "mica"}),
    "orthogonal": ("llama", "Lora", {**Q_UP, "r": 4, "init_lora_weights": "orthogonal"}),
    "gaussian": ("gpt2", "Lora", {"target_modules": ["c_attn"], "r": 4, "init_lora_weights": "gaussian"}),
    "eva": ("llama", "Lora", {**Q_UP, "r": 4, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}),
    "velora": ("llama", "Lora", {**Q_UP, "r": 4, "velora_config": {"num_groups": 4, "scale": 1.0}}),
    "monteclora": ("llama", "Lora", {**Q_UP, "r": 4, "monteclora_config": peft.MontecloraConfig(num_samples=2)}),
    "block-diagonal": (
        "llama",
        "Lora",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
            "r": 4,
            "use_bdlora": peft.BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2
            ),
        },
    ),
    "block-diagonal in part": (
        "llama",
        "Lora",
        {
            "target_modules": ["q_proj", "v_proj"],
            "r": 4,
            "use_bdlora": peft.BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=4, match_strict=False),
        },
    ),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deft": ("llama", "Deft", {**Q_UP, "r": 3}),
    "deft by qr": ("gpt2", "Deft", {"target_modules": ["c_attn"], "r": 3, "decomposition_method": "qr", "alpha": 5}),
    "para": ("llama", "Deft", {**Q_UP, "r": 3, "decomposition_method": "qr", "para": True}),
    "osf": ("llama", "OSF", {**Q_UP, "effective_rank": 20}),
    "osf in parts": ("llama", "OSF", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 0.25}}),
    "glora": ("qwen2", "Glora", {**Q_UP, "r": 3}),
    "glora by vectors": (
        "qwen2",
        "Glora",
        {**Q_UP, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    ),
    "glora by numbers": ("qwen2", "Glora", {**Q_UP, "config_A_B": "constant", "config_C": "none"}),
    "glora of biases": ("qwen2", "Glora", {"target_modules": ["q_proj"], "config_A_B": "none", "r": 3}),
    "peanut": ("llama", "Peanut", {**Q_UP, "r": 3, "scaling": 0.7}),
    "peanut, deep": ("llama", "Peanut", {**Q_UP, "r": 3, "depth": 2, "act_fn": "gelu"}),
    "unilora": ("llama", "UniLora", {**Q_UP, "r": 3, "theta_d_length": 50, "save_indices": True}),
    "unilora on conv1d": (
        "gpt2",
        "UniLora",
        {"target_modules": ["c_attn"], "r": 3, "theta_d_length": 50, "save_indices": True},
    ),
    "waveft": ("llama", "WaveFT", {**Q_UP, "n_frequency": 60}),
    "waveft by db3": ("llama", "WaveFT", {**Q_UP, "n_frequency": 60, "wavelet_family": "db3", "random_loc_seed": 3}),
    "waveft by coif1": ("gpt2", "WaveFT", {"target_modules": ["c_attn"], "n_frequency": 60, "wavelet_family": "coif1"}),
    "waveft by sym10": (
        "llama",
        "WaveFT",
        {**Q_UP, "n_frequency": 60, "wavelet_family": "sym10", "n_frequency_pattern": {"up_proj": 90}},
    ),
    "waveft of elements": ("llama", "WaveFT", {**Q_UP, "n_frequency": 60, "use_idwt": False, "scaling": 3.0}),
    "waveft in proportion": ("llama", "WaveFT", {**Q_UP, "n_frequency": 60, "proportional_parameters": True}),
    "supertuning": ("llama", "Supertuning", {**Q_UP, "sparsity": 0.9}),
    "supertuning with a lora": ("llama", "Supertuning", {**Q_UP, "r": 3, "lora_alpha": 5, "select_top": False}),
    "tinylora": ("llama", "TinyLora", {**Q_UP, "r": 3, "u": 6, "weight_tying": 1.0}),
    "tinylora on embedding": (
        "llama",
        "TinyLora",
        {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "u": 6, "weight_tying": 1.0},
    ),
    "tinylora on conv1d": ("gpt2", "TinyLora", {"target_modules": ["c_attn"], "r": 2, "u": 6, "weight_tying": 1.0}),
    "frod": ("llama", "Frod", {**Q_UP, "sparse_rate": 0.02}),
    "frod on conv1d": ("gpt2", "Frod", {"target_modules": ["c_attn", "c_proj"]}),
}
KINDS = LORA | OTHERS


def _trained(name: str, tmp_path: Path) -> tuple[str, Path, Path]:
    arch, kind, fields = KINDS[name]
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, tmp_path / "trained", seed=4)
    return arch, base, tmp_path / "trained"


def _assert_same(actual: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == merged.keys()
    for key, value in merged.items():
        assert measure.relative_error(actual[key], value) < 2e-5, key


@pytest.mark.parametrize("name", KINDS)
def test_a_merge_is_pefts(name: str, tmp_path: Path) -> None:
    arch, base, trained = _trained(name, tmp_path)
    surgery.inspect(trained).summary()
    assert "do not fit" not in str(surgery.report(trained, base=base).summary())
    surgery.merge(base, trained, output=tmp_path / "merged")
    before, merged = disk.read_tensors(base), peft_oracle.merge(arch, base, [(trained, 1.0)], "float32")
    actual = disk.read_tensors(tmp_path / "merged")
    assert any(not torch.equal(before[key], value) for key, value in actual.items())
    _assert_same(actual, merged.tensors)
    logits = models.run(arch, models.load(arch, tmp_path / "merged", "float32"))
    torch.testing.assert_close(logits, merged.attached, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("source", ["its folder", "memory", "memory, with terms"])
@pytest.mark.parametrize("name", KINDS)
def test_peft_merges_what_was_written(name: str, source: str, tmp_path: Path) -> None:
    arch, base, trained = _trained(name, tmp_path)
    adapter = read_adapter(trained)
    if source != "its folder":
        adapter = in_memory(adapter, keep_terms=source.endswith("terms"))
    rendering = PEFT.render(adapter, open_checkpoint(base))
    assert not [entry for entry in rendering.entries if entry.outcome == "dropped"]
    written = save(rendering, PEFT, tmp_path)
    expected, merged = (peft_oracle.merge(arch, base, [(path, 1.0)], "float32") for path in (trained, written))
    _assert_same(merged.tensors, expected.tensors)
    torch.testing.assert_close(merged.attached, expected.attached, rtol=1e-3, atol=1e-4)


def test_tensors_of_training_alone_are_accounted_for(tmp_path: Path) -> None:
    for name, part in (("velora", "lora_velora_embed"), ("monteclora", "lora_monteclora_sampler")):
        _, _, trained = _trained(name, tmp_path / name)
        ignored = read_adapter(trained).ignored
        assert ignored
        assert all(part in entry.tensor.name for entry in ignored)


def test_blocks_of_a_diagonal_are_written_whole(tmp_path: Path) -> None:
    _, _, trained = _trained("block-diagonal", tmp_path)
    rendering = PEFT.render(read_adapter(trained), None)
    assert {entry.outcome for entry in rendering.entries} == {"folded"}
    assert json.loads(rendering.small_files["adapter_config.json"])["use_bdlora"] is None


@pytest.mark.parametrize("name", ["raw pissa", "raw olora", "kasa"])
def test_a_lora_on_a_changed_base_asks_for_the_very_base(name: str, tmp_path: Path) -> None:
    _, _, trained = _trained(name, tmp_path)
    assert any("very weights" in issue for issue in read_adapter(trained).known_issues())


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_a_changed_base_is_refused_where_peft_has_none(fields: dict[str, Any], tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    peft_oracle.train("llama", base, "LoraConfig", {**Q_UP, "r": 3, **fields}, tmp_path / "trained", seed=4)
    config, tensors = disk.adapter(tmp_path / "trained")
    disk.write_adapter(tmp_path / "raw", {**config, "init_lora_weights": "pissa"}, tensors)
    with pytest.raises(FitError, match="on a changed base is read for linear layers"):
        read_adapter(tmp_path / "raw")


@pytest.mark.parametrize("tying", [0.0, 0.5])
def test_a_tinyloras_random_tensors_tell_which_vector_a_module_has(tying: float, tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    fields = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 3, "u": 6, "weight_tying": tying}
    peft_oracle.train("llama", base, "TinyLoraConfig", fields, tmp_path / "trained", seed=4)
    adapter = read_adapter(tmp_path / "trained")
    vectors = {next(iter(chain)).tensors[0] for chain in adapter.updates.values()}
    assert len(vectors) == len(adapter.updates) * (1 - tying)
    merged = peft_oracle.merge("llama", base, [(tmp_path / "trained", 1.0)], "float32")
    surgery.merge(base, tmp_path / "trained", output=tmp_path / "merged")
    _assert_same(disk.read_tensors(tmp_path / "merged"), merged.tensors)
    own = save(PEFT.render(adapter, None), PEFT, tmp_path)
    _assert_same(peft_oracle.merge("llama", base, [(own, 1.0)], "float32").tensors, merged.tensors)
    dropped = [entry for entry in PEFT.render(in_memory(adapter), None).entries if entry.outcome == "dropped"]
    assert dropped
    assert "PEFT numbers several by the order of the model" in dropped[0].detail


LACKING: dict[str, tuple[str, dict[str, Any], str]] = {
    "unilora": ("UniLora", {"r": 3}, "'save_indices' is off.*save it again"),
    "tinylora": ("TinyLora", {"save_projection": False}, "save_projection is off"),
    "frod": ("Frod", {"save_projection": False}, "save_projection is off"),
    "supertuning": (
        "Supertuning",
        {"sparsity": 0.9, "save_precomputed_indices": False},
        "save_precomputed_indices is off",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_not_in_the_file_is_refused_by_its_switch(name: str, tmp_path: Path) -> None:
    kind, fields, message = LACKING[name]
    base = models.build_base("llama", tmp_path / "base")
    peft_oracle.train("llama", base, f"{kind}Config", {**Q_UP, **fields}, tmp_path / "trained", seed=4)
    with pytest.raises(FitError, match=message):
        read_adapter(tmp_path / "trained")


UNMERGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Lily": ("Lily", {"r": 3, "stride_A": 1, "num_B": 2}, "a router mixes"),
    "PSOFT": ("Psoft", {"r": 3}, "signs"),
}


@pytest.mark.parametrize("name", UNMERGED)
def test_a_kind_without_a_merge_is_shown_copied_and_refused(name: str, tmp_path: Path) -> None:
    kind, fields, message = UNMERGED[name]
    base = models.build_base("llama", tmp_path / "base")
    peft_oracle.train("llama", base, f"{kind}Config", {**Q_UP, **fields}, tmp_path / "trained", seed=4)
    adapter = read_adapter(tmp_path / "trained")
    assert not adapter.unconsumed()
    assert {update.kind for chain in adapter.updates.values() for update in chain} == {name}
    assert {update.rank for chain in adapter.updates.values() for update in chain} == {3}
    surgery.inspect(tmp_path / "trained").summary()
    assert "do not fit" not in str(surgery.report(tmp_path / "trained", base=base).summary())
    with pytest.raises(FitError, match=message):
        surgery.merge(base, tmp_path / "trained", output=tmp_path / "merged")
    written = save(PEFT.render(adapter, None), PEFT, tmp_path)
    assert disk.adapter(written)[0] == disk.adapter(tmp_path / "trained")[0]
    assert disk.adapter(written)[1].keys() == disk.adapter(tmp_path / "trained")[1].keys()


def test_an_adamss_is_shown_copied_and_refused(tmp_path: Path) -> None:
    """As PEFT writes it where scikit-learn is: rows are parted among the subspaces, their sum is the weight's."""
    base = models.build_base("llama", tmp_path / "base")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.adamss_"
    tensors = {f"{stem}A.{i}": torch.ones(2, 8) for i in range(2)}
    tensors |= {f"{stem}B.0": torch.ones(20, 2), f"{stem}B.1": torch.ones(12, 2), f"{stem}newB": torch.ones(8, 33)}
    fields = {"peft_type": "ADAMSS", "r": 8, "num_subspaces": 2, "subspace_rank": 2, "target_modules": ["q_proj"]}
    trained = disk.write_adapter(tmp_path / "trained", fields, tensors)
    adapter = read_adapter(trained)
    assert not adapter.unconsumed()
    assert {update.rank for chain in adapter.updates.values() for update in chain} == {8}
    with pytest.raises(FitError, match=r"groups them again by k-means.*merge it with PEFT"):
        surgery.merge(base, trained, output=tmp_path / "merged")
    written = save(PEFT.render(adapter, None), PEFT, tmp_path)
    assert disk.adapter(written)[1].keys() == tensors.keys()


def test_gloras_of_biases_combine_to_biases(tmp_path: Path) -> None:
    """Which BEFT's files hold, and GLoRA's not."""
    arch, kind, fields = KINDS["glora of biases"]
    base = models.build_base(arch, tmp_path / "base")
    for seed in range(2):
        peft_oracle.train(arch, base, f"{kind}Config", fields, tmp_path / f"a{seed}", seed=seed)
    chain = [(tmp_path / "a0", 1.0), (tmp_path / "a1", 1.0)]
    surgery.merge(base, chain, output=tmp_path / "merged")
    surgery.combine(chain, output=tmp_path / "one", base=base, rank=models.HIDDEN)
    assert disk.adapter(tmp_path / "one")[0]["peft_type"] == "BEFT"
    surgery.merge(base, tmp_path / "one", output=tmp_path / "again")
    _assert_same(disk.read_tensors(tmp_path / "again"), disk.read_tensors(tmp_path / "merged"))
    _assert_same(peft_oracle.merge(arch, base, chain[:1]).tensors, _merged(base, tmp_path / "a0", tmp_path / "first"))


def _merged(base: Path, adapter: Path, folder: Path) -> Mapping[str, torch.Tensor]:
    surgery.merge(base, adapter, output=folder)
    return disk.read_tensors(folder)


LOOKING = [
    "raw pissa on conv1d",
    "raw olora",
    "kasa",
    "deft by qr",
    "para",
    "osf",
    "glora",
    "peanut",
    "frod on conv1d",
    "waveft by coif1",
]


@pytest.mark.parametrize("name", LOOKING)
def test_what_looks_at_the_weight_does_the_same_in_small_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trained = _trained(name, tmp_path)
    surgery.merge(base, trained, output=tmp_path / "whole")
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", 300)
    monkeypatch.setattr("surgery_formats.updates.glora._ELEMENTS", 300)
    surgery.merge(base, trained, output=tmp_path / "blocks")
    whole, blocks = disk.read_tensors(tmp_path / "whole"), disk.read_tensors(tmp_path / "blocks")
    for key, value in whole.items():
        assert measure.relative_error(blocks[key], value) < 1e-6, key


@pytest.mark.parametrize("name", ["unilora", "tinylora"])
def test_a_lora_by_another_name_converts_to_one(name: str, tmp_path: Path) -> None:
    _, base, trained = _trained(name, tmp_path)
    surgery.convert(trained, output=tmp_path / "mlx", to="mlx", base=base)
    for adapter in (trained, tmp_path / "mlx"):
        surgery.merge(base, adapter, output=tmp_path / f"{adapter.name}-merged")
    merged = disk.read_tensors(tmp_path / "trained-merged")
    for key, value in disk.read_tensors(tmp_path / "mlx-merged").items():
        assert measure.relative_error(value, merged[key]) < 1e-6, key


NOT_ADALORAS = {"kasa_config", "lora_bias", "target_parameters", "use_bdlora", "use_dora"}
"""Fields that AdaLoRA's configuration has of LoRA's, and PEFT does not use for it: refused where they are on."""


def test_every_kind_and_field_of_the_installed_peft_is_known() -> None:
    unknown = {}
    for name, config in ((kind.value, config) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        if name not in NOT_READ:
            known = switches()[name]
            fields = {field.name for field in dataclasses.fields(config)}
            unknown[name] = fields - known.harmless - known.understood - set(known.refused)
    assert unknown.pop("ADALORA") == NOT_ADALORAS
    assert not any(unknown.values()), unknown
