# SPDX-License-Identifier: Apache-2.0
"""The registry of merge cases: build one, get base, adapters and the checkpoint that a correct merge must write.

Use::

    built = build(CASES["gpt2-dora"], tmp_path)
    surgery.merge(built.base, ...); compare(built.expected)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles import disk, models, peft_oracle
from tests.oracles.peft_oracle import Merged

__all__ = ["CASES", "RECIPES", "Adapter", "Answer", "Built", "Case", "Recipe", "Trained", "add", "build"]

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Rewrite = Callable[[Config, Tensors], tuple[Config, Tensors]]


@dataclass(frozen=True)
class Case:
    """One merge with a known answer."""

    name: str
    arch: str
    dtype: str  # of the base as stored
    tags: frozenset[str]  # options exercised


@dataclass(frozen=True)
class Built:
    """A case on disk, and its answer.

    Attributes:
        base: folder of the base checkpoint.
        adapters: folders and weights, in order.
        expected: every tensor of a correct merge under its on-disk name, in its stored dtype (rounded once from float64).
        reference64: the same tensors before that rounding; integer tensors as they are.
        changed: names whose values differ from the base's, or that the base has not got.
        peft: PEFT's own merge in the stored dtype, by on-disk name; None where PEFT cannot do the case or does it wrong.
        peft_rounds_once: PEFT rounds each changed tensor once, so its bits are the answer (see ``measure.bit_differences``).
        attached: float64 logits of the model with adapters attached, on ``models.inputs_of(arch)``; None where no peer can attach.
        config: fields of config.json that must hold in the output, where they differ from the base's.
        notes: what is special, and where PEFT is wrong.
    """

    case: Case
    base: Path
    adapters: list[tuple[Path, float]]
    expected: Tensors
    reference64: Tensors
    changed: frozenset[str]
    peft: Tensors | None
    peft_rounds_once: bool
    attached: Tensor | None
    config: Config
    notes: str

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of ``attached``."""
        return models.inputs_of(self.case.arch)


@dataclass(frozen=True)
class Trained:
    """What an oracle gets: the base, and the adapters as PEFT wrote them, before a case's rewriting."""

    arch: str
    base: Path
    adapters: list[tuple[Path, float]]
    resize: int
    scratch: Path


@dataclass(frozen=True)
class Answer:
    """What an oracle says: float64 tensors by on-disk name, logits, config fields."""

    tensors: Tensors
    attached: Tensor | None
    config: Config


@dataclass(frozen=True)
class Adapter:
    """How one adapter of a case comes to be.

    Attributes:
        config: fields of the PEFT config.
        kind: its class in peft.
        weight: in the merge.
        store: dtype the tensors are stored in.
        pickled: ``adapter_model.bin`` instead of safetensors.
        edit: changes files before the oracle sees them (it changes the meaning).
        rewrite: changes files after the oracle saw them (another spelling of the same meaning).
        make: writes the adapter instead of training it: ``make(base, folder, generator)``.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "LoraConfig"
    weight: float = 1.0
    store: str = "float32"
    pickled: bool = False
    edit: Rewrite | None = None
    rewrite: Rewrite | None = None
    make: Callable[[Path, Path, torch.Generator], None] | None = None


@dataclass(frozen=True)
class Recipe:
    """How a case is built and judged; ``peft_rounds_once`` speaks of half precision only."""

    adapters: tuple[Adapter, ...]
    base: Mapping[str, Any] = field(default_factory=dict)
    resize: int = 0
    oracle: Callable[[Trained], Answer] | None = None
    peft_wrong: bool = False
    peft_rounds_once: bool = True
    notes: str = ""


CASES: dict[str, Case] = {}
RECIPES: dict[str, Recipe] = {}


def add(name: str, arch: str, *adapters: Adapter, tags: str, dtype: str = "float32", **recipe: Any) -> None:
    """Register a case; ``recipe`` are fields of ``Recipe``."""
    if name in CASES:
        raise ValueError(f"two cases are called {name}")
    CASES[name] = Case(name, arch, dtype, frozenset(tags.split()))
    RECIPES[name] = Recipe(adapters, **recipe)


def peft_answer(trained: Trained) -> Answer:
    """The default oracle: PEFT merges a float64 copy of the base."""
    merged = peft_oracle.merge(trained.arch, trained.base, trained.adapters, "float64", trained.resize)
    return Answer(merged.tensors, merged.attached, merged.config)


def _prepare(adapter: Adapter, arch: str, base: Path, folder: Path, seed: int, resize: int) -> Tensor | None:
    """Write the adapter as the oracle may read it; returns the logits of the trained model while the files still say the same."""
    if adapter.make is not None:
        adapter.make(base, folder, torch.Generator().manual_seed(seed))
        return None
    fields = (
        {"r": 4, "lora_alpha": 6, "target_modules": list(models.ARCHS[arch].targets)}
        if adapter.kind == "LoraConfig"
        else {}
    )
    fields.update(adapter.config)
    trained = peft_oracle.train(arch, base, adapter.kind, fields, folder, seed=seed, resize=resize)
    config, tensors = disk.adapter(folder)
    for key in config.keys() & {
        "rank_pattern",
        "alpha_pattern",
    }:  # PEFT sorts them when it saves: a file written by hand need not be sorted
        if key in fields and config[key] != fields[key]:
            raise AssertionError(f"PEFT changed {key}: {config[key]}")
        if config[key] is not None:
            config[key] = dict(fields.get(key, config[key]))
    if adapter.edit is not None:
        config, tensors = adapter.edit(config, tensors)
    stored = {k: v.to(models.DTYPES[adapter.store]) if v.is_floating_point() else v for k, v in tensors.items()}
    disk.write_adapter(folder, config, stored, pickled=adapter.pickled)
    return trained if adapter.edit is None and adapter.store == "float32" and adapter.weight == 1 else None


def _config_changes(base: Path, config: Mapping[str, Any]) -> Config:
    if not (base / "config.json").exists():
        return {}
    before = json.loads((base / "config.json").read_text())
    keys = ("tie_word_embeddings", "vocab_size")
    return {k: config[k] for k in keys if k in config and config[k] != before.get(k, True if k == keys[0] else None)}


def build(case: Case, folder: Path) -> Built:
    """Write base and adapters of ``case`` under ``folder`` and work out the answer (well under a second each)."""
    recipe = RECIPES[case.name]
    seed = zlib.crc32(case.name.encode())
    base = models.build_base(case.arch, folder / "base", dtype=case.dtype, seed=seed % 1000, **recipe.base)
    pristine, trained_logits = [], None
    for i, adapter in enumerate(recipe.adapters):
        path = folder / "pristine" / f"adapter{i}"
        trained_logits = _prepare(adapter, case.arch, base, path, seed + i, recipe.resize)
        pristine.append((path, adapter.weight))
    trained = Trained(case.arch, base, pristine, recipe.resize, folder)
    answer = (recipe.oracle or peft_answer)(trained)
    if trained_logits is not None and answer.attached is not None and len(pristine) == 1:
        # the files hold all that was trained: what PEFT forgets to save would make every later check agree on nonsense
        torch.testing.assert_close(answer.attached, trained_logits, rtol=0, atol=2e-5)
    delivered = []
    for i, (adapter, (path, weight)) in enumerate(zip(recipe.adapters, pristine, strict=True)):
        if adapter.rewrite is not None:
            config, tensors = adapter.rewrite(*disk.adapter(path))
            path = disk.write_adapter(folder / f"adapter{i}", config, tensors, pickled=adapter.pickled)
        delivered.append((path, weight))
    stored = disk.read_tensors(base)
    default = models.DTYPES[case.dtype]
    expected = {k: v.to(stored[k].dtype if k in stored else default) for k, v in answer.tensors.items()}
    peer: Merged | None = None
    if not recipe.peft_wrong and recipe.oracle is None:
        peer = peft_oracle.merge(case.arch, base, pristine, case.dtype, recipe.resize)
    return Built(
        case=case,
        base=base,
        adapters=delivered,
        expected=expected,
        reference64=answer.tensors,
        changed=frozenset(k for k, v in expected.items() if k not in stored or not torch.equal(v, stored[k])),
        peft=peer.tensors if peer else None,
        peft_rounds_once=recipe.peft_rounds_once and peer is not None and case.dtype != "float32",
        attached=answer.attached,
        config=_config_changes(base, answer.config),
        notes=recipe.notes,
    )


from tests.oracles import catalog as _catalog  # noqa: E402, F401  (registers cases)
from tests.oracles import catalog_kinds as _kinds  # noqa: E402, F401
from tests.oracles import catalog_parts as _parts  # noqa: E402, F401
from tests.oracles import catalog_peft_kinds as _peft_kinds  # noqa: E402, F401
from tests.oracles import catalog_spellings as _spellings  # noqa: E402, F401
