# SPDX-License-Identifier: Apache-2.0
"""Runs a program's loader in its own environment and says whether what it holds is what the adapter means."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

import surgery
from surgery_formats.errors import SurgeryError
from tests.loaders.adapters import ADAPTERS, BASES, VOCAB, build, build_base, logits_of
from tests.oracles.peft_oracle import quiet

__all__ = ["HOME", "LOADERS", "MEANING", "RUNNERS", "Did", "Made", "command_of", "fix", "load", "make"]

LOADERS: Mapping[str, str] = {
    "peft": "load_peft.py",
    "transformers": "load_transformers.py",
    "vllm": "load_vllm.py",
    "sglang": "load_sglang.py",
    "llama.cpp": "load_llama_cpp.py",
    "mlx-lm": "load_mlx_lm.py",
    "olive": "load_olive.py",
}
"""Script by consumer. SURGERY_LOADER_VLLM and so on hold the command that stands for ``python`` in its environment."""
RUNNERS: Mapping[str, str] = {
    "onnxruntime": "load_onnxruntime.py",
    "torchtune": "load_torchtune.py",
    "litgpt": "load_litgpt.py",
    "adapters": "load_adapters.py",
    "diffusers": "load_diffusers.py",
    "lycoris": "load_lycoris.py",
    "keras": "load_keras.py",
    "textual-inversion": "load_textual_inversion.py",
}
"""Of programs that are given nothing but what is written for them (`acting`)."""
HOME = ("peft", "transformers")  # run by the Python that runs the tests, as is onnxruntime
MEANING = {"honoured": "right", "scaled wrongly": "wrong", "ignored": "wrong", "refused": "refused"}
"""What a loader must do for each outcome of a check."""
CONSENTS: tuple[Mapping[str, object], ...] = ({}, {"rank": 64, "saved": "lora"})
MAX_RANK = 64  # of fixed adapters; vLLM is started with it
_NEAR = 1e-2  # of the change


@dataclass(frozen=True)
class Made:
    """One adapter on the disk, and what it means.

    Attributes:
        base: Folder.
        adapter: Folder.
        before: Logits of the base.
        meant: Logits of the base with the adapter.
    """

    base: Path
    adapter: Path
    before: Tensor
    meant: Tensor


@dataclass(frozen=True)
class Did:
    """What a program did: ``right``, ``wrong`` or ``refused``, and its words or its distance from what was meant."""

    outcome: str
    said: str


def make(folder: Path, names: tuple[str, ...] = tuple(ADAPTERS)) -> dict[str, Made]:
    """Build the adapters ``names`` and the bases that they need."""
    bases = {base: build_base(base, folder / "bases" / base) for base in BASES}
    made = {}
    for name in names:
        base = bases[ADAPTERS[name].base]
        made[name] = Made(base, folder / name, *build(name, base, folder / name))
    return made


def command_of(consumer: str) -> list[str] | None:
    """The command that runs ``consumer``'s loader; None where nothing names its environment."""
    owner = "diffusers" if consumer == "textual-inversion" else consumer
    variable = "SURGERY_LOADER_" + owner.upper().replace("-", "_").replace(".", "_")
    script = str(Path(__file__).parent / {**LOADERS, **RUNNERS}[consumer])
    if variable in os.environ:
        return [*shlex.split(os.environ[variable]), script]
    return [sys.executable, script] if consumer in (*HOME, "onnxruntime") else None


def _with(base: Path, found: Mapping[str, np.ndarray]) -> Tensor:
    """Logits of the base with what a loader holds beside its weights; a tied head is untied first."""
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    for key, value in found.items():
        how, name = key.split("/", 1)
        change = torch.from_numpy(value)[: parameters[name].shape[0]]  # servers pad a vocabulary
        parameters[name].data = parameters[name].data + change if how == "delta" else change
    return logits_of(model)


def _judged(made: Made, out: Path) -> Did:
    said = json.loads(out.with_suffix(".json").read_text())
    if "refused" in said:
        return Did("refused", said["refused"])
    found = dict(np.load(out.with_suffix(".npz")))
    grow = ADAPTERS[out.name].grow
    if grow and ("logits" not in found or found["logits"].shape[1] < VOCAB + grow):
        return Did("wrong", "the new rows are missing")
    got = torch.from_numpy(found["logits"]).double()[:, :VOCAB] if "logits" in found else _with(made.base, found)
    change = (made.meant - made.before).abs().max()
    distance = float((got - made.meant).abs().max() / change)
    if distance < _NEAR:
        return Did("right", "")
    idle = float((got - made.before).abs().max() / change) < _NEAR / 10
    return Did(
        "wrong", "as if there were no adapter" if idle else f"{distance:.2g} of the change is missing or too much"
    )


def load(
    consumer: str, made: Mapping[str, Made], folder: Path, max_rank: int | None = None
) -> tuple[dict[str, Did], dict[str, str]]:
    """What the program does with each adapter, and its versions."""
    command = command_of(consumer)
    if command is None:
        raise ValueError(f"no environment for {consumer}")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # it would put this project's libraries before the program's
    if max_rank is not None:
        environment["MAX_LORA_RANK"] = str(max_rank)
    for base in {one.base for one in made.values()}:
        waiting = {folder / name: one.adapter for name, one in made.items() if one.base == base}
        while waiting:
            arguments = [str(path) for out, adapter in waiting.items() for path in (base, adapter, out)]
            run = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
            left = {out: adapter for out, adapter in waiting.items() if not out.with_suffix(".json").exists()}
            if left and run.returncode in (0, 1):
                raise RuntimeError(f"{consumer} does not run: {run.stderr[-2000:]}")
            if left:  # the first of them brought the program down
                died = {"refused": f"the program dies (signal {abs(run.returncode) % 128})", "versions": {}}
                next(iter(left)).with_suffix(".json").write_text(json.dumps(died))
            waiting = dict(list(left.items())[1:])
    did = {name: _judged(one, folder / name) for name, one in made.items()}
    versions: dict[str, str] = {}
    for name in made:
        versions.update(json.loads((folder / name).with_suffix(".json").read_text())["versions"])
    return did, versions


def fix(consumer: str, one: Made, output: Path) -> str:
    """Rewrite an adapter for ``consumer`` with as little consent as it takes; returns what stood in the way, or nothing."""
    why = ""
    for consent in CONSENTS:
        try:
            surgery.check(one.base, one.adapter, consumer=consumer, fix=output, max_rank=MAX_RANK, **consent)  # type: ignore[arg-type]
        except SurgeryError as error:
            why = error.message.replace(str(one.adapter), "ADAPTER")
        else:
            return ""
    return why
