# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files of AdapterHub: adapters that its library added and saved, and what they do in its forward.

Run it from this folder, in an environment with ``torch==2.13.0 adapters==1.3.0`` (see ../README.md)::

    python make.py            # rewrites the folders and expected.json
    python make.py --check    # makes everything again elsewhere and compares it with what is here
    python make.py --load FOLDER CASE EXPECTED   # loads an adapter into the model of CASE, and measures it against a file

Expected weights are measured: every layer with an adapter is given the unit vectors, in float32. Of a prefix, what its
pool hands to the layers is taken; of a prompt, its rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    BertAdapterModel,
    CompacterConfig,
    DoRAConfig,
    GPT2AdapterModel,
    IA3Config,
    LlamaAdapterModel,
    LoRAConfig,
    MAMConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
    VeraConfig,
)
from adapters.context import ForwardContext
from adapters.methods.lora import LoRALayer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

HERE = Path(__file__).resolve().parent
Tensors = dict[str, torch.Tensor]
ALL = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}

BASES: dict[str, tuple[type, type, Any]] = {
    "bert": (
        BertForMaskedLM,
        BertAdapterModel,
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaAdapterModel,
        LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=64, tie_word_embeddings=False,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2AdapterModel,
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, attn_pdrop=0.0),
    ),
}  # fmt: skip
CASES: dict[str, tuple[str, Any, bool]] = {  # base, configuration, whether it is saved as safetensors
    "bert-lora": ("bert", LoRAConfig(r=2, alpha=6, **ALL), False),
    "bert-ia3": ("bert", IA3Config(), True),
    "bert-dora": ("bert", DoRAConfig(r=2, alpha=2, dtype="float32"), True),
    "bert-dora-alpha": ("bert", DoRAConfig(r=2, alpha=6, dtype="float32"), True),
    "bert-vera": ("bert", VeraConfig(r=3, alpha=3), True),
    "bert-prompt": ("bert", PromptTuningConfig(prompt_length=4), True),
    "bert-bottleneck": ("bert", SeqBnConfig(reduction_factor=8), True),
    "bert-compacter": ("bert", CompacterConfig(reduction_factor=4, phm_dim=2), True),
    "bert-union": ("bert", MAMConfig(PrefixTuningConfig(bottleneck_size=3, prefix_length=2)), False),
    "bert-gated": (
        "bert",
        UniPELTConfig(
            PrefixTuningConfig(prefix_length=2, bottleneck_size=3),
            LoRAConfig(r=2, alpha=2),
            SeqBnConfig(reduction_factor=8),
        ),
        False,
    ),
    "llama-lora": ("llama", LoRAConfig(r=3, alpha=6, leave_out=[0], **ALL), True),
    "llama-dora": ("llama", DoRAConfig(r=2, alpha=2, dtype="float32"), True),
    "llama-ia3": ("llama", IA3Config(), False),
    "llama-prefix": ("llama", PrefixTuningConfig(flat=True, prefix_length=3), False),
    "llama-prefix-mlp": ("llama", PrefixTuningConfig(prefix_length=3, bottleneck_size=5), False),
    "gpt2-lora": ("gpt2", LoRAConfig(r=2, alpha=4, attn_matrices=["q", "v"], intermediate_lora=True), True),
    "gpt2-lora-v": ("gpt2", LoRAConfig(r=2, alpha=4, attn_matrices=["v"]), True),
    "gpt2-ia3": ("gpt2", IA3Config(), True),
    "gpt2-prefix": ("gpt2", PrefixTuningConfig(flat=True, prefix_length=3), False),
}  # fmt: skip


def seeded(model: PreTrainedModel, seed: int, only: str = "") -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not only or f".{only}." in name:
                parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def make_base(name: str, folder: Path) -> None:
    plain, _, config = BASES[name]
    seeded(plain(config), 1).save_pretrained(folder)


def loaded(name: str, folder: Path) -> PreTrainedModel:
    model = BASES[name][1].from_pretrained(folder).eval()
    return model.requires_grad_(False)


def measured(model: PreTrainedModel, name: str, *, weights: bool) -> Tensors:
    """What the adapter `name` of a model makes of weights and biases; its prefixes and prompts."""
    found: Tensors = {}
    if weights:
        model.set_active_adapters(name)
        with ForwardContext(model.base_model, torch.zeros(1, 1, dtype=torch.long)) as context:
            context.shared_parameters = (
                {name: model.base_model.shared_parameters[name]} if name in model.base_model.shared_parameters else {}
            )
            for path, layer in model.named_modules():
                if not isinstance(layer, LoRALayer) or name not in layer.loras:
                    continue
                size = layer.loras[name].lora_A.shape[1] if hasattr(layer.loras[name], "lora_A") else layer.in_features
                zero = layer(torch.zeros(1, 1, size)).reshape(-1)
                answers = layer(torch.eye(size)[None])[0]
                transposed = getattr(layer, "fan_in_fan_out", False)
                found[f"{path}.weight"] = (answers - zero if transposed else (answers - zero).T).contiguous()
                if layer.bias is not None:
                    found[f"{path}.bias"] = zero
    pools = {n: m for n, m in model.named_modules() if hasattr(m, "prefix_tunings") and name in m.prefix_tunings}
    for pool in list(pools.values())[:1]:
        for key, states in pool.prefix_tunings[name](1).items():
            for layer, pair in enumerate(states):
                found[f"{key}.{layer}.key"], found[f"{key}.{layer}.value"] = pair[0, 0].clone(), pair[1, 0].clone()
    for module in model.modules():
        if hasattr(module, "prompt_tunings") and name in module.prompt_tunings:
            found["prompt"] = module.prompt_tunings[name].prompt_embedding.weight.clone()
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in found.items()}


def make(case: str, root: Path) -> None:
    base, config, safe = CASES[case]
    folder = root / case
    model = loaded(base, root / "base" / base)
    model.add_adapter(case, config=config)
    seeded(model, 7, case)
    if case == "bert-lora":
        torch.manual_seed(3)
        model.add_classification_head(case, num_labels=3)
    model.save_adapter(folder, case, use_safetensors=safe, with_head=case == "bert-lora")
    for file in folder.glob("*_config.json"):
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"model_name": base}, indent=2, sort_keys=True) + "\n"
        )
    weights = config.to_dict().get("architecture") == "lora" if isinstance(config, Mapping) else False
    expected = measured(model, case, weights=weights)
    if expected:
        save_file(expected, folder / "expected.safetensors")


def write(root: Path) -> None:
    for name in BASES:
        make_base(name, root / "base" / name)
        for file in (root / "base" / name).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                file.unlink()
    for case in CASES:
        make(case, root)
    versions = {name: version(name) for name in ("torch", "transformers", "adapters")}
    (root / "expected.json").write_text(
        json.dumps({"versions": versions, "cases": {c: CASES[c][0] for c in CASES}}, indent=1) + "\n"
    )


def check() -> int:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        made = {p.relative_to(name) for p in Path(name).rglob("*") if p.is_file()}
        bad = [str(p) for p in sorted(made) if not (HERE / p).is_file() or not same(Path(name) / p, HERE / p)]
        print("\n".join(f"differs: {p}" for p in bad) or f"{len(made)} files are the same")
        return 1 if bad else 0


def same(one: Path, other: Path) -> bool:
    """torch.save puts the name of the file into the archive, and times into nothing else: values are compared."""
    if one.suffix == ".bin":
        left, right = (torch.load(path, weights_only=True) for path in (one, other))
        return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return one.read_bytes() == other.read_bytes()


def load(folder: str, case: str, expected: str) -> int:
    """Load with the library's own loader; every key must be taken, and the layers must do what EXPECTED says."""
    model = loaded(CASES[case][0], HERE / "base" / CASES[case][0])
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    info: dict[str, Any] = {}
    name = model.load_adapter(folder, loading_info=info, use_safetensors=True, with_head=False)
    got = measured(model, name, weights=any(".loras." in key for key in model.state_dict()))
    wanted = load_file(expected)
    unexpected = [key for key in info.get("unexpected_keys", ()) if not key.startswith("heads.")]
    problems = [f"not taken: {unexpected}"] if unexpected else []
    for key, value in wanted.items():
        before = plain.get(key, torch.zeros_like(value))
        size = (value.double() - before).abs().max() if key in plain else value.double().abs().max()
        if key not in got:
            problems += [f"{key} is missing"] if size > 0 else []
            continue
        error = (got[key].double() - value).abs().max() / (size or 1)
        problems += [] if error <= 2e-6 else [f"{key} is off by {error:.1e}"]
    for key in got.keys() - wanted.keys():
        same_as_before = key in plain and torch.allclose(got[key], plain[key], atol=1e-6)
        problems += [] if same_as_before else [f"{key} changes"]
    print(f"adapters {adapters.__version__}:", *(problems or ["OK"]))
    return 1 if problems else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check())
    if sys.argv[1:2] == ["--load"]:
        sys.exit(load(*sys.argv[2:5]))
    write(HERE)
