# SPDX-License-Identifier: Apache-2.0
"""A verb binds an adapter to a base once, and reads a base once for its content id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.binding import bind as binding
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models import identity
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.tensor import StoredTensor
from tests.support.adapter_files import GOLDEN, draw, write_peft
from tests.support.kit import make_base, make_lora

BASE, LORA, TUNED = (Path("examples") / name for name in ("base", "lora", "tuned"))


@dataclass(frozen=True)
class Inputs:
    """Places of a test.

    Attributes:
        base: A model that ties head and embedding.
        fused: An adapter of it, with one weight that MLX cannot hold.
        out: Where to write.
    """

    base: Path
    fused: Path
    out: Path


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_lora(tmp_path / "fused")
    file = adapter / "adapter_model.safetensors"
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    hidden = tensors["model.norm.weight"].shape[0]
    embedding = {f"{stem}_A": draw(1, 4, 64), f"{stem}_B": draw(2, hidden, 4)}
    factors = load_file(file)
    import torch

    save_file(factors | {name: torch.from_numpy(value) for name, value in embedding.items()}, file, {"format": "pt"})
    return Inputs(base, adapter, tmp_path / "out")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, ...]]:
    """How often every adapter was bound, by its path and sites; each test has one base."""
    counts: Counter[tuple[str, ...]] = Counter()
    really_check = binding.check_mergeable

    def counted(adapter: Adapter, checkpoint: Checkpoint) -> None:
        counts[str(adapter.path), *map(str, adapter.updates)] += 1
        really_check(adapter, checkpoint)

    monkeypatch.setattr(binding, "check_mergeable", counted)
    return counts


def unnamed_part(folder: Path) -> Path:
    """An adapter of a pipeline's U-Net that does not say so."""
    shape = load_file(GOLDEN / "kohya/sd1/base/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].shape
    factors = {"A": draw(1, 2, *shape[1:]), "B": draw(2, shape[0], 2, 1, 1)}
    tensors = {f"base_model.model.conv_in.lora_{side}.weight": value for side, value in factors.items()}
    return write_peft(folder, tensors, r=2)


VERBS: dict[str, tuple[Callable[[Inputs], Any], int]] = {  # and how many bindings they need
    "merge": (lambda i: surgery.merge(i.base, i.fused, output=i.out), 1),
    "export of a merge": (lambda i: surgery.export_onnx(BASE, LORA, output=i.out), 1),
    "export with slots": (lambda i: surgery.export_onnx(BASE, swap=LORA, output=i.out), 1),
    "convert": (lambda i: surgery.convert(LORA, "mlx", base=BASE, output=i.out), 2),
    "convert, partly": (lambda i: surgery.convert(i.fused, "mlx", base=i.base, output=i.out, allow_loss=True), 4),
    "convert to a part": (
        lambda i: surgery.convert(
            unnamed_part(i.base.parent / "unet"),
            "kohya",
            base=GOLDEN / "kohya/sd1/base",
            output=i.out.with_suffix(".safetensors"),
        ),
        2,
    ),
    "combine": (lambda i: surgery.combine([LORA, (LORA, 0.5)], to="mlx", base=BASE, output=i.out), 0),
    "extract": (lambda i: surgery.extract_lora(BASE, TUNED, rank=2, output=i.out), 1),
    "extract to MLX": (
        lambda i: surgery.extract_lora(BASE, TUNED, rank=2, to="mlx", kind="lora", output=i.out, allow_loss=True),
        3,
    ),
    "extract to codes": (lambda i: surgery.extract_lora(BASE, TUNED, rank=2, factors="int8", output=i.out), 4),
}


@pytest.mark.parametrize(("call", "bindings"), VERBS.values(), ids=VERBS)
def test_no_adapter_is_bound_twice_to_one_base(
    call: Callable[[Inputs], Any], bindings: int, inputs: Inputs, bound: Counter[tuple[str, ...]]
) -> None:
    call(inputs)
    assert not {adapter: times for adapter, times in bound.items() if times > 1}
    assert bound.total() == bindings


def test_a_merge_makes_no_parameter_of_a_weight_that_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    really_make = Component._parameter

    def counted(component: Component, storage: Storage) -> Parameter:
        made[storage.name] += 1
        return really_make(component, storage)

    monkeypatch.setattr(Component, "_parameter", counted)
    plan = surgery.merge(BASE, LORA, dry_run=True).ledger.plan
    changed = {tensor.name for tensor in plan.computed()}
    assert len(changed) < len(plan.tensors)
    assert made == dict.fromkeys(changed | {"model.embed_tokens.weight"}, 1)  # whose type is the model's


HASHING: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge": lambda base, lora, out: surgery.merge(base, lora, output=out),
    "export of a merge": lambda base, lora, out: surgery.export_onnx(base, lora, output=out),
    "export of both": lambda base, lora, out: surgery.export_onnx(base, lora, swap=lora, output=out),
    "convert": lambda base, lora, out: surgery.convert(lora, "mlx", base=base, output=out),
    "combine": lambda base, lora, out: surgery.combine([lora, (lora, 0.5)], base=base, output=out),
}


@pytest.mark.parametrize("call", HASHING.values(), ids=HASHING)
def test_a_recorded_base_is_hashed_once(
    call: Callable[[Path, Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, checkpoint = tmp_path / "lora", open_checkpoint(BASE)
    lora.mkdir()
    (lora / "adapter_config.json").write_bytes((LORA / "adapter_config.json").read_bytes())
    metadata = {"format": "pt", "surgery.base": identity.content_id(checkpoint)}
    save_file(load_file(LORA / "adapter_model.safetensors"), lora / "adapter_model.safetensors", metadata)
    hashed: Counter[str] = Counter()
    really_hash = identity.tensor_digest

    def counted(tensor: StoredTensor) -> str:
        hashed[tensor.name] += 1
        return really_hash(tensor)

    monkeypatch.setattr(identity, "tensor_digest", counted)
    call(BASE, lora, tmp_path / "out")
    assert hashed == dict.fromkeys(checkpoint.main.tensors, 1)
