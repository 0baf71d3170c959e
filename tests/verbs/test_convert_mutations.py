# SPDX-License-Identifier: Apache-2.0
"""The proof of a conversion finds a writer that is wrong in one thing, whether it copies tensors or computes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from surgery import convert
from surgery.engine.adapter_output import stored_as
from surgery_formats.adapters.format import Moved, NewTensor, Rendering
from surgery_formats.adapters.packing import PackedFile
from surgery_formats.containers.base import TensorSpec
from surgery_formats.errors import ProofError

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Case:
    """A conversion of a golden adapter.

    Attributes:
        source: The adapter.
        to: Its new format.
        base: The base that gives the names, or nothing.
    """

    source: str
    to: str
    base: str = ""

    def __str__(self) -> str:
        return f"{self.source} to {self.to}"


CASES = (
    Case("mlx/llama/lora-last1", "peft"),
    Case("mlx/llama/lora-last1", "peft", "mlx/llama/base"),
    Case("gguf/llama/lora/peft", "gguf", "gguf/llama/base"),
    Case("torchtune/llama/epoch/adapter_model.pt", "peft", "torchtune/llama/base"),
    Case("kohya/sd1/lora/adapter.safetensors", "diffusers", "kohya/sd1/base"),
    Case("onetrainer/legacy.safetensors", "omi", "flux/base-bfl.safetensors"),
    Case("onetrainer/omi.safetensors", "diffusers", "flux/base-diffusers.safetensors"),
    Case("onetrainer/omi.safetensors", "bare", "flux/base-diffusers.safetensors"),
    Case("onetrainer/omi.safetensors", "comfyui", "flux/base-diffusers.safetensors"),
)


def matrices(rendering: Rendering) -> list[NewTensor]:
    return [tensor for tensor in rendering.tensors if len(tensor.shape) > 1 and tensor.dtype.is_float]


def with_tensors(rendering: Rendering, *changed: NewTensor) -> Rendering:
    by_name = {tensor.name: tensor for tensor in changed}
    return replace(rendering, tensors=tuple(by_name.get(tensor.name, tensor) for tensor in rendering.tensors))


def alike(tensors: list[NewTensor]) -> Iterator[tuple[NewTensor, NewTensor]]:
    """Pairs that could be taken for each other, and differ."""
    for one, other in combinations(tensors, 2):
        if (one.shape, one.dtype) == (other.shape, other.dtype) and not np.array_equal(one.load(), other.load()):
            yield one, other


def swap(rendering: Rendering) -> Rendering:
    """Two tensors under each other's names."""
    one, other = next(alike(matrices(rendering)))
    return with_tensors(rendering, replace(one, load=other.load), replace(other, load=one.load))


def swap_modules(rendering: Rendering) -> Rendering:
    """Two modules under each other's names: all that belongs to one of them is told to be the other's."""
    modules: dict[str, dict[str, NewTensor]] = {}
    for tensor in rendering.tensors:
        stem, _, leaf = tensor.name.partition(".lora")
        modules.setdefault(stem, {})[leaf] = tensor
    for one, other in combinations([module for module in modules.values() if len(module) > 1], 2):
        pairs = [(one.get(leaf), other.get(leaf)) for leaf in one.keys() | other.keys()]
        known = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
        if len(known) == len(pairs) and all(mine.shape == theirs.shape for mine, theirs in known):
            changed = [replace(a, load=b.load) for pair in known for a, b in (pair, pair[::-1])]
            return with_tensors(rendering, *changed)
    raise AssertionError("no two modules are of one shape")


def copy_another(rendering: Rendering) -> Rendering:
    """The bytes of another tensor where those of this one are meant."""
    one, other = next(alike([tensor for tensor in matrices(rendering) if isinstance(tensor.load, Moved)]))
    assert isinstance(one.load, Moved)
    assert isinstance(other.load, Moved)
    return with_tensors(rendering, replace(one, load=replace(one.load, tensors=other.load.tensors)))


def scale_a_matrix(rendering: Rendering) -> Rendering:
    """A factor that is larger by a hundred-thousandth."""
    first = matrices(rendering)[0]
    return with_tensors(rendering, replace(first, load=lambda: first.load().astype(np.float64) * 1.00001))


def change_a_scale(rendering: Rendering) -> Rendering:
    """A scale that is larger by a hundredth, wherever the format states it."""
    if alpha := next((tensor for tensor in rendering.tensors if tensor.name.endswith(".alpha")), None):
        return with_tensors(rendering, replace(alpha, load=lambda: alpha.load() * 1.01))
    if rendering.tensor_file.endswith(".gguf"):

        def packing(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
            plan, key = rendering.packing(specs, metadata), b"adapter.lora.alpha"
            at = plan.header.index(key) + len(key) + 4  # behind the number that says float32
            (number,) = struct.unpack_from("<f", plan.header, at)
            header = plan.header[:at] + struct.pack("<f", number * 1.01) + plan.header[at + 4 :]
            return replace(plan, header=header)

        return replace(rendering, packing=packing)
    if "lora_adapter_metadata" in rendering.metadata:
        stated = json.loads(rendering.metadata["lora_adapter_metadata"])
        key = next(key for key in stated if key.endswith(".lora_alpha"))
        text = json.dumps({**stated, key: stated[key] * 1.01})
        return replace(rendering, metadata={**rendering.metadata, "lora_adapter_metadata": text})
    config = json.loads(rendering.small_files["adapter_config.json"])
    text = json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.01})
    return replace(rendering, small_files={**rendering.small_files, "adapter_config.json": text.encode()})


def drop_a_tensor(rendering: Rendering) -> Rendering:
    """One factor of two."""
    first = matrices(rendering)[0]
    return replace(rendering, tensors=tuple(tensor for tensor in rendering.tensors if tensor is not first))


def drop_a_module(rendering: Rendering) -> Rendering:
    """Both factors, and all that belongs to them."""
    stem = matrices(rendering)[0].name.partition(".lora")[0]
    kept = tuple(tensor for tensor in rendering.tensors if not tensor.name.startswith(f"{stem}."))
    assert len(kept) < len(rendering.tensors) - 1
    return replace(rendering, tensors=kept)


def swap_the_axes(rendering: Rendering) -> Rendering:
    """A factor with its numbers in the order of columns."""
    for tensor in matrices(rendering):
        turned = np.swapaxes(values := np.asarray(tensor.load()), 0, 1).reshape(tensor.shape)
        if not np.array_equal(turned, values):
            return with_tensors(rendering, replace(tensor, load=lambda turned=turned: turned))  # type: ignore[misc]
    raise AssertionError("every matrix is symmetric")


MUTATIONS = (swap, swap_modules, scale_a_matrix, change_a_scale, drop_a_tensor, drop_a_module, swap_the_axes)
Mutation = Callable[[Rendering], Rendering]


def without_tokens(file: Path, folder: Path) -> Path:
    """A LoRA without the embeddings beside it, which no base has rows for."""
    with safe_open(file, "numpy") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys() if not name.startswith("bundle_emb.")}  # noqa: SIM118
        save_file(kept, folder / file.name, opened.metadata())
    return folder / file.name


def fails(case: Case, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion is refused with the exit code of a failed proof, and leaves nothing behind."""
    monkeypatch.setattr(
        "surgery.engine.conversion.stored_as", lambda rendering, dtype: mutation(stored_as(rendering, dtype))
    )
    source = (
        without_tokens(GOLDEN / case.source, tmp_path) if case.source.startswith("onetrainer") else GOLDEN / case.source
    )
    folder = tmp_path / "made"
    folder.mkdir()
    endings = {"gguf": ".gguf", "peft": "", "mlx": "", "torchtune": "", "litgpt": ""}
    output = folder / f"out{endings.get(case.to, '.safetensors')}"
    with pytest.raises(ProofError) as caught:
        convert(source, case.to, output=output, base=GOLDEN / case.base if case.base else None)
    assert caught.value.exit_code == 5
    assert not list(folder.iterdir())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_writer_that_is_wrong_fails_its_proof(
    case: Case, mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(case, mutation, tmp_path, monkeypatch)


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_copy_of_other_bytes_fails_its_proof(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(Case("kohya/sd1/lora/adapter.safetensors", to, "kohya/sd1/base"), copy_another, tmp_path, monkeypatch)
