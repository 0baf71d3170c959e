# SPDX-License-Identifier: Apache-2.0
"""Combinations of a kind of PEFT adapter, a kind of layer and a model type, generated in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from tests.oracles import peft_oracle
from tests.support.attached import Attached, attach, linear_modules, stacks

__all__ = ["COMBINATIONS", "KINDS", "TYPES", "Combination", "Kind", "made", "sample"]

Fields = Callable[[Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: As papers and PEFT have it.
        config: Name of its class of PEFT, without ``Config``.
        fields: Of the configuration.
        layers: Kinds of layers on which PEFT has it, keys of `TYPES`.
        by_target: Fields that depend on the modules' paths.
        refused: What its merge says, where no merge exists.
    """

    name: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[str] = ("linear",)
    by_target: Fields = lambda targets: {}
    refused: str = ""


TYPES: Mapping[str, Sequence[str]] = {
    "linear": (
        *("llama", "mixtral", "bert", "qwen2_vl", "vit", "t5", "mllama", "gpt_neox", "whisper", "qwen3_moe", "phi3"),
        *("clip", "bloom", "llava", "deepseek_v3", "gemma3_text", "wav2vec2", "falcon", "opt", "qwen3_5_moe", "bart"),
        *("gpt_oss", "olmo2", "roberta", "nemotron_h", "mistral", "swin", "hrm_text", "cohere2", "granitemoe", "mpnet"),
        *("qwen2_5_vl", "glm4_moe", "smollm3", "big_bird", "internvl", "jetmoe", "starcoder2", "deit", "mamba2"),
        *("qwen3", "stablelm", "distilbert", "glm4v", "phimoe", "codegen", "mt5", "inkling2_text", "jamba", "gemma3"),
        *("electra", "qwen3_vl_moe", "olmoe", "hubert", "nemotron", "dinov2", "gptj", "lfm2_moe", "pegasus", "ernie"),
    ),
    "linear with a bias": ("bert", "vit", "gpt_neox", "whisper", "bart", "roberta"),
    "Conv1D": ("gpt2", "openai-gpt"),
    "Conv1d": ("whisper", "wav2vec2", "hubert"),
    "Conv2d": ("resnet", "vit", "convnext", "swin", "regnet", "dinov2"),
    "Conv3d": ("videomae", "vivit"),
    "embedding": ("llama", "bert", "gpt2", "t5", "opt", "qwen3_moe", "gpt_neox", "gemma3_text", "llava", "whisper"),
    "experts": ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "jetmoe", "qwen3_vl_moe", "olmoe"),
    "norm": ("llama", "bert", "vit", "gpt2", "gpt_neox", "t5"),
}
"""Model types by the kind of layer; the order is that in which kinds take them."""

_EACH: Mapping[str, int] = {
    "linear": 6,
    "linear with a bias": 6,
    "Conv1D": 2,
    "Conv1d": 2,
    "Conv2d": 3,
    "Conv3d": 1,
    "embedding": 3,
    "experts": 4,
    "norm": 6,
}
"""How many model types of each kind of layer a kind of adapter is tried on."""

_GPT = ("linear", "Conv1D")
_KERNELS = ("linear", "Conv1d", "Conv2d")
_ALL = ("linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "embedding")


def _blocks(targets: Sequence[str]) -> Mapping[str, Any]:
    return {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=targets[::2], target_modules_bd_b=targets[1::2], nblocks=2)}  # fmt: skip


def _inputs(targets: Sequence[str]) -> Mapping[str, Any]:
    return {"feedforward_modules": list(targets[::2])}


KINDS: Sequence[Kind] = (
    Kind("LoRA", "Lora", {"r": 3, "lora_alpha": 5}, (*_ALL, "experts")),
    Kind("rsLoRA", "Lora", {"r": 3, "lora_alpha": 5, "use_rslora": True}, (*_ALL, "experts")),
    Kind("DoRA", "Lora", {"r": 3, "lora_alpha": 5, "use_dora": True}, _ALL),
    Kind("PiSSA", "Lora", {"r": 3, "init_lora_weights": "pissa", "lora_alpha": 5}, _GPT),
    Kind("OLoRA", "Lora", {"r": 3, "init_lora_weights": "olora", "lora_alpha": 5}),
    Kind("KaSA", "Lora", {"r": 3, "kasa_config": peft.KasaConfig()}),
    Kind("MiCA", "Lora", {"r": 3, "init_lora_weights": "mica"}, ("linear", "embedding")),
    Kind("EVA", "Lora", {"r": 4, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}),
    Kind("orthogonal LoRA", "Lora", {"r": 4, "init_lora_weights": "orthogonal"}),
    Kind("VeLoRA", "Lora", {"r": 4, "velora_config": {"num_groups": 4, "scale": 1.0}}),
    Kind("MonteCLoRA", "Lora", {"r": 4, "monteclora_config": peft.MontecloraConfig(num_samples=2)}),
    Kind("BD-LoRA", "Lora", {"r": 4}, by_target=_blocks),
    Kind("AdaLoRA", "AdaLora", {"init_r": 4, "lora_alpha": 6, "total_step": 10}, (*_GPT, "Conv2d")),
    Kind("BEFT", "Beft", {}, ("linear with a bias",)),
    Kind("BOFT", "BOFT", {"boft_block_size": 4}),
    Kind("C3A", "C3A", {"block_size": 8}),
    Kind("DEFT", "Deft", {"r": 3}, _GPT),
    Kind("PaRa", "Deft", {"r": 3, "decomposition_method": "qr", "para": True}, _GPT),
    Kind("DeLoRA", "Delora", {"r": 3, "delora_lambda": 7}),
    Kind("FourierFT", "FourierFT", {"n_frequency": 60, "scaling": 40.0}, _GPT),
    Kind("FRoD", "Frod", {"sparse_rate": 0.02}, _GPT),
    Kind("GLoRA", "Glora", {"r": 3}),
    Kind("GraLoRA", "Gralora", {"r": 8, "gralora_k": 2, "hybrid_r": 3, "alpha": 5}, _GPT),
    Kind("HiRA", "Hira", {"r": 3}, _ALL),
    Kind("HRA", "HRA", {"r": 4}),
    Kind("(IA)^3", "IA3", {}, (*_GPT, "Conv2d", "Conv3d"), _inputs),
    Kind("LN tuning", "LNTuning", {}, ("norm",)),
    Kind("LoHa", "LoHa", {"r": 3, "alpha": 5}, _KERNELS),
    Kind("LoKr", "LoKr", {"r": 3, "alpha": 5}, _KERNELS),
    Kind("MiSS", "Miss", {"r": 6}),
    Kind("BAT", "Miss", {"r": 8, "init_weights": "bat"}),
    Kind("OFT", "OFT", {"oft_block_size": 8}, ("linear", "embedding")),
    Kind("OSF", "OSF", {"effective_rank": 12}),
    Kind("PEANuT", "Peanut", {"r": 3, "scaling": 0.7}),
    Kind("PVeRA", "Pvera", {"r": 4}, _GPT),
    Kind("RandLoRA", "RandLora", {"r": 5, "randlora_alpha": 3}, _GPT),
    Kind("RoAd", "Road", {"group_size": 8, "variant": "road_2"}),
    Kind("SHiRA", "Shira", {"r": 2}),
    Kind("SuperTuning", "Supertuning", {"r": 3, "lora_alpha": 5, "sparsity": 0.9}),
    Kind("TinyLoRA", "TinyLora", {"r": 3, "u": 6, "weight_tying": 1.0}, (*_GPT, "embedding")),
    Kind("trainable tokens", "TrainableTokens", {"token_indices": [4, 7, 9, 11, 20]}, ("embedding",)),
    Kind("Uni-LoRA", "UniLora", {"r": 3, "theta_d_length": 50, "save_indices": True}, _GPT),
    Kind("VB-LoRA", "VBLoRA", {"r": 3, "num_vectors": 11, "vector_length": 8}, _GPT),
    Kind("VeRA", "Vera", {"r": 6, "d_initial": 0.3}, _GPT),
    Kind("WaveFT", "WaveFT", {"n_frequency": 60, "scaling": 25.0}, _GPT),
    Kind("Lily", "Lily", {"r": 3, "stride_A": 1, "num_B": 2}, refused="a router mixes"),
    Kind("PSOFT", "Psoft", {"r": 3}, refused="signs"),
)


REFUSED: Mapping[tuple[str, str], str] = {
    ("embedding", "t5"): "scales T5's last hidden state by d_model",
}
"""Layers and model types on which a merge is refused, with the reason: a tied head that cannot be parted."""


@dataclass(frozen=True)
class Combination:
    """One adapter to make."""

    kind: Kind
    layer: str
    model_type: str

    @property
    def refused(self) -> str:
        """What its merge says; empty where it is right."""
        follows = self.kind.name == "trainable tokens"  # the head gets the rows too
        return self.kind.refused or ("" if follows else REFUSED.get((self.layer, self.model_type), ""))

    def __str__(self) -> str:
        return f"{self.kind.name}, {self.layer}, {self.model_type}"


def _combinations() -> list[Combination]:
    found = []
    for layer, types in TYPES.items():
        taken = 0
        for kind in KINDS:
            if layer in kind.layers:
                each = 2 if kind.refused else min(_EACH[layer], len(types))
                found += [Combination(kind, layer, types[(taken + at) % len(types)]) for at in range(each)]
                taken += each
    return found


COMBINATIONS: Sequence[Combination] = _combinations()


def sample(every: int) -> list[Combination]:
    """Each `every`-th of them; with the first of each kind and of each kind of layer."""
    chosen = set(range(0, len(COMBINATIONS), every))
    first = {key: at for at, one in reversed(list(enumerate(COMBINATIONS))) for key in (one.kind.name, one.layer)}
    chosen |= set(first.values())
    return [one for at, one in enumerate(COMBINATIONS) if at in chosen]


_CLASSES: Mapping[str, Any] = {
    "Conv1D": transformers.pytorch_utils.Conv1D,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "embedding": nn.Embedding,
}
_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_MOST = 5
"""Modules that one adapter has, at most."""


def _fits(module: Any, layer: str) -> bool:
    if layer == "embedding":
        return bool(module.weight.shape[1] % 8 == 0 and len(module.weight) >= 16)
    if layer.startswith("Conv") and layer != "Conv1D":
        return bool(module.groups == 1 and set(module.dilation) == {1})
    sized = all(size % 8 == 0 and size >= 16 for size in module.weight.shape)
    return sized and (module.bias is not None or "bias" not in layer)


def targets(model: Any, layer: str) -> list[str]:
    """Paths of some modules of a kind of layer, from the first to the last of the model."""
    if layer == "norm":
        found = [name for name, one in model.named_modules() if type(one).__name__.endswith("Norm")]
    elif layer.startswith("linear"):
        modules = dict(model.named_modules())
        found = [name for name in linear_modules(model) if _fits(modules[name], layer)]
        if stacks(model):  # PEFT takes these names for those of experts, whatever their path
            found = [name for name in found if not name.endswith(_EXPERTS)]
    else:
        found = [
            name
            for name, one in model.named_modules()
            if isinstance(one, _CLASSES[layer]) and _fits(one, layer) and "position" not in name
        ]
    step = max(1, len(found) // _MOST)
    return found[::step][:_MOST]


def configure(model: Any, kind: Kind, layer: str) -> peft.PeftConfig:
    """PEFT's configuration of a kind for some modules of a kind of layer."""
    made = getattr(peft, f"{kind.config}Config")
    if layer == "experts":
        return made(target_modules=[], target_parameters=stacks(model)[:4], **kind.fields)
    chosen = targets(model, layer)
    if not chosen:
        raise LookupError(f"no {layer}")
    if kind.name == "trainable tokens":
        chosen = chosen[:1]
    return made(target_modules=chosen, **kind.fields, **kind.by_target(chosen))


def randomise(attached: Any, generator: torch.Generator) -> None:
    """Every trained number random.

    Raises:
        AssertionError: A factor is left at zero or where PEFT began.
    """
    before = {name: one.detach().clone() for name, one in attached.named_parameters() if one.requires_grad}
    peft_oracle.randomise(attached, generator)
    for name, one in attached.named_parameters():
        if one.requires_grad:
            assert one.count_nonzero() == one.numel(), f"{name} has zeros"
            assert (one != before[name]).float().mean() > 0.99, f"{name} is as it began"


def made(combination: Combination, folder: Path) -> Attached:
    """The adapter and its base in `folder`."""
    kind, layer = combination.kind, combination.layer
    return attach(combination.model_type, folder, lambda model: configure(model, kind, layer), randomise)
