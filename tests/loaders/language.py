# SPDX-License-Identifier: Apache-2.0
"""What we write for programs that run language models: adapters by PEFT, in the formats of each program.

The dense weights are PEFT's merge, saved by transformers. Adapters come straight from PEFT, or from the file of another format that
we wrote before, so that its reader has a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import surgery
from tests.loaders.acting import Trial, program_of, start
from tests.loaders.adapters import ADAPTERS, Edit, Sample, build, build_base, fixed_config
from tests.oracles.peft_oracle import quiet
from tests.support.peft_kinds import KINDS

__all__ = ["ACTS", "FORMATS", "Act", "trials"]


@dataclass(frozen=True)
class Act:
    """One adapter, and how it is written.

    Attributes:
        adapter: A name of `SAMPLES`.
        via: The format it is converted to first, so that it is that file which is converted; or nothing.
        options: Of the last conversion.
    """

    adapter: str
    via: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.adapter} from {self.via}" if self.via else self.adapter


FORMATS: Mapping[str, str] = {
    "peft": "peft",
    "mlx-lm": "mlx",
    "llama.cpp": "gguf",
    "torchtune": "torchtune",
    "litgpt": "litgpt",
    "adapters": "adapterhub",
    "onnxruntime": "onnx-adapter",
    "keras": "keras",
}
"""What is written for each program."""
_SUFFIXES = {"gguf": ".gguf", "onnx-adapter": ".onnx_adapter", "bare": ".safetensors"}
_AS_FOR = ("mlx-lm",)  # programs instead of formats: PEFT's copies of the base's vocabulary are left out


def _louder(part: str) -> Edit:
    """What PEFT begins with small enough to be lost in the output."""
    return lambda config, tensors: (config, {k: v * 30 if part in k else v for k, v in tensors.items()})


_TARGETS = ["q_proj", "v_proj", "down_proj"]
_KINDS: Mapping[str, Sample] = {
    kind.name: Sample(
        {"target_modules": _TARGETS, **kind.fields, **kind.by_target(_TARGETS)},
        f"{kind.config}Config",
        edit=_louder("unilora_theta_d") if kind.name == "Uni-LoRA" else None,
        truth="loaded" if kind.name == "Uni-LoRA" else "trained",
    )
    for kind in KINDS
    if "linear" in kind.layers and not kind.refused
}
"""PEFT's kinds on linear layers, but for what no weight can hold."""
_WRAPPED = {"target_modules": _TARGETS}  # by the library adapters too
_SAMPLES: Mapping[str, Sample] = {
    **ADAPTERS,
    **_KINDS,
    "patterns-wrapped": Sample({**_WRAPPED, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
    "dora-wrapped": Sample({**_WRAPPED, "use_dora": True, "lora_alpha": 4}),
    "vera-wrapped": Sample({**_WRAPPED, "r": 8}, "VeraConfig"),
    "ia3-wrapped": Sample({"target_modules": ["k_proj", "v_proj", "up_proj"], "feedforward_modules": []}, "IA3Config"),
}


def _acts(*names: str, via: str = "", **options: Any) -> list[Act]:
    return [Act(name, via, options) for name in names]


_LORAS = ("plain", "rslora", "alpha-pattern", "rank-pattern", "all-linear")
_VOCABULARY = ("head", "embedding")
_WHOLE = ("layernorm", "token-rows", "qwen2-bias-all", "norm-saved", "head-saved", "embedding-saved")

ACTS: Mapping[str, Sequence[Act]] = {
    "peft": [
        *_acts(*_KINDS, *_WHOLE),
        *_acts(*_LORAS, "dora", "qwen2-plain", "moe-attention", "moe-experts", via="mlx"),
        *_acts(*_VOCABULARY, via="mlx-lm"),
        *_acts("plain", "alpha-pattern", "qwen2-plain", "moe-experts", via="gguf"),
        *_acts("plain", "alpha-pattern", "dora", "qwen2-plain", via="torchtune"),
        *_acts("plain", "all-linear", via="litgpt"),
        *_acts("patterns-wrapped", "dora-wrapped", "ia3-wrapped", via="adapterhub"),
        *_acts("plain", "alpha-pattern", via="onnx-adapter"),
        *_acts("plain", "alpha-pattern", "dora", "loha", "lokr", via="bare"),
    ],
    "mlx-lm": [
        *_acts(*_LORAS, "dora", "qwen2-plain", "moe-attention", "moe-experts"),
        *_acts(*_VOCABULARY, consumer="mlx-lm"),
        *_acts("lokr", as_lora=True),
        *_acts("alpha-pattern", "qwen2-plain", "moe-experts", via="gguf"),
    ],
    "llama.cpp": [
        *_acts(*_LORAS, "qwen2-plain", "moe-attention", "moe-experts"),
        *_acts(*_VOCABULARY, via="mlx-lm"),
        *_acts("lokr", as_lora=True),
        *_acts("alpha-pattern", via="torchtune"),
    ],
    "torchtune": [
        *_acts(*_LORAS, "dora", "qwen2-plain"),
        *_acts("head", via="mlx-lm"),
        *_acts("plain", via="gguf"),
    ],
    "litgpt": [*_acts(*_LORAS), *_acts("head", via="mlx-lm"), *_acts("plain", via="gguf")],
    "adapters": _acts("query-value", "up-down", "patterns-wrapped", "dora-wrapped", "ia3-wrapped", "vera-wrapped"),
    "onnxruntime": [*_acts(*_LORAS, "qwen2-plain"), *_acts(*_VOCABULARY, via="mlx-lm")],
    "keras": [*_acts(*_LORAS, "qwen2-plain"), *_acts("alpha-pattern", via="gguf"), *_acts("lokr", as_lora=True)],
}
"""What each program is given."""


def _dense(base: Path, adapter: Path, output: Path) -> Path:
    """The base with the adapter as PEFT merges it, saved by transformers."""
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    return fixed_config(base, output)


def _converted(source: Path, form: str, base: Path, output: Path, **options: Any) -> Path:
    """Written in a format, or as a program wants it."""
    output = output.with_suffix(_SUFFIXES.get(form, ""))
    named = {} if "consumer" in options else {"consumer": form} if form in _AS_FOR else {"to": form}
    surgery.convert(source, output=output, base=base, **named, **options)
    return output


def _graph(base: Path, adapter: Path, output: Path) -> Path:
    """A graph with inputs for LoRAs."""
    surgery.export_onnx(base, swap=[adapter], output=output, dtype="fp32")
    return output


def _trial(consumer: str, act: Act, base: Path, folder: Path) -> Trial:
    """Everything that the program is given for one act."""
    source = folder / "adapter"
    build(act.adapter, base, source, _SAMPLES)
    dense = _dense(base, source, folder / "dense")
    if act.via:
        source = _converted(source, act.via, base, folder / "via")
    written = _converted(source, FORMATS[consumer], base, folder / "written", **act.options)
    if consumer == "llama.cpp":  # its own converter makes the base into which is merged
        file = base.with_suffix(".gguf")
        if not file.exists():
            start([*program_of(consumer), "--base", str(base), str(file)])
        surgery.merge(file, written, output=folder / "merged")
        return Trial(file, dense, written, folder / "merged" / file.name)
    surgery.merge(base, written, output=folder / "merged")
    if consumer == "onnxruntime":
        names = {"base": base, "dense": dense, "merged": folder / "merged"}
        graphs = {name: _graph(model, source, folder / f"{name}-graph") for name, model in names.items()}
        return Trial(graphs["base"], graphs["dense"], written, graphs["merged"])
    return Trial(base, dense, written, folder / "merged")


def trials(consumer: str, folder: Path) -> dict[str, Trial]:
    """Everything that a program is given."""
    bases: dict[str, Path] = {}
    made = {}
    for number, act in enumerate(ACTS[consumer]):
        name = _SAMPLES[act.adapter].base
        if name not in bases:
            bases[name] = build_base(name, folder / "bases" / name)
        made[str(act)] = _trial(consumer, act, bases[name], folder / str(number))
    return made
