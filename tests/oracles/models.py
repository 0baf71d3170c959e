# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures the parity tests cover, and how to load and run them.

Every parameter is random, biases and norms included: an update that lands on the wrong tensor, or a bias that is lost, shows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.oracles import disk

__all__ = ["ARCHS", "DTYPES", "Arch", "build_base", "inputs_of", "load", "logits_of", "run"]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 99  # odd, so that a transposed embedding never fits by accident
HIDDEN = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHARD_BYTES = 20_000


class TorchModule(nn.Module):
    """A model that is no transformers model: every layer kind PEFT's LoRA can wrap, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.conv1 = nn.Conv1d(12, 10, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=(1, 2))
        self.conv2_point = nn.Conv2d(6, 8, 1, bias=False)
        self.conv3 = nn.Conv3d(2, 4, (2, 3, 1))
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 7)
        self.tail = nn.Linear(7, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (batch, 8) -> (batch, 5)."""
        x = self.conv1(self.embed(ids).transpose(1, 2)).transpose(1, 2)  # (batch, 8, 10)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        planes = self.conv2_point(self.conv2(x[:, None]))  # (batch, 8, 6, 5)
        cube = self.conv3(planes.reshape(len(x), 2, 4, 6, 5))  # (batch, 4, 3, 4, 5)
        return self.tail(torch.tanh(self.head(x).mean(1))) + cube.mean((1, 2, 3))


Config = Callable[..., Any]


def _config(name: str, **fields: Any) -> Config:
    def make(**overrides: Any) -> Any:
        return getattr(transformers, name)(**{**fields, **overrides})

    return make


_LM: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {**_LM, "num_key_value_heads": 2}
_MIXTRAL: dict[str, Any] = {**_GQA, "intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Arch:
    """One architecture: its class, its tiny config, and the linear layers that plain LoRA goes to."""

    cls: str
    config: Config | None
    targets: tuple[str, ...]
    kind: str = "lm"  # what inputs it takes: lm, seq2seq, image, audio, torch
    base: Mapping[str, Any] = field(default_factory=dict)


def _llama(cls: str = "LlamaForCausalLM", **fields: Any) -> Arch:
    return Arch(
        cls,
        _config("LlamaConfig", **{**_GQA, "tie_word_embeddings": False, **fields}),
        ("q_proj", "v_proj", "up_proj", "down_proj"),
    )


_GPT2 = _config(
    "GPT2Config",
    vocab_size=VOCAB,
    n_embd=HIDDEN,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_BERT = _config("BertConfig", **_LM, num_labels=3)
_VIT = _config(
    "ViTConfig",
    hidden_size=HIDDEN,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    num_labels=5,
)
_RESNET = _config(
    "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
)

ARCHS: dict[str, Arch] = {
    "llama": _llama(),
    "llama_tied": _llama(tie_word_embeddings=True),
    "llama_cls": _llama("LlamaForSequenceClassification", num_labels=3),
    "qwen2": Arch(
        "Qwen2ForCausalLM",
        _config("Qwen2Config", **_GQA, tie_word_embeddings=True),
        ("q_proj", "k_proj", "o_proj", "gate_proj"),
    ),
    "gpt2": Arch("GPT2LMHeadModel", _GPT2, ("c_attn", "c_proj", "c_fc")),
    "gpt2_bare": Arch("GPT2Model", _GPT2, ("c_attn", "c_proj", "c_fc")),
    "bert": Arch("BertForSequenceClassification", _BERT, ("query", "value", "dense")),
    "bert_bare": Arch("BertModel", _BERT, ("query", "value")),
    "bert_mlm": Arch("BertForMaskedLM", _BERT, ("query", "value")),
    "t5": Arch(
        "T5ForConditionalGeneration",
        _config(
            "T5Config",
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=56,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        ("q", "v", "wi", "wo"),
        "seq2seq",
    ),
    "opt": Arch(
        "OPTForCausalLM",
        _config(
            "OPTConfig",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            ffn_dim=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
            pad_token_id=0,
        ),
        ("q_proj", "v_proj", "fc1", "fc2"),
    ),
    "gpt_neox": Arch(
        "GPTNeoXForCausalLM",
        _config("GPTNeoXConfig", **_LM, tie_word_embeddings=False),
        ("query_key_value", "dense", "dense_4h_to_h"),
    ),
    "phi3": Arch(
        "Phi3ForCausalLM",
        _config("Phi3Config", **_GQA, tie_word_embeddings=False),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "mixtral": Arch(
        "MixtralForCausalLM", _config("MixtralConfig", **_MIXTRAL, tie_word_embeddings=False), ("q_proj", "v_proj")
    ),
    # gate_up (E, 2*16, 32) is square: the two axis orders have the same shapes, only peft_version tells them apart
    "mixtral_square": Arch(
        "MixtralForCausalLM",
        _config("MixtralConfig", **{**_MIXTRAL, "intermediate_size": 16}, tie_word_embeddings=False),
        ("q_proj", "v_proj"),
    ),
    "qwen2_moe": Arch(
        "Qwen2MoeForCausalLM",
        _config(
            "Qwen2MoeConfig",
            **_GQA,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            decoder_sparse_step=1,
            tie_word_embeddings=False,
        ),
        ("q_proj", "v_proj"),
    ),
    "vit": Arch("ViTForImageClassification", _VIT, ("q_proj", "v_proj"), "image"),
    "resnet": Arch("ResNetForImageClassification", _RESNET, ("convolution",), "image"),
    "whisper": Arch(
        "WhisperForConditionalGeneration",
        _config(
            "WhisperConfig",
            vocab_size=VOCAB,
            d_model=HIDDEN,
            num_mel_bins=6,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=56,
            decoder_ffn_dim=56,
            max_source_positions=10,
            max_target_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        ),
        ("q_proj", "v_proj", "fc1"),
        "audio",
    ),
    "torch_module": Arch("TorchModule", None, ("head", "tail"), "torch"),
}


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random parameters of a size that keeps logits apart: matrices about 0.1, norms about 1, biases about 0.05."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            value = 0.12 * noise
        elif name.endswith("bias"):
            value = 0.05 * noise
        else:
            value = 1 + 0.1 * noise
        parameter.data.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(1 + 0.2 * torch.rand(buffer.shape, generator=generator))


def build_base(
    arch: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    layout: str = "safetensors",
    float32_parts: str = "",
    **config: Any,
) -> Path:
    """Write a random ``arch`` checkpoint into ``folder``.

    Args:
        arch: a key of ``ARCHS``.
        folder: made if missing.
        dtype: stored dtype of all floating tensors.
        seed: of the random weights.
        layout: ``safetensors``, ``sharded``, ``bin``, ``sharded_bin``.
        float32_parts: tensors whose name contains this are stored float32 whatever ``dtype`` says (mixed checkpoints).
        **config: fields of the architecture's config to override.
    """
    entry = ARCHS[arch]
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    if entry.config is None:
        model: nn.Module = TorchModule()
        _randomise(model, generator)
        disk.write_safetensors(
            folder / "model.safetensors", {k: v.to(DTYPES[dtype]) for k, v in model.state_dict().items()}
        )
        return folder
    model = getattr(transformers, entry.cls)(entry.config(**config))
    _randomise(model, generator)
    model.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    sharded = layout in ("sharded", "sharded_bin")
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES if sharded else "1GB")
    if float32_parts:
        tensors = disk.read_tensors(folder)
        disk.write_safetensors(
            folder / "model.safetensors", {k: v.float() if float32_parts in k else v for k, v in tensors.items()}
        )
    if layout in ("bin", "sharded_bin"):
        disk.to_pickles(folder)
    return folder


def load(
    arch: str,
    folder: Path,
    dtype: str = "float64",
    *,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] = {},
) -> Any:
    """The model of ``folder`` in eval mode, its tensors or config fields replaced where given (a scratch folder is written)."""
    entry = ARCHS[arch]
    if entry.config is None:
        model: Any = TorchModule().to(DTYPES[dtype])
        model.load_state_dict({k: v.to(DTYPES[dtype]) for k, v in (tensors or disk.read_tensors(folder)).items()})
        return model.eval()
    if tensors is not None or config:
        with disk.scratch() as scratch:
            fields = json.loads((folder / "config.json").read_text())
            (scratch / "config.json").write_text(json.dumps({**fields, **config}))
            disk.write_safetensors(scratch / "model.safetensors", dict(tensors or disk.read_tensors(folder)))
            return load(arch, scratch, dtype)
    cls = getattr(transformers, entry.cls)
    moe = (
        {"experts_implementation": "eager"} if "moe" in arch or "mixtral" in arch else {}
    )  # the grouped kernel knows no float64
    model, info = cls.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True, **moe)
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        raise AssertionError(f"{arch}: the checkpoint does not load cleanly: {wrong}")
    return model.eval()


@functools.cache
def inputs_of(arch: str) -> dict[str, Tensor]:
    """The fixed inputs ``run`` uses: token ids, pixels or mel frames by kind."""
    generator = torch.Generator().manual_seed(7)
    kind = ARCHS[arch].kind
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    ids[0, :6] = torch.tensor([1, 3, 4, 5, 7, 9])  # tokens whose rows some cases train
    if kind == "torch":
        return {"ids": torch.randint(0, 17, (2, 8), generator=generator)}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if kind == "audio":
        return {"input_features": torch.randn(2, 6, 20, generator=generator), "decoder_input_ids": ids}
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


@torch.no_grad()
def run(arch: str, model: Any, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits (or the last hidden state of a bare model) of ``model`` on ``inputs``, else on the fixed ones, as float64."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(parameter.dtype) if v.is_floating_point() else v for k, v in (inputs or inputs_of(arch)).items()}
    if ARCHS[arch].kind == "torch":
        return model(inputs["ids"]).double()
    out = model(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state).double()


def logits_of(arch: str, folder: Path, inputs: Mapping[str, Tensor] | None = None, dtype: str = "float32") -> Tensor:
    """Logits of the checkpoint in ``folder`` (loaded strictly, by transformers) on ``inputs``, else on the fixed ones."""
    return run(arch, load(arch, folder, dtype), inputs)
