# SPDX-License-Identifier: Apache-2.0
"""What computing a weight allocates is at most what `block_bytes` says of it, in every format: bytes of arrays are counted."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery.engine import blocks
from surgery.engine.arithmetic import compute
from surgery.engine.blocks import block_bytes, block_height
from surgery.engine.plan import Compute, PlannedTensor, Requantise
from surgery.engine.quantised import requantise
from surgery_formats.binding.operation import Operation
from surgery_formats.canonical.adapter import Site
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage, read_block
from surgery_formats.storage.gguf import weights
from surgery_formats.storage.plain import Plain
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.tensors.computed import computed, zeros
from surgery_formats.tensors.views import transpose, whole
from surgery_formats.updates import LoRA
from surgery_formats.updates.base import Factor
from tests.storage.test_ggml_types import CODECS, GOLDEN, claimed, stored
from tests.support.quantised_folders import FORMATS

ROWS, COLUMNS, RANK = 768, 2048, 8
SMALLER = 4
"""Times that blocks are smaller here than they are: nothing but their size changes, and the tests are as much quicker."""


@pytest.fixture(autouse=True)
def smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (blocks, "BLOCK_ELEMENTS"),
        (requantise, "_SAMPLE_ELEMENTS"),
        (weights, "_FITTED"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) // SMALLER)


def coded(name: str, folder: Path) -> Storage:
    """A weight in one of the formats."""
    if name in CODECS:
        golden = GOLDEN[f"{name}.blocks"].reshape(4, -1)
        return claimed(stored(folder / "w", name, np.tile(golden, (ROWS // 4, COLUMNS // 256))))
    encode, method = FORMATS[name]
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    parts = {key: part.contiguous() for key, part in encode("layer.q_proj.weight", values).items()}
    save_file(parts, folder / "w.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(folder / "w.safetensors").tensors}
    config: Mapping[str, Any] = {"quantization" if name == "mlx" else "quantization_config": method}
    (weight,) = set(claimed_weights(tensors, config).values())
    return weight


def step(weight: Storage, strength: float, *, again: bool) -> Compute:
    """A LoRA on the weight, of so many times its values; into its codes `again`, or into 16 bits."""
    outputs, inputs = weight.shape[::-1] if weight.transposed else weight.shape
    chance = np.random.default_rng(0)
    scale = strength * float(abs(read_block(weight, 0, weight.group)).mean()) / RANK**0.5
    A = chance.standard_normal((RANK, inputs), np.float32)
    B = chance.standard_normal((outputs, RANK), np.float32) * np.float32(scale)
    factors = [Factor.of(computed(name, each.shape, (), lambda each=each: each)) for name, each in (("A", A), ("B", B))]
    view = transpose(whole(weight.shape)) if weight.transposed else whole(weight.shape)
    operation = Operation(LoRA(factors[0], factors[1], 1.0), view, Site("layer.q_proj.weight"), 0)
    target = weight if again else Plain.of(zeros("w", DType.BF16, weight.shape))
    return Compute(weight, (operation,), target, Requantise() if again else None)


def allocated(work: Compute) -> int:
    """Bytes, at most."""
    tracemalloc.start(1)
    try:
        before = tracemalloc.get_traced_memory()[0]
        compute("w", work, lambda part, offset, raw: None, lambda: False)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [*FORMATS, "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_no_weight_takes_more_than_is_said(name: str, tmp_path: Path) -> None:
    weight = coded(name, tmp_path)
    ways = {
        (again, strength): step(weight, strength, again=again) for again in (False, True) for strength in (0.01, 10)
    }
    allocated(ways[False, 0.01])  # imports
    for (again, strength), work in ways.items():
        assert block_height(COLUMNS, work) < ROWS / 2, "several blocks"
        said = block_bytes(cast(PlannedTensor, SimpleNamespace(step=work)))
        assert said / 4 < allocated(work) <= said, (again, strength)
