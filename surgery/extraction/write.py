# SPDX-License-Identifier: Apache-2.0
"""The PEFT folder of an extraction: its tensors, made one at a time, and its configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from surgery.extraction.factorise import TargetFactors
from surgery.extraction.storage_plan import DenseTensor, StoragePlan, nesting
from surgery.extraction.stream.scratch import ScratchSlot
from surgery.extraction.targets import LowRankTarget
from surgery_formats.adapters.format import NewTensor
from surgery_formats.containers.safetensors import layout, reference_order
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.output_file import OutputFile
from surgery_formats.models.checkpoint import Component
from surgery_formats.tensors.tensor import as_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["TENSOR_FILE", "Scaling", "configuration", "fill", "shifted", "size_of", "tensors_of"]

TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERTS_ORDER_SINCE = (
    "0.19.0"  # the PEFT that gave expert factors the order of axes written here (huggingface/peft#3165)
)


@dataclass(frozen=True, slots=True)
class Scaling:
    """``scale = alpha / rank``, or ``alpha / sqrt(rank)``; the factors are divided by it, so that it never changes a delta.

    Attributes:
        alpha: One for all; None gives each module its own rank, which makes the scale 1 (rsLoRA: the root of the rank).
        rslora: Which of the two.
    """

    alpha: float | None = None
    rslora: bool = False

    def alpha_of(self, rank: int) -> float:
        """As written in the configuration."""
        return float(rank) if self.alpha is None else self.alpha

    def scale(self, rank: int) -> float:
        """What PEFT multiplies ``B A`` with."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)

    def fold(self, rank: int) -> float:
        """What either factor is multiplied by, so that `scale` changes nothing."""
        return 1 / math.sqrt(self.scale(rank))

    @property
    def constant(self) -> bool:
        """Whether the scale is the same at every rank."""
        return self.alpha is None and not self.rslora


def tensors_of(
    storage: StoragePlan,
    factored: Mapping[str, TargetFactors],
    ranks: Mapping[str, int],
    scaling: Scaling,
    dtype: DType,
    magnitudes: Mapping[str, ScratchSlot],
) -> tuple[NewTensor, ...]:
    """Every tensor of the file, in the order it is to have; `magnitudes` of a DoRA, ``(1, rows)``, by target path."""
    experts = [target.path for target in storage.targets if target.form == "experts"]
    found: list[NewTensor] = []
    for target in storage.targets:
        rank = ranks[target.path]
        found += _factors(
            factored[target.path],
            rank,
            scaling,
            dtype,
            nesting(target.path, experts) if target.path in experts else 0,
        )
        if target.path in magnitudes:
            found.append(_magnitude(target, magnitudes[target.path]))
    target_modules = storage.target_modules
    found += [_copy(kept, target_modules) for kept in storage.dense_tensors]
    by_name = {tensor.name: tensor for tensor in found}
    order = reference_order((tensor.name, tensor.dtype, tensor.shape) for tensor in found)
    return tuple(by_name[name] for name, _, _ in order)


def _factors(found: TargetFactors, rank: int, scaling: Scaling, dtype: DType, depth: int) -> Iterator[NewTensor]:
    """PEFT's two tensors of one unit."""
    target = found.target
    module = target.path.rpartition(".")[0]
    fold = scaling.fold(rank)

    def left(index: int = 0) -> torch.Tensor:
        return found.factors(index, rank, fold)[0]

    def right(index: int = 0) -> torch.Tensor:
        return found.factors(index, rank, fold)[1]

    out, inputs = target.deltas[0].shape
    if target.form == "embedding":  # PEFT: delta = (B A)^T
        yield NewTensor(f"{_PREFIX}{module}.lora_embedding_A", dtype, (rank, out), lambda: left().T)
        yield NewTensor(f"{_PREFIX}{module}.lora_embedding_B", dtype, (inputs, rank), lambda: right().T)
    elif target.form == "experts":  # delta of expert e: B.reshape(out, rank, E)[:, :, e] @ A[e * rank : (e + 1) * rank]
        key, count = f"{_PREFIX}{module}{'.base_layer' * depth}", len(target.deltas)
        yield NewTensor(
            f"{key}.lora_A.weight", dtype, (count * rank, inputs), lambda: _cat([right(e) for e in range(count)])
        )
        yield NewTensor(
            f"{key}.lora_B.weight",
            dtype,
            (out, rank * count),
            lambda: _stack([left(e) for e in range(count)]).reshape(out, rank * count),
        )
    else:
        ones = (1,) * (len(target.shape) - 2)
        yield NewTensor(f"{_PREFIX}{module}.lora_A.weight", dtype, (rank, *target.shape[1:]), right)
        yield NewTensor(f"{_PREFIX}{module}.lora_B.weight", dtype, (out, rank, *ones), left)


def _magnitude(target: LowRankTarget, place: ScratchSlot) -> NewTensor:
    """In float32 whatever the factors are: an error in it is one of the whole row, not of the change alone."""
    count = place.shape[1]
    shape = (1, count, *((1,) * (len(target.shape) - 2))) if target.form == "conv" else (count,)
    name = f"{_PREFIX}{target.path.rpartition('.')[0]}.lora_magnitude_vector"
    return NewTensor(name, DType.F32, shape, lambda: place.read())


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(parts)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(parts, dim=-1)


def _copy(kept: DenseTensor, target_modules: set[str]) -> NewTensor:
    tensor = kept.tensor
    module, _, leaf = kept.path.rpartition(".")
    if kept.via == "token rows":
        key = f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"
        return NewTensor(key, tensor.dtype, (len(kept.rows), *tensor.shape[1:]), lambda: _some_rows(kept))
    inner = ".base_layer" if kept.via == "bias" and module in target_modules else ""
    return NewTensor(f"{_PREFIX}{module}{inner}.{leaf}", tensor.dtype, tensor.shape, lambda: shifted(kept))


def shifted(kept: DenseTensor) -> torch.Tensor:
    """TUNED's values, plus the shift where there is one, rounded once to the stored type."""
    values = kept.tensor.read()
    return values if kept.shift is None else (values.double() + kept.shift().double()).to(values.dtype)


def _some_rows(kept: DenseTensor) -> torch.Tensor:
    import torch

    return torch.cat([kept.tensor.read(row, row + 1) for row in kept.rows])


def configuration(
    storage: StoragePlan,
    ranks: Mapping[str, int],
    scaling: Scaling,
    rank: int | None,
    base: Component,
    base_name: str,
    *,
    dora: bool = False,
) -> bytes:
    """adapter_config.json, with anchored full paths as the keys of patterns.

    Args:
        storage: What is stored how.
        ranks: By target path.
        scaling: Alpha.
        rank: ``r``; None for the one most targets have.
        base: Its class decides the task.
        base_name: Recorded.
        dora: Whether every module has magnitudes.
    """
    used = {_setting(target): ranks[target.path] for target in storage.targets}
    values = list(used.values())
    common = rank if rank in values else max(sorted(set(values)), key=values.count, default=8)
    alpha = scaling.alpha_of(common)
    modules = sorted(target.path.rpartition(".")[0] for target in storage.targets if target.form != "experts")
    experts = sorted(target.path for target in storage.targets if target.form == "experts")
    rows = {kept.path.rpartition(".")[0]: list(kept.rows) for kept in storage.dense_tensors if kept.via == "token rows"}
    architectures = [str(name) for name in base.config.get("architectures") or ()]
    causal = any("CausalLM" in name or "LMHeadModel" in name for name in architectures)
    config: dict[str, Any] = {
        "alpha_pattern": {
            _anchored(path): _number(scaling.alpha_of(r)) for path, r in used.items() if scaling.alpha_of(r) != alpha
        },
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "all" if any(kept.via == "bias" for kept in storage.dense_tensors) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(storage.saved_modules) or None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": {_anchored(path): r for path, r in used.items() if r != common},
        "revision": None,
        # PEFT refuses an adapter without a target, but for this name (peft.utils.constants.DUMMY_TARGET_MODULES)
        "target_modules": modules if modules or experts else "dummy-target-modules",
        "task_type": "CAUSAL_LM" if causal else None,
        "use_dora": dora,
        "use_rslora": scaling.rslora,
    }
    if rows:
        config["trainable_token_indices"] = rows
    if experts:
        config |= {"peft_version": _EXPERTS_ORDER_SINCE, "target_parameters": experts}
    return (
        json.dumps(config, indent=None if rows else 2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    ).encode()


def _setting(target: LowRankTarget) -> str:
    """What PEFT looks a rank up by: the parameter of experts, the module of anything else."""
    return target.path if target.form == "experts" else target.path.rpartition(".")[0]


def _anchored(path: str) -> str:
    return f"^{re.escape(path)}"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def size_of(tensors: tuple[NewTensor, ...], metadata: Mapping[str, str]) -> int:
    """Bytes of the file."""
    header, ranges = layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    return max([len(header), *(offset + size for offset, size in ranges.values())])


def fill(file: OutputFile, tensors: tuple[NewTensor, ...], metadata: Mapping[str, str]) -> str:
    """Write the file; its xxh3-128."""
    from surgery_formats.linalg.matrix import one_thread

    header, ranges = layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    state = xxhash.xxh3_128(header)
    file.pwrite(header, 0)
    with one_thread():  # a team of threads for every one of hundreds of small tensors costs more than it does
        for tensor in tensors:
            data = _bytes_of(tensor)
            state.update(data)
            file.pwrite(data, ranges[tensor.name][0])
    return state.hexdigest()


def _bytes_of(tensor: NewTensor) -> memoryview:
    """Values rounded once to the stored type.

    Raises:
        FitError: a value that the type cannot hold.
    """
    import torch

    stored = tensor.load().to(tensor.dtype.torch).contiguous().reshape(-1)
    if stored.numel() != math.prod(tensor.shape):
        raise ProofError(f"made with {stored.numel()} values instead of {list(tensor.shape)}", tensor=tensor.name)
    if tensor.dtype.is_float and not bool(torch.isfinite(stored).all()):
        raise FitError(
            f"a value is too large for {tensor.dtype.label}", tensor=tensor.name, hint="--dtype bf16 or fp32"
        )
    return as_bytes(stored)
