# SPDX-License-Identifier: Apache-2.0
"""The models whose graphs are kept, their adapters, and what PEFT makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

IDS = [[2, 5, 17, 3, 41, 9, 30], [7, 1, 60, 11, 12, 8, 33]]
DECODER = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DRAWN = {"lora_A": 0.3, "lora_B": 0.3, "lora_embedding": 0.3, "lora_magnitude": 0.05}
VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2", "time_emb_proj", "conv_shortcut"]


class Kind(NamedTuple):
    """A model: what makes it, the adapters that PEFT is asked for, and a run's inputs."""

    make: object
    adapters: dict[str, dict[str, object]]
    inputs: object
    output: str


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=False))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**ENCODER, vocab_size=80, num_labels=3, max_position_embeddings=32))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**ENCODER, image_size=16, patch_size=4, num_labels=3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_inner=64, n_positions=32))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=3))


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), mid_block_type=None,
    )  # fmt: skip


def tokens() -> dict[str, Tensor]:
    ids = torch.tensor(IDS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def latents() -> dict[str, Tensor]:
    torch.manual_seed(4)
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    return {"sample": sample, "timestep": torch.tensor([7, 7]), "encoder_hidden_states": states}


def lora(targets: list[str] | str, **more: object) -> dict[str, object]:
    return {"r": 4, "lora_alpha": 6, "target_modules": targets, **more}


KINDS = {
    "llama": Kind(
        llama,
        {
            "lora": lora(ALL_LINEAR),
            "head": lora(["q_proj", "lm_head", "embed_tokens"]),
            "dora": lora(["q_proj", "v_proj", "down_proj"], use_dora=True),
            "rslora": lora(["k_proj", "o_proj"], use_rslora=True),
        },
        tokens,
        "logits",
    ),
    "qwen2": Kind(qwen2, {"lora": lora(ALL_LINEAR), "dora": lora(["k_proj"], use_dora=True)}, tokens, "logits"),
    "gpt2": Kind(gpt2, {"lora": lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)}, tokens, "logits"),
    "resnet": Kind(resnet, {"lora": lora(["convolution"]) | {"lora_alpha": 0.5}}, picture, "logits"),
    "bert": Kind(
        bert, {"lora": lora(["query", "key", "value", "dense"]), "dora": lora(["value"], use_dora=True)}, tokens, "logits"
    ),
    "vit": Kind(vit, {"lora": lora(VIT), "light": lora(VIT) | {"lora_alpha": 0.2}}, picture, "logits"),
    "unet": Kind(unet, {"lora": lora(UNET), "dora": lora(["to_q"], use_dora=True)}, latents, "sample"),
}  # fmt: skip


def seeded(model: nn.Module, seed: int, only: str = "", scale: float = 0.15) -> nn.Module:
    """A model whose parameters are drawn anew; vectors around what they are, as norms stay norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name:
                noise = scale * torch.randn_like(parameter)
                parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
        for name, values in sorted(model.named_buffers()):
            if not only and name.endswith(("running_mean", "running_var")):  # a batch norm's, which exporters fold
                values.copy_(values + 0.5 * torch.rand_like(values))
    return model


def opened(folder: Path, name: str) -> nn.Module:
    """The model of a folder, as its library loads it, in float32."""
    kind = type(KINDS[name].make())
    more = {} if name == "unet" else {"attn_implementation": "eager"}
    return kind.from_pretrained(folder, torch_dtype=torch.float32, **more).eval()


def answer(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return getattr(model(**KINDS[name].inputs()), KINDS[name].output)


def make(root: Path) -> None:
    """Bases, adapters, what each answers to the same inputs, and the weights that PEFT merges."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import save_file

    for name, kind in KINDS.items():
        place = root / "bases" / name
        base = place / "base"
        seeded(kind.make(), 1).eval().save_pretrained(base)
        (base / "generation_config.json").unlink(missing_ok=True)
        inputs = {f"inputs.{key}": value for key, value in kind.inputs().items()}
        save_file({**inputs, "outputs": answer(opened(base, name), name)}, place / "run.safetensors")
        for adapter, settings in kind.adapters.items():
            wrapped = get_peft_model(opened(base, name), LoraConfig(**settings)).eval()
            for seed, (part, scale) in enumerate(DRAWN.items(), 5):
                seeded(wrapped, seed, part, scale)
            folder = place / adapter
            wrapped.save_pretrained(folder)
            (folder / "README.md").unlink()
            tidy(folder / "adapter_config.json")
            fresh = PeftModel.from_pretrained(opened(base, name), folder).eval()
            expected = {"outputs": answer(fresh, name).clone()}
            changed = merged(fresh, next(base.glob("*.safetensors")), place / "merged")
            save_file({**expected, **changed}, place / f"{adapter}.safetensors")


def merged(wrapped: nn.Module, weights: Path, place: Path) -> dict[str, Tensor]:
    """What PEFT's merge changes of a checkpoint, under the names of its file."""
    from safetensors.torch import load_file

    before = load_file(weights)
    wrapped.merge_and_unload().save_pretrained(place)
    after = load_file(place / weights.name)
    shutil.rmtree(place)
    assert before.keys() == after.keys()
    return {f"weights.{key}": value for key, value in after.items() if not torch.equal(value, before[key])}


def tidy(path: Path) -> None:
    """Take the base's place on this machine out of a configuration, and the order of a set."""
    import json

    document = json.loads(path.read_text())
    document["base_model_name_or_path"] = None
    document["target_modules"].sort()
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
